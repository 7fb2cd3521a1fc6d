"""Moments as a state: merged, split, saved, resumed, reduced over processes, and never half updated."""

import os
import socket

import pytest
import torch
from safetensors.torch import save_file

from chassis_kernels import Moments, moments_update_
from chassis_kernels.rows import PENDING_ROWS

NAMES = ("count", "mean_x", "xx", "mean_y", "xy", "yy")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rows(n, dtype=torch.float32):
    x = torch.randn(n, 6, dtype=dtype) * 2 + 30
    return x, (torch.randn(n, 3, dtype=dtype) + x[:, :3]).to(dtype)


def assert_equal(a, b, **tolerance):
    for name in NAMES:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **(tolerance or {"rtol": 0, "atol": 0}), msg=name)
    assert (a.rows, a.dropped) == (b.rows, b.dropped)


@pytest.mark.parametrize("full_y", [False, True])
def test_merge_equals_one_pass_and_subtract_undoes_it(full_y):
    x, y = rows(500, torch.float64)
    everything, left, right = (
        Moments(6, 3, full_y=full_y).update(x[part], y[part]) for part in (slice(None), slice(0, 123), slice(123, None))
    )
    before = left.copy()
    assert_equal(left.merge(right), everything, rtol=1e-12, atol=1e-9)
    assert_equal(left.subtract(right), before, rtol=1e-10, atol=1e-9)  # (mean/std)^2 * eps * n is lost
    assert_equal(left.subtract(before), Moments(6, 3, full_y=full_y))


def test_merging_nothing_changes_nothing_and_copies_are_independent():
    moments = Moments(6, 3).update(*rows(50))
    before = moments.copy()
    assert_equal(moments.merge(Moments(6, 3)), before)
    assert_equal(Moments(6, 3).merge(moments), before)
    moments.update(*rows(5))
    assert before.rows == 50 and float(before.count) == 50


def test_a_fold_is_taken_out_without_a_second_pass():
    x, y = rows(900)
    folds = [Moments(6, 3).update(x[k::3], y[k::3]) for k in range(3)]
    total = Moments(6, 3)
    for fold in folds:
        total.merge(fold)
    rest = torch.arange(900) % 3 != 0
    assert_equal(total.subtract(folds[0]), Moments(6, 3).update(x[rest], y[rest]), rtol=1e-5, atol=1e-3)


def test_small_batches_wait_and_then_equal_one_large_batch_bit_for_bit():
    x, y = rows(PENDING_ROWS)
    small, large = Moments(6, 3), moments_update_(Moments(6, 3), x, y)
    for start in range(0, PENDING_ROWS, 64):
        assert float(small._state["count"]) == 0
        batch = x[start : start + 64].clone()
        small.update(batch, y[start : start + 64])
        batch.zero_()  # the caller may reuse its buffer
    assert float(small._state["count"]) == PENDING_ROWS
    assert_equal(small, large)


def test_waiting_rows_are_merged_when_a_moment_is_read():
    moments = Moments(6, 3).update(*rows(3)).update(*rows(4, torch.float64)).update(*rows(5), weight=torch.rand(5))
    assert moments.rows == 12 and float(moments.count) < 12 and moments.S.diagonal().min() > 0


def test_inference_mode_may_come_and_go():
    x, y = rows(PENDING_ROWS + 1)
    inside, outside = Moments(6, 3).update(x[:5], y[:5]), Moments(6, 3).update(x[:5], y[:5])
    with torch.inference_mode():
        inside = inside.copy().update(x * 1, y * 1).update(x[:7] * 1, y[:7] * 1)
    for moments in (inside, outside):
        moments.update(x, y).update(x[:7], y[:7])
    outside.update(x, y).update(x[:7], y[:7])
    assert_equal(inside, outside)


@pytest.mark.parametrize("batches_before", [0, 1, 9, 20])
def test_a_run_resumed_from_disk_ends_bit_identical(tmp_path, batches_before):
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
    batches = [rows(n, dtype) for n in (100, 1, 700, 2000, 60) for dtype in dtypes]
    straight = Moments(6, 3, full_y=True)
    interrupted = Moments(6, 3, full_y=True)
    for x, y in batches[:batches_before]:
        interrupted.update(x, y)
    interrupted.save(tmp_path / "moments.safetensors")
    resumed = Moments.load(tmp_path / "moments.safetensors")
    for x, y in batches[batches_before:]:
        resumed.update(x, y)
    for x, y in batches:
        straight.update(x, y)
    assert_equal(resumed, straight)


def test_moments_without_y_and_without_rows_are_saved_too(tmp_path):
    for moments in (Moments(6), Moments(6).update(rows(30)[0]), Moments(6, 3)):
        moments.save(tmp_path / "moments.safetensors")
        assert_equal(Moments.load(tmp_path / "moments.safetensors"), moments)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "moments.safetensors"
    old = Moments(6, 3).update(*rows(50))
    old.save(path)

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        old.copy().update(*rows(50)).save(path)
    assert_equal(Moments.load(path), old)
    assert os.listdir(tmp_path) == ["moments.safetensors"]


