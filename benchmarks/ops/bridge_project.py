"""log q [N, V_B] of an expert's logits [N, V_E] through a sparse table, with mapped mass and uncertainty.

Eager is `torch.sparse.mm` on the softmax, with the table as coordinates, and as CSR (`eager_csr`). With `blocked` tokens a
row, those are set to 0 and the rest scaled back. Tokens without an entry have log q = -inf and count as -100 in the error.
"""

from __future__ import annotations

import torch

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case, Provider, generator
from chassis_kernels import BlockedTokens, BridgeTable, bridge_project

DTYPES = tuple(_DTYPES)
LISTS = 8
LARGE = {"V_E": 151936, "V_B": 128256, "K": 2}
SHAPES = {
    "tiny": [{"N": 20, "V_E": 150, "V_B": 120, "K": 2, "blocked": b} for b in (0, 30)],
    "quick": [{"N": 64, "V_E": 6000, "V_B": 4000, "K": 2}],
    "default": [{"N": n, **LARGE} for n in (64, 256)]
    + [{"N": 64, **LARGE, "blocked": 12000}, {"N": 256, "V_E": 6000, "V_B": 4000, "K": 2}],
    "scaling": [{"N": n, "V_E": 32000, "V_B": 24000, "K": 2} for n in (1, 4, 16, 64, 256)]
    + [{"N": 64, "V_E": v, "V_B": v, "K": 2} for v in (8000, 64000)],
    "gpu": [{"N": n, **LARGE} for n in (64, 1024, 4096)] + [{"N": 1024, **LARGE, "blocked": 12000}],
}


def case(N: int, V_E: int, V_B: int, K: int, dtype: str, blocked: int = 0) -> Case:
    """K base tokens to an expert token; `blocked` base tokens in each of LISTS lists, which the rows take in turns."""
    kind = _DTYPES[dtype]

    def make(device):
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(0, V_B, (V_E, K), generator=g)
        weights = torch.rand(V_E, K, generator=g)
        banned = torch.stack([torch.randperm(V_B, generator=g)[:blocked] for _ in range(LISTS)])
        tensors = ids, weights / weights.sum(1, keepdim=True), banned
        return generator(device)(N, V_E).mul_(3).to(kind), *(t.to(device) for t in tensors)

    def places(ids):
        return torch.arange(V_E, device=ids.device).repeat_interleave(K), ids.flatten()

    def eager(matrix, row_sum, spread, banned):
        def step(logits):
            p = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), 1)
            q, mass = torch.sparse.mm(matrix, p.T).T.contiguous(), p @ row_sum
            if blocked:
                q = q.scatter(1, banned[torch.arange(N, device=q.device) % LISTS], 0.0)
                q = q * (mass / q.sum(1))[:, None]
            return q.log(), mass, p @ spread

        return step

    def by_matrix(layout, compile_it=False):
        def prepare(logits, ids, weights, banned):
            rows, columns = places(ids)
            entries = torch.stack([columns, rows]), weights.flatten()
            matrix = torch.sparse_coo_tensor(*entries, (V_B, V_E), check_invariants=False).coalesce()
            table = BridgeTable.from_entries(rows, columns, weights.flatten(), (V_E, V_B))
            step = eager(layout(matrix), table.row_sum, table.spread, banned)
            run = torch.compile(step, dynamic=False) if compile_it else step
            return lambda: run(logits)

        return Provider(prepare, read)

    def chassis(logits, ids, weights, banned):
        rows, columns = places(ids)
        table = BridgeTable.from_entries(rows, columns, weights.flatten(), (V_E, V_B))
        table.columns, table.row_sum, table.spread  # noqa: B018 - built once per table, not once per step
        options = {}
        if blocked:
            start = torch.arange(LISTS + 1, device=logits.device) * blocked
            options["blocked"] = BlockedTokens(start, banned.flatten(), V_B)
            options["previous"] = torch.arange(N, device=logits.device) % LISTS
        return lambda: bridge_project(logits, table, **options)

    def read(found, *inputs):
        log_q, mass, uncertainty = found
        return log_q.clamp_min(-100), mass, uncertainty

    coordinates = by_matrix(lambda matrix: matrix)
    return Case(
        "bridge_project",
        {"N": N, "V_E": V_E, "V_B": V_B, "K": K} | ({"blocked": blocked} if blocked else {}),
        dtype,
        make,
        lambda *inputs: read(coordinates.prepare(*inputs)()),
        {
            "eager": coordinates,
            "eager_csr": by_matrix(lambda matrix: matrix.to_sparse_csr()),
            "chassis": Provider(chassis, read, op="bridge_project"),
            "compile": by_matrix(lambda matrix: matrix.to_sparse_csr(), compile_it=True),
        },
        flops=N * (10 * V_E + 2 * K * V_E + 10 * V_B),  # exponentials, products with the table, logarithms
        bytes=kind.itemsize * N * V_E + 4 * N * V_B + 8 * K * V_E,  # logits and table read once, log q written once
    )
