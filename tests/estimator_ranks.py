"""What each rank does in tests/test_estimators_parallel.py: its share of the rows or of the targets, against all of them."""

import json
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from estimator_problems import ALPHAS, ESTIMATORS, batches, joined, outcome

from chassis_kernels import StreamingCKA, StreamingRidge, StreamingRidgeCV, linear_cka

WORLDS = (2, 4)
SHARES = ("all ranks", "one rank has no rows", "one rank has all rows")
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def share(parts: list[tuple], kind: str, rank: int, ranks: int) -> list[tuple]:
    if kind == "all ranks":
        return parts[rank::ranks]
    if kind == "one rank has all rows":
        return parts if rank == 1 else []
    return [] if rank == 0 else parts[rank - 1 :: ranks - 1]


def by_rows(name: str, kind: str, group) -> None:
    """The rows of all ranks together give the fit of one process."""
    make, options = ESTIMATORS[name]
    parts = batches(**options, dtype=torch.float64)
    estimator = make()
    for batch in share(parts, kind, group.rank(), group.size()):
        estimator.partial_fit(*batch)
    estimator.all_reduce(group)
    whole = make().fit(*joined(parts))
    torch.testing.assert_close(outcome(estimator, parts[0][0]), outcome(whole, parts[0][0]), **TOLERANCE)
    assert estimator.n_samples_seen_ == whole.n_samples_seen_


def by_targets(grouped: bool, group, pairs, lines) -> None:
    """Ranks in pairs: those of a pair have the same columns of y and other rows. One alpha is chosen for all columns."""
    parts, ranks = batches(grouped=grouped, dtype=torch.float64), group.size()
    columns = torch.arange(4).tensor_split(ranks // 2)
    rows_of, targets_of = pairs[group.rank() // 2], lines[group.rank() % 2]
    mine, row = columns[group.rank() // 2], group.rank() % 2
    estimator, alone = StreamingRidgeCV(ALPHAS, n_folds=3), StreamingRidge(0.01)
    for x, y, weight, groups in parts[row::2]:
        estimator.partial_fit(x, y[:, mine], weight, groups)
        alone.partial_fit(x, y[:, mine])
    estimator.all_reduce(rows_of, targets=targets_of)
    alone.all_reduce(rows_of)
    x, y, _, groups = joined(parts)
    whole = StreamingRidgeCV(ALPHAS, n_folds=3).fit(x, y, groups=groups)
    assert estimator.alpha_ == whole.alpha_
    torch.testing.assert_close(estimator.predict(x), whole.predict(x)[:, mine], **TOLERANCE)
    torch.testing.assert_close(alone.predict(x), StreamingRidge(0.01).fit(x, y).predict(x)[:, mine], **TOLERANCE)


def cka(group) -> None:
    """Layers of all ranks' rows together."""
    parts = batches(dtype=torch.float64)
    found = StreamingCKA((9,), (4,))
    for x, y, *_ in share(parts, "one rank has no rows", group.rank(), group.size()):
        found.partial_fit([x], [y])
    x, y, *_ = joined(parts)
    torch.testing.assert_close(found.all_reduce(group).cka_[0, 0], linear_cka(x, y), **TOLERANCE)


def refused(group) -> None:
    """Every rank hears of it: none is left waiting."""
    parts = batches()
    for make, message in (
        (lambda: StreamingRidge(), "no rank has seen any rows"),
        (lambda: StreamingRidge().partial_fit(parts[0][0], parts[0][1][:, : 1 + group.rank()]), "different problems"),
    ):
        try:
            make().all_reduce(group)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error: {message}")


def checks() -> dict:
    found = {f"{name}: {kind}": (by_rows, name, kind) for name in ESTIMATORS for kind in SHARES}
    found |= {f"targets spread, {'groups' if g else 'GCV'}": (by_targets, g) for g in (False, True)}
    return found | {"cka": (cka,), "refused": (refused,)}


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=max(WORLDS), timeout=timedelta(seconds=60))
    failures = {}
    for world in WORLDS:
        table = torch.arange(world).view(-1, 2)
        group, *small = (dist.new_group(ids) for ids in [list(range(world)), *table.tolist(), *table.T.tolist()])
        groups = {by_targets: (group, small[: world // 2], small[world // 2 :])}
        if rank >= world:
            continue
        for name, (run, *arguments) in checks().items():
            try:
                run(*arguments, *groups.get(run, (group,)))
            except Exception:
                failures[f"{world} {name}"] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))
    dist.barrier()
    dist.destroy_process_group()
