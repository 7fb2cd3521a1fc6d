"""From an expert's next-token distribution to one over a base model's tokens, through a sparse table.

The equations stand in `reference/bridge_project.py`. The C++ kernel reads a row's logits for their maximum and their
exponentials, and gathers those by base token; no probabilities [N, V_E] are written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chassis_kernels import backends, pages
from chassis_kernels.bridge_table import BlockedTokens, BridgeTable
from chassis_kernels.reference import bridge_project as reference
from chassis_kernels.reference.precision import compute_dtype

_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class Bridged(NamedTuple):
    """What `bridge_project` returns; float32 (float64 if the logits or the table are)."""

    log_q: Tensor  # [N, V_B] nats; -inf where q is 0 or below 1.2e-38
    mass: Tensor  # [N] the mapped share of the expert's probability: Σ_b q(b), before `normalize`
    uncertainty: Tensor  # [N] Σ_t P(t) (1 - max_b M[t, b]): how much of it does not yet fix the base token


def bridge_project(
    logits: Tensor | None,  # [N, >= V_E]
    table: BridgeTable,  # [V_E + residual rows, V_B]
    *,
    log_probs: Tensor | None = None,  # [N, m]
    ids: Tensor | None = None,  # [N, m] int64
    listed_start: Tensor | None = None,  # [N + 1] int64
    log_weight: Tensor | None = None,  # [N]
    index: Tensor | None = None,  # [N] int64
    index_start: Tensor | None = None,  # [N + 1] int64
    blocked: BlockedTokens | None = None,
    previous: Tensor | None = None,  # [N] int64
    floor: Tensor | None = None,  # [V_B]
    temperature: float = 1.0,
    normalize: bool = False,
) -> Bridged:
    """log q = log Pᵀ M for every row, with the mapped mass and the uncertainty.

    P is softmax(logits / temperature) over the table's first V_E = `table.n_expert` rows (wider logits are cut); or what
    `log_probs` says of the table rows `ids` (any rows; -1: an empty place; repeats add up); or both, with the share
    exp(log_weight) for the logits. log_probs are taken as they are: what they and the share leave to 1, the tail of a top-k,
    is part of neither q nor mass and counts in full as uncertain. A row whose logits are all -inf adds nothing.

    To condition on the bytes u after the expert's last boundary, list the log-probabilities of the tokens that start with
    u, normalised over them, with `ids` the rows of their residuals: a table may have rows beyond V_E for those.

    listed_start: lists of unequal length; log_probs and ids are [L] then, and row n has those from listed_start[n] up to
    listed_start[n + 1]. index: row n reads logits[index[n]], with any number of logits [any, >= V_E]; rows need not be
    copied to be repeated, reordered or left out. index_start: a row may mix several; index and log_weight are [S] then, and
    row n reads those from index_start[n] up to index_start[n + 1], none of them or more, each with its own share.

    blocked, previous: row n cannot continue with the base tokens of list previous[n] of `blocked` (-1: no list). They get
    -inf and the others are scaled so that Σ q stays mass; mass is 0 where nothing mapped is left. `normalize` scales q to
    sum 1 where mass is above 0; `mass` still tells what was mapped. floor: probabilities that every base token keeps,
    blocked or not: at last q becomes (1 - Σ floor) q + floor. mass and uncertainty do not see it.

    logits, or log_probs without them, float32, bfloat16 or float16; with float64 there or in the table the reference runs.
    What is given beside them is converted. Not differentiable: a backward pass raises RuntimeError. Raises ValueError for
    shapes, dtypes or ids that do not fit.
    """
    n = _check(
        logits, table, index, index_start, log_weight, log_probs, ids, listed_start, blocked, previous, floor, temperature
    )
    if logits is None:
        logits = log_probs.new_empty(n, 0)
    dtype = compute_dtype(logits, table.weights)
    log_weight, log_probs, floor = (None if t is None else t.to(dtype) for t in (log_weight, log_probs, floor))
    if ids is not None and listed_start is None:
        log_probs, ids, listed_start = (
            log_probs.flatten(),
            ids.flatten(),
            torch.arange(n + 1, device=ids.device) * ids.shape[1],
        )
    lists = (None, None) if previous is None else (blocked.start, blocked.tokens)
    return Bridged(
        *torch.ops.chassis.bridge_project(
            logits,
            index,
            index_start,
            log_weight,
            log_probs,
            ids,
            listed_start,
            *table.columns,
            table.row_sum,
            table.spread,
            *lists,
            previous,
            floor,
            min(table.n_expert, logits.shape[1]),
            float(temperature),
            normalize,
        )
    )


def _check(
    logits, table, index, index_start, log_weight, log_probs, ids, listed_start, blocked, previous, floor, temperature
) -> int:
    """The number of rows N, of arguments that fit."""
    if logits is None and log_probs is None:
        raise ValueError("neither logits [N, V_E] nor log_probs [N, m] with ids were given")
    if (log_probs is None) != (ids is None):
        raise ValueError("log_probs [N, m] and ids [N, m] go together: one is missing")
    for name, start, of, cut in (("index_start", index_start, "index", index), ("listed_start", listed_start, "ids", ids)):
        if start is not None and (cut is None or start.dim() != 1 or start.dtype != torch.int64 or not len(start)):
            raise ValueError(f"{name} is {start.dtype} {tuple(start.shape)}: expected torch.int64 [N + 1], beside {of}")
    if index is not None and (logits is None or index.dim() != 1 or index.dtype != torch.int64):
        raise ValueError(f"index is {index.dtype} {tuple(index.shape)}: expected torch.int64 [N], rows of logits")
    n = _rows(logits, index, index_start, ids, listed_start)
    n_states = n if index is None else len(index)
    if floor is not None and (floor.shape != (table.n_base,) or not floor.is_floating_point()):
        raise ValueError(f"floor is {floor.dtype} {tuple(floor.shape)}: expected floats [{table.n_base}], the base's tokens")
    if logits is not None and (logits.dim() != 2 or logits.shape[1] < table.n_expert):
        raise ValueError(f"logits are {tuple(logits.shape)}, expected [N, >= {table.n_expert}], the table's expert tokens")
    if ids is not None:
        padded = listed_start is None
        fits = ids.dim() == 1 + padded and (len(ids) == n if padded else len(listed_start) == n + 1)
        if not fits or ids.shape != log_probs.shape or ids.dtype != torch.int64:
            expected = f"[{n}, m]" if padded else f"[L], and listed_start [{n + 1}]"
            raise ValueError(
                f"log_probs are {tuple(log_probs.shape)} and ids {ids.dtype} {tuple(ids.shape)}: expected both {expected}, "
                "ids torch.int64"
            )
    if logits is not None and log_probs is not None and log_weight is None:
        raise ValueError("logits and log_probs together need log_weight [N], the log of the share that the logits have")
    if log_weight is not None and (logits is None or log_weight.shape != (n_states,)):
        raise ValueError(f"log_weight is {tuple(log_weight.shape)}: expected [{n_states}], beside logits")
    for name, tensor in (("logits", logits), ("log_probs", log_probs), ("log_weight", log_weight)):
        if tensor is not None and tensor.dtype not in backends.DTYPE_CODES:
            raise ValueError(f"{name} are {tensor.dtype}, expected floats")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: expected a positive number")
    if (blocked is None) != (previous is None):
        raise ValueError("blocked and previous [N] go together: one is missing")
    if blocked is not None and blocked.n_base != table.n_base:
        raise ValueError(f"blocked is for {blocked.n_base} base tokens, the table for {table.n_base}")
    if previous is not None and (previous.shape != (n,) or previous.dtype != torch.int64):
        raise ValueError(f"previous is {previous.dtype} {tuple(previous.shape)}, expected torch.int64 [{n}]")
    _check_values(logits, table, ids, listed_start, index, index_start, blocked, previous, floor)
    return n


def _rows(logits, index, index_start, ids, listed_start) -> int:
    if index_start is not None:
        return len(index_start) - 1
    if index is not None:
        return len(index)
    if logits is not None:
        return len(logits) if logits.dim() else 0
    return len(listed_start) - 1 if listed_start is not None else len(ids) if ids.dim() else 0


def _check_values(logits, table, ids, listed_start, index, index_start, blocked, previous, floor) -> None:
    """Of tensors on the CPU: looking at others would wait for them."""
    for name, given, least, size in (
        ("ids", ids, -1, table.shape[0]),
        ("previous", previous, -1, len(blocked) if blocked else 0),
        ("index", index, 0, len(logits) if logits is not None else 0),
    ):
        if given is not None and given.device.type == "cpu" and given.numel():
            low, high = int(given.min()), int(given.max())
            if low < least or high >= size:
                raise ValueError(f"{name} hold {low} to {high}: expected {least}..{size - 1}")
    for name, start, cut in (("listed_start", listed_start, ids), ("index_start", index_start, index)):
        if start is not None and start.device.type == "cpu":
            first, last = int(start[0]), int(start[-1])
            if first != 0 or last != len(cut) or bool((start.diff() < 0).any()):
                raise ValueError(f"{name} goes from {first} to {last}: expected to ascend from 0 to {len(cut)}")
    if floor is not None and floor.device.type == "cpu" and not ((floor >= 0).all() and floor.sum() <= 1):
        raise ValueError(
            "floor holds probabilities below 0, a NaN, or more than 1 in all: expected shares, of sum 1 at most"
        )


def _cpu(logits, index, index_start, log_weight, log_probs, ids, listed_start, *arguments):
    *tensors, floor, width, temperature, normalize = arguments
    rows, n_base = _rows(logits, index, index_start, ids, listed_start), len(tensors[0]) - 1
    out = pages.empty((rows, n_base), torch.float32), torch.empty(rows), torch.empty(rows)
    logits = backends.rows_contiguous(logits)
    log_probs, log_weight, floor = (None if t is None else t.float().contiguous() for t in (log_probs, log_weight, floor))
    given = index, index_start, log_weight, log_probs, ids, listed_start, *tensors, floor
    given = [None if t is None else t.contiguous() for t in given]
    backends._C.bridge_project(
        backends.matrix_args(logits),
        tuple(0 if t is None else t.data_ptr() for t in given),
        (rows, len(tensors[1]), len(tensors[3]), n_base, width),
        temperature,
        normalize,
        tuple(t.data_ptr() for t in out),
    )
    return out


def _no_gradient(ctx, *grads):
    raise RuntimeError(
        "bridge_project has no gradient: detach the logits, or call the eager function of that name in "
        "chassis_kernels.reference.bridge_project, which autograd can follow"
    )


def _fake(logits, index, index_start, log_weight, log_probs, ids, listed_start, start, rows, weights, *rest):
    count = logits.shape[0] if index is None else index.shape[0]
    count = count if index_start is None else index_start.shape[0] - 1
    row = logits.new_empty(count, dtype=compute_dtype(logits, log_probs, weights))
    return row.new_empty(row.shape[0], start.shape[0] - 1), row, torch.empty_like(row)


def _example(device: str) -> tuple:
    g = torch.Generator().manual_seed(0)
    rows, ids, weights = (
        torch.tensor([0, 0, 1, 2, 4, 5, 6]),
        torch.tensor([1, 4, 2, 0, 3, 3, 1]),
        torch.rand(7, generator=g) / 2,
    )
    table = BridgeTable.from_entries(rows, ids, weights, (7, 5), n_expert=5)
    states = torch.tensor([2, 0, 3, 3, 1]), torch.tensor([0, 2, 3, 3, 5]), torch.full((5,), -1.5)
    listed = torch.randn(6, generator=g) - 3, torch.tensor([5, -1, 6, 5, 0, 0]), torch.tensor([0, 2, 4, 4, 6])
    lists = torch.tensor([0, 2, 3]), torch.tensor([1, 3, 0], dtype=torch.int32), torch.tensor([0, -1, 1, 0])
    logits, floor = torch.randn(4, 6, generator=g), torch.rand(5, generator=g) / 9
    tensors = logits, *states, *listed, *table.columns, table.row_sum, table.spread, *lists, floor
    return *(t.to(device) for t in tensors), 5, 1.5, False


backends.register(
    "bridge_project(Tensor logits, Tensor? index, Tensor? index_start, Tensor? log_weight, Tensor? log_probs, Tensor? ids, "
    "Tensor? listed_start, Tensor start, Tensor rows, Tensor weights, Tensor row_sum, Tensor spread, Tensor? blocked_start, "
    "Tensor? blocked, Tensor? previous, Tensor? floor, int width, float temperature, bool normalize) "
    "-> (Tensor log_q, Tensor mass, Tensor uncertainty)",
    reference=reference.bridge_project,
    fake=_fake,
    example=_example,
    cpu=backends.Implementation(_cpu, _CPU_DTYPES, "x86-64"),
    triton=backends.triton_kernel("bridge_project", "bridge_project"),
)
torch.library.register_autograd(
    "chassis::bridge_project", _no_gradient, setup_context=lambda ctx, inputs, output: None, lib=backends.library
)