def test_truncated_foreign_and_mismatched_files_are_refused(tmp_path):
    path = tmp_path / "moments.safetensors"
    Moments(6, 3).update(*rows(50)).save(path)
    content = path.read_bytes()
    for size in (0, 5, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            Moments.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="expected {'format': 'chassis.moments', 'version': '1'}"):
        Moments.load(path)
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "nowhere.safetensors")


def test_a_state_of_other_dimensions_is_refused_and_changes_nothing():
    moments = Moments(6, 3).update(*rows(50))
    before = moments.copy()
    for other in (Moments(7, 3), Moments(6, 2), Moments(6, 3, full_y=True)):
        with pytest.raises(ValueError, match="expected torch.float64"):
            moments.load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match="do not go together"):
            moments.merge(other)
    with pytest.raises(ValueError, match="not a state of Moments"):
        moments.load_state_dict({"xx": torch.zeros(6, 6)})
    with pytest.raises(ValueError, match=r"expected torch.float64 \(6,\)"):
        moments.load_state_dict(moments.state_dict() | {"mean_x": torch.zeros(6)})
    assert_equal(moments, before)


def test_rows_that_are_not_finite_are_named_or_dropped_and_counted():
    x, y = rows(2000)
    x[7, 2], x[1500, 0], y[30, 1] = torch.nan, torch.inf, -torch.inf
    first = "3 of 2000 rows hold NaN or infinity, the first is row 7"
    for part, expected in ((slice(None), first), (slice(8, 90), "1 of 82 rows")):
        moments = Moments(6, 3).update(*rows(50))
        before = moments.copy()
        with pytest.raises(ValueError, match=expected):
            moments.update(x[part], y[part])
        assert_equal(moments, before)
    good = torch.ones(2000, dtype=torch.bool)
    good[[7, 30, 1500]] = False
    dropped = Moments(6, 3).update(x, y, nan="drop")
    assert (dropped.rows, dropped.dropped) == (1997, 3)
    clean = Moments(6, 3).update(x, y, mask=good)
    clean.dropped = 3
    assert_equal(dropped, clean)
    big = torch.full((4, 6), 3e38)
    assert Moments(6).update(big.where(torch.eye(4, 6) == 1, -big)).rows == 4  # finite, though sums of it overflow


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(4, 5), torch.zeros(4, 3)), {}, r"x is torch.float32 \(4, 5\), expected floats of shape \(4, 6\)"),
        ((torch.zeros(4, 6), torch.zeros(5, 3)), {}, r"y is torch.float32 \(5, 3\), expected floats of shape \(4, 3\)"),
        ((torch.zeros(2, 4, 6), torch.zeros(8, 3)), {}, "flatten"),
        ((torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, 3)), {}, "x is torch.int64"),
        ((torch.zeros(4, 6),), {}, "y is missing"),
        ((torch.zeros(4, 6), torch.zeros(4, 3)), {"weight": torch.ones(3)}, r"weight has shape \(3,\), expected \(4,\)"),
        ((torch.zeros(4, 6), torch.zeros(4, 3)), {"weight": -torch.ones(4)}, "not negative"),
        ((torch.zeros(4, 6), torch.zeros(4, 3)), {"weight": torch.full((4,), torch.nan)}, "finite"),
        ((torch.zeros(4, 6), torch.zeros(4, 3)), {"mask": torch.ones(4)}, "expected torch.bool"),
        ((torch.zeros(4, 6), torch.zeros(4, 3)), {"nan": "ignore"}, "ignore"),
    ],
)
def test_bad_batches_are_refused_and_change_nothing(arguments, options, message):
    moments = Moments(6, 3).update(*rows(50))
    before = moments.copy()
    with pytest.raises(ValueError, match=message):
        moments.update(*arguments, **options)
    assert_equal(moments, before)


def test_subtracting_what_was_never_merged_is_refused():
    with pytest.raises(ValueError, match="cannot take 9 rows"):
        Moments(6, 3).update(*rows(8)).subtract(Moments(6, 3).update(*rows(9)))
    with pytest.raises(ValueError, match="full_y=True"):
        _ = Moments(6, 3).Q


def _rank(rank, port, path):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, y = torch.load(path)
    whole = Moments(6, 3, full_y=True).update(x, y)
    for share in (200, len(x)):
        mine = slice(0, share) if rank == 0 else slice(share, None)
        moments = Moments(6, 3, full_y=True).update(x[mine], y[mine]).all_reduce()
        assert_equal(moments, whole, rtol=1e-6, atol=1e-6 * float(whole.xx.max()))
    assert Moments(6, 3).all_reduce().rows == 0
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_even_if_one_has_no_rows(tmp_path):
    torch.save(rows(500), tmp_path / "rows.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, tmp_path / "rows.pt"), nprocs=2)
