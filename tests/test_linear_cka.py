"""CKA from moments equals CKA of all rows at once, for every pair of layers, however the rows come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis_kernels import Moments, StreamingCKA, linear_cka


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layers(n, widths, dtype=torch.float64):
    """Each layer is a random map of the one before, plus noise, far from the origin."""
    found, state = [], torch.randn(n, 6, dtype=torch.float64)
    for width in widths:
        state = state @ torch.randn(state.shape[1], width, dtype=torch.float64) + torch.randn(n, width, dtype=torch.float64)
        found.append((state + 9).to(dtype))
    return found


def by_kernels(x, y):
    """The definition: similarity of the centred N x N kernels."""
    K, L = ((t.double() - t.double().mean(0)) @ (t.double() - t.double().mean(0)).T for t in (x, y))
    return (K * L).sum() / (K.norm() * L.norm())


def table(xs, ys):
    return torch.stack([torch.stack([by_kernels(x, y) for y in ys]) for x in xs])


@given(
    cuts=st.lists(st.integers(1, 199), max_size=5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    both=st.booleans(),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_every_pair_of_layers_in_any_batches(cuts, dtype, both):
    xs, ys = layers(200, (5, 8, 3), dtype), layers(200, (4, 7), dtype)
    cka, edges = StreamingCKA((5, 8, 3), (4, 7) if both else ()), sorted({0, 200, *cuts})
    for a, b in zip(edges, edges[1:], strict=False):
        cka.partial_fit([x[a:b] for x in xs], [y[a:b] for y in ys] if both else ())
    expected = table(xs, ys if both else xs)
    assert cka.cka_.shape == expected.shape
    torch.testing.assert_close(cka.cka_, expected, rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=0)


def test_doors_of_linear_cka_agree():
    (x, other), (y,) = layers(100, (5, 8)), layers(100, (6,))
    expected = by_kernels(x, y)
    torch.testing.assert_close(linear_cka(x, y), expected)
    torch.testing.assert_close(linear_cka(Moments(5, 6, full_y=True).update(x, y)), expected)
    torch.testing.assert_close(linear_cka([x, other], [y]), table([x, other], [y]))
    torch.testing.assert_close(linear_cka([x, other]), table([x, other], [x, other]))
    with pytest.raises(ValueError, match="full_y=True"):
        linear_cka(Moments(5, 6).update(x, y))


def test_rotation_scale_and_shift_do_not_matter_and_constants_have_none():
    (x,) = layers(100, (5,))
    turned = 3 * x @ torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0] - 4
    torch.testing.assert_close(linear_cka(x, turned), torch.ones((), dtype=torch.float64))
    assert linear_cka(x, torch.ones(100, 2)) == 0 == linear_cka([x, torch.ones(100, 2)])[0, 1]


def test_masks_weights_merging_and_files(tmp_path):
    xs, ys = layers(120, (5, 8)), layers(120, (4,))
    mask = torch.rand(120) < 0.7
    clean = StreamingCKA((5, 8), (4,)).partial_fit([x[mask] for x in xs], [y[mask] for y in ys])
    masked = StreamingCKA((5, 8), (4,)).partial_fit(xs, ys, mask=mask)
    torch.testing.assert_close(masked.cka_, clean.cka_)
    weighted = StreamingCKA((5, 8), (4,)).partial_fit(xs, ys, weight=mask.double())
    torch.testing.assert_close(weighted.cka_, clean.cka_)
    spoiled = [x.clone() for x in xs]
    spoiled[1][~mask] = torch.nan
    torch.testing.assert_close(StreamingCKA((5, 8), (4,)).partial_fit(spoiled, ys, nan="drop").cka_, clean.cka_)
    halves = [
        StreamingCKA((5, 8), (4,)).partial_fit([x[part] for x in xs], [y[part] for y in ys])
        for part in (slice(0, 30), slice(30, None))
    ]
    halves[0].save(tmp_path / "cka.safetensors")
    loaded = StreamingCKA.load(tmp_path / "cka.safetensors")
    assert torch.equal(loaded.cka_, halves[0].cka_)
    torch.testing.assert_close(loaded.merge(halves[1]).cka_, table(xs, ys))
    before = masked.cka_
    with pytest.raises(ValueError, match="rows hold NaN or infinity"):
        masked.partial_fit(spoiled, ys)
    assert torch.equal(masked.cka_, before)


def test_wrong_use_is_refused():
    xs = layers(20, (5, 8))
    with pytest.raises(ValueError, match=r"x has layers of widths \[5, 8\], expected \[5, 7\]"):
        StreamingCKA((5, 7)).partial_fit(xs)
    with pytest.raises(ValueError, match="do not go together"):
        StreamingCKA((5,)).merge(StreamingCKA((5, 8)))
    with pytest.raises(ValueError, match="no rows have been seen"):
        _ = StreamingCKA((5,)).cka_
