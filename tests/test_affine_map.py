"""Maps between the layers of two models: the nearest rotation, and the ridge map with outputs of the right size."""

import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from chassis_kernels import Moments, fit_ridge, procrustes, stitch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pairs(n=400, d=6, t=6, noise=1.0):
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) + 4
    return x, 2 * x @ torch.randn(d, t, dtype=torch.float64) + noise * torch.randn(n, t, dtype=torch.float64) - 3


def error(y, found):
    return float((y - found).square().sum() / (y - y.mean(0)).square().sum())


def test_a_rotation_with_scale_and_shift_is_recovered():
    x, _ = pairs()
    R = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    found = procrustes(x, 2.5 * x @ R + 7)
    torch.testing.assert_close(found.W, 2.5 * R)
    torch.testing.assert_close(found.b, torch.full((6,), 7.0, dtype=torch.float64))
    assert found.scale == pytest.approx(2.5) and abs(found.residual) < 1e-12


def test_procrustes_is_scipys_and_no_other_rotation_or_scale_is_nearer():
    x, y = pairs()
    moments = Moments(6, 6).update(x[:100], y[:100]).update(x[100:], y[100:])
    found = procrustes(moments)
    R, _ = orthogonal_procrustes(*((t - t.mean(0)).numpy() for t in (x, y)))
    torch.testing.assert_close(found.W / found.scale, torch.as_tensor(R), rtol=1e-9, atol=1e-9)
    assert found.residual == pytest.approx(error(y, found(x)), rel=1e-9)
    plain = procrustes(moments, scale=False)
    assert plain.scale == 1 and plain.residual == pytest.approx(error(y, plain(x)), rel=1e-9)
    for _ in range(20):
        other = torch.linalg.qr(torch.as_tensor(R) + 0.2 * torch.randn(6, 6, dtype=torch.float64))[0]
        for scale in (0.9 * found.scale, found.scale, 1.1 * found.scale):
            assert error(y, scale * (x - x.mean(0)) @ other + y.mean(0)) >= found.residual


@pytest.mark.parametrize(("d", "t"), [(6, 4), (4, 6)])
def test_procrustes_between_different_widths_is_semi_orthogonal(d, t):
    x, y = pairs(400, d, t)
    found = procrustes(x, y)
    R = found.W / found.scale
    small = R.T @ R if d > t else R @ R.T
    torch.testing.assert_close(small, torch.eye(4, dtype=torch.float64))
    assert found.residual == pytest.approx(error(y, found(x)), rel=1e-9)


@pytest.mark.parametrize("match", ["mean", "row", "none"])
def test_stitched_outputs_have_the_root_mean_square_of_the_target(match):
    x, y = pairs(noise=20)
    found = stitch(Moments(6, 6).update(x, y), alpha=1e-2, match=match)
    out = found(x)
    rms = y.square().mean().sqrt()
    if match == "none":
        W, b = fit_ridge(x, y, 1e-2, alpha_scale="trace")
        torch.testing.assert_close(found.W, W)
        torch.testing.assert_close(found.b, b[0])
        assert out.square().mean().sqrt() < 0.95 * rms  # what least squares cannot predict, it shrinks
    else:
        torch.testing.assert_close(out.square().mean().sqrt(), rms)
        torch.testing.assert_close(found.W, found.scale * stitch(x, y, alpha=1e-2, match="none").W)
        assert found.scale > 1
    if match == "row":
        torch.testing.assert_close(out.square().mean(1).sqrt(), rms.expand(400))
    else:
        torch.testing.assert_close(out.mean(0), y.mean(0))
        assert found.residual == pytest.approx(error(y, out), rel=1e-9)
    assert found(x.bfloat16()[None]).shape == (1, 400, 6) and found(x.bfloat16()).dtype == torch.float32


def test_wrong_use_is_refused():
    x, y = pairs()
    for function in (procrustes, stitch):
        with pytest.raises(ValueError, match="expected"):
            function(x)
        with pytest.raises(ValueError, match="expected moments of rows x and y"):
            function(Moments(6).update(x))
        with pytest.raises(ValueError, match="expected moments of rows x and y"):
            function(Moments(6, 6))
        with pytest.raises(ValueError, match="1 of 400 rows hold NaN"):
            function(x.where(x != x[3, 3], torch.nan), y)
    with pytest.raises(ValueError, match="do not vary together"):
        procrustes(x, torch.ones(400, 2))
    with pytest.raises(ValueError, match="explains nothing"):
        stitch(x, torch.ones(400, 2))
    with pytest.raises(ValueError, match="match='rms'"):
        stitch(x, y, match="rms")
