"""The head of a base with adapters plugged in: what a token costs, attached, merged, and written out in eager PyTorch.

Rows take A adapters of rank r in turn. `base` is the head alone and `merged` one with the adapter folded in: the floor.
"""

from __future__ import annotations

import torch
from chassis.adapter import Adapter, AdapterConfig
from chassis.port import Port

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case, Provider, compiled, generator, simple
from chassis_kernels import delta_logits_

DTYPES = tuple(_DTYPES)
_BAR = {"D": 2048, "r": 32, "V": 32000}
_SMALL = {"D": 256, "r": 16, "V": 4000}
SHAPES = {
    "tiny": [{"N": n, "A": a, "D": 24, "r": 4, "V": 50} for n, a in ((1, 1), (9, 3))],
    "quick": [{"N": n, "A": a} | _SMALL for n, a in ((1, 1), (64, 8))],
    "default": [{"N": n, "A": 1} | _BAR for n in (1, 16, 64, 2048)] + [{"N": 64, "A": 8} | _BAR],
    "scaling": [{"N": 64, "A": a, "D": 512, "r": 32, "V": 8000} for a in (1, 2, 4, 16)],
    "gpu": [{"N": n, "A": a, "D": 4096, "r": 64, "V": 128256} for n, a in ((1, 1), (64, 1), (64, 8), (2048, 1))],
}


class Head(torch.nn.Module):
    """As much of a model as a port needs."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.head = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        self.head.weight = torch.nn.Parameter(weight, requires_grad=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def case(N: int, A: int, D: int, r: int, V: int, dtype: str) -> Case:
    """N rows over A adapters of rank r that change all of V columns."""
    kind = _DTYPES[dtype]

    def make(device):
        normal = generator(device)
        hidden, weight = normal(N, D), normal(V, D) * D**-0.5
        down, up, bias = normal(A, D, r) * D**-0.5, normal(A, r, V) * r**-0.5, normal(A, V)
        return *(t.to(kind) for t in (hidden, weight, down, up, bias)), torch.arange(N, device=device) % A

    def base(hidden, weight, *rest):
        return hidden @ weight.T

    def eager(hidden, weight, U, W, c, ids):
        logits = hidden @ weight.T
        if A == 1:
            return logits + (hidden @ U[0] @ W[0] + c[0])
        for a in range(A):
            rows = torch.arange(a, N, A, device=ids.device)
            logits = logits.index_add(0, rows, hidden[rows] @ U[a] @ W[a] + c[a])
        return logits

    def clone_index_add(hidden, weight, U, W, c, ids):
        columns = torch.arange(V, device=ids.device)
        return (hidden @ weight.T).clone().index_add_(1, columns, hidden @ U[0] @ W[0] + c[0])

    def one_by_one(hidden, weight, U, W, c, ids):
        logits = hidden @ weight.T
        for a in range(A):
            rows = torch.arange(a, N, A, device=ids.device)
            logits[rows] = delta_logits_(logits[rows], hidden[rows], U[a], W[a], c[a])
        return logits

    def plugged(hidden, weight, U, W, c, ids):
        model = Head(weight)
        port, zeros = Port(model), torch.zeros(D, device=weight.device)
        for a in range(A):
            config = AdapterConfig(vocab_size=V)
            port.plug(str(a), Adapter(U[a].float(), W[a].float(), c[a].float(), zeros, zeros, None, config))
        port.route([str(a % A) for a in range(N)] if A > 1 else "0")

        def step():
            with torch.no_grad():
                return model.head(hidden)

        return step

    def merged(hidden, weight, U, W, c, ids):
        folded = (weight.float() + (U[0].float() @ W[0].float()).T).to(weight.dtype)
        return lambda: torch.nn.functional.linear(hidden, folded, c[0])

    changed = {"of": lambda full: full[:1]}
    providers = {
        "eager": Provider(lambda *inputs: lambda: eager(*inputs), lambda out, *inputs: (out, base(*inputs))),
        "chassis": Provider(plugged, op="delta_logits_", **changed),
        "base": simple(base, of=lambda full: full[1:]),
        "compile": compiled(eager, **changed),
    }
    if A == 1:
        providers |= {"merged": Provider(merged, **changed), "clone_index_add": simple(clone_index_add, **changed)}
    else:
        providers["chassis_one_by_one"] = simple(one_by_one, op="delta_logits_", **changed)
    return Case(
        "port",
        {"N": N, "A": A, "D": D, "r": r, "V": V},
        dtype,
        make,
        lambda *inputs: (eager(*inputs), base(*inputs)),
        providers,
        flops=2 * N * (D * V + r * (D + V)),  # the head and the two thin products
        bytes=kind.itemsize * (D * V + A * r * (D + V) + A * V + N * (D + V)),  # everything once
    )
