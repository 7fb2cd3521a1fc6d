"""Centred XᵀX and XᵀY of a batch: `Moments.update` against two products.

`eager` does not centre, so its products are centred after the clock has stopped; `eager_centred` does what the op does.
With `layers` that many x share a y: `chassis` merges all of them in one call, `chassis_separate` in a call each.
"""

from __future__ import annotations

import torch

from benchmarks.cases import DTYPES as _DTYPES
from benchmarks.cases import Case, Provider, compiled, generator, simple
from chassis_kernels import Moments, update_layers

DTYPES = tuple(_DTYPES)
_BOTH, _ALONE = [{"form": form} for form in ("X and Y", "X alone")]
_BAR = {"N": 4096, "D": 2048}
_LAYERS = [{"N": 2048, "D": d, "layers": layers} | _BOTH for d in (128, 768) for layers in (6, 24)]
SHAPES = {
    "tiny": [{"N": 40, "D": 12} | form for form in (_BOTH, _ALONE)]
    + [{"N": 64, "D": 8, "batches": 4} | _BOTH]
    + [{"N": 40, "D": 12, "layers": 3} | _BOTH],
    "quick": [{"N": 2048, "D": 512} | form for form in (_BOTH, _ALONE)] + [{"N": 2048, "D": 512, "batches": 64} | _BOTH],
    "default": [_BAR | _BOTH, _BAR | _ALONE, _BAR | {"batches": 64} | _BOTH],
    "scaling": _LAYERS
    + [{"N": n, "D": 2048} | _BOTH for n in (1024, 16384)]
    + [{"N": 4096, "D": d} | _BOTH for d in (512, 1000, 1024, 4096)]
    + [{"N": 4096, "D": 1024, "T": t} | _BOTH for t in (256, 4096, 16384)],
    "gpu": [{"N": 1 << n, "D": d} | form for n, d in ((14, 2048), (18, 4096), (16, 8192)) for form in (_BOTH, _ALONE)],
}


def layered(N: int, D: int, layers: int, dtype: str) -> Case:
    """`layers` x of D columns and one y."""

    def make(device):
        normal = generator(device)
        return tuple(normal(N, D).to(_DTYPES[dtype]) for _ in range(layers + 1))

    def plain(*inputs):
        *xs, y = (rows.float() for rows in inputs)
        return tuple(x.T @ other for x in xs for other in (x, y))

    def truth(*inputs):
        *xs, y = (rows.double() - rows.double().mean(0) for rows in inputs)
        return tuple(x.T @ other for x in xs for other in (x, y))

    def centre(products, *inputs):
        *xs, y = (rows.double().mean(0) for rows in inputs)
        pairs = ((x, other) for x in xs for other in (x, y))
        return tuple(found.double() - N * torch.outer(*pair) for found, pair in zip(products, pairs, strict=True))

    def together(*inputs):
        *xs, y = inputs
        sets = [Moments(D, D, device=y.device) for _ in xs]
        return lambda: update_layers(sets, xs, y) or sets

    def separate(*inputs):
        *xs, y = inputs
        sets = [Moments(D, D, device=y.device) for _ in xs]
        return lambda: [moments.update(x, y).flush() for moments, x in zip(sets, xs, strict=True)]

    def read(sets, *inputs):
        return tuple(product for moments in sets for product in (moments.S, moments.C))

    return Case(
        "moments",
        {"N": N, "D": D, "T": D, "layers": layers},
        dtype,
        make,
        truth,
        {
            "eager": simple(plain, read=centre),
            "chassis": Provider(together, read, op="moments_update_"),
            "chassis_separate": Provider(separate, read, op="moments_update_"),
            "compile": compiled(plain, read=centre),
        },
        flops=layers * (N * D * (D + 1) + 2 * N * D * D),
        bytes=_DTYPES[dtype].itemsize * N * D * (layers + 1) + layers * 16 * (D * D / 2 + D * D),
    )


def case(N: int, D: int, form: str, dtype: str, batches: int = 1, layers: int = 1, T: int | None = None) -> Case:
    """`form` "X and Y" has T targets, by default D."""
    if layers > 1:
        return layered(N, D, layers, dtype)
    T = (T or D) if form == "X and Y" else 0
    size = _DTYPES[dtype].itemsize

    def make(device):
        normal = generator(device)
        x, y = (normal(N, width).to(_DTYPES[dtype]) if width else None for width in (D, T))
        return x, y

    def parts(x, y):
        return zip(x.chunk(batches), y.chunk(batches) if T else [None] * batches, strict=True)

    def chassis(x, y):
        moments = Moments(D, T, device=x.device)

        def step():
            for part in parts(x, y):
                moments.update(*part)
            return moments.flush()

        return step

    def plain(x, y):
        xx, xy = 0, 0
        for px, py in parts(x, y):
            px = px.float()
            xx = xx + px.T @ px
            xy = xy + px.T @ py.float() if T else xy
        return (xx, xy) if T else (xx,)

    def centred(x, y):
        state = [torch.zeros(D, width, dtype=torch.float64, device=x.device) for width in (D, T)]
        means, count = [torch.zeros(width, dtype=torch.float64, device=x.device) for width in (D, T)], 0

        def step():
            nonlocal count
            for px, py in parts(x, y):
                px, py = px.float(), py.float() if T else None
                both = [px, py] if T else [px]
                averages = [rows.mean(0) for rows in both]
                deviations = [rows - average for rows, average in zip(both, averages, strict=True)]
                shifts = [average - mean for average, mean in zip(averages, means, strict=False)]
                factor = count * len(px) / (count + len(px))
                for target, rows, shift in zip(state, deviations, shifts, strict=False):
                    target += deviations[0].T @ rows
                    target.addr_(shifts[0], shift, alpha=factor)
                count += len(px)
                for mean, shift in zip(means, shifts, strict=False):
                    mean += shift * (len(px) / count)
            return tuple(state) if T else (state[0],)

        return step

    def centre(products, x, y):
        x = x.double()
        others = (x, y.double()) if T else (x,)
        return tuple(
            found.double() - len(x) * torch.outer(x.mean(0), other.mean(0))
            for found, other in zip(products, others, strict=True)
        )

    def truth(x, y):
        return centre(tuple(x.T @ other for other in ((x, y) if T else (x,))), x, y)

    def read(moments, x, y):
        return (moments.S, moments.C) if T else (moments.S,)

    return Case(
        "moments",
        {"N": N, "D": D, "T": T, "batches": batches},
        dtype,
        make,
        truth,
        {
            "eager": simple(plain, read=centre),
            "chassis": Provider(chassis, read, op="moments_update_"),
            "eager_centred": Provider(centred),
            "compile": compiled(plain, read=centre),
        },
        flops=N * D * (D + 1) + 2 * N * D * T,  # one triangle of XᵀX, all of XᵀY
        bytes=size * N * (D + T) + 16 * (D * D / 2 + D * T),  # rows read once, the float64 state read and written
    )
