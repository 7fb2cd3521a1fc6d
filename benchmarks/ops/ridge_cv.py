"""Ridge whose penalty is chosen from 20, for all targets together: by generalised cross-validation or over 5 folds of rows.

`eager` takes one eigendecomposition per fit, as `StreamingRidgeCV` does over folds. `chassis_one_fit` is `StreamingRidge`
with the best penalty given: the cost that a whole path is measured against.
"""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Provider, compiled, generator, simple
from chassis_kernels import StreamingRidge, StreamingRidgeCV
from chassis_kernels.statistics import fold_of

DTYPES = ("fp32",)
FOLDS = 5
ALPHAS = tuple(10.0 ** (k - 7) for k in range(20))
_GCV, _FOLDS = [{"form": form} for form in ("GCV", "5 folds")]
SHAPES = {
    "tiny": [{"N": 90, "D": 8, "T": 5} | form for form in (_GCV, _FOLDS)],
    "quick": [{"N": 4096, "D": 256, "T": 64} | _GCV, {"N": 1024, "D": 128, "T": 64} | _FOLDS],
    "default": [{"N": 4096, "D": 256, "T": 128} | _GCV, {"N": 2048, "D": 128, "T": 128} | _FOLDS]
    + [{"N": n, "D": d, "T": 2048} | _GCV for n, d in ((16384, 512), (4096, 2048))],
    "scaling": [{"N": 16384, "D": d, "T": 2048} | _GCV for d in (256, 1024)],
    "gpu": [{"N": 1 << 16, "D": 1024, "T": 2048} | form for form in (_GCV, _FOLDS)],
}


def folds(N: int) -> torch.Tensor:
    """[N] int64: the fold of each row, 8 rows to a group."""
    return fold_of(torch.arange(N) // 8, FOLDS)


def case(N: int, D: int, T: int, form: str, dtype: str) -> Case:
    """Targets so noisy that an inner penalty is best."""
    fold = folds(N)

    def make(device):
        normal = generator(device)
        x = normal(N, D) * torch.linspace(0.3, 3, D, device=device) + 2
        return x, x @ (normal(D, T) * D**-0.5) + 20 * normal(N, T)

    def decomposed(x, y):
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        values, vectors = torch.linalg.eigh(x.T @ x)
        return values, vectors, vectors.T @ (x.T @ y), y, mean_x, mean_y

    def gcv(x, y):
        values, _, R, y, *_ = decomposed(x, y)
        errors = []
        for alpha in ALPHAS:
            shrunk = values / (values + alpha)
            residual = y.square().sum() - ((2 * shrunk - shrunk.square()) / values) @ R.square().sum(1)
            errors.append(residual / N / (1 - (1 + shrunk.sum()) / N) ** 2)
        return torch.stack(errors)

    def cross_validated(x, y):
        errors = torch.zeros(len(ALPHAS), dtype=x.dtype, device=x.device)
        for k in range(FOLDS):
            out = (fold == k).to(x.device)
            values, vectors, R, _, mean_x, mean_y = decomposed(x[~out], y[~out])
            projected, target = (x[out] - mean_x) @ vectors, y[out] - mean_y
            errors += torch.stack([(target - projected @ (R / (values + a)[:, None])).square().sum() for a in ALPHAS])
        return errors / N

    def search(x, y):
        errors = (gcv if form == "GCV" else cross_validated)(x, y) / T
        values, vectors, R, *_ = decomposed(x, y)
        best = torch.tensor(ALPHAS, dtype=x.dtype, device=x.device)[errors.argmin()]
        return vectors @ (R / (values + best)[:, None]), errors

    given: list[float] = []
    groups = None if form == "GCV" else torch.arange(N) // 8

    def chassis(x, y):
        return StreamingRidgeCV(ALPHAS, "none", n_folds=FOLDS).fit(x, y, groups=groups)

    def one_fit(x, y):
        if not given:
            given.append(chassis(x, y).alpha_)
        return lambda: StreamingRidge(given[0], "none").fit(x, y)

    def read(fitted, x, y):
        return torch.as_tensor(fitted.coef_.T), torch.as_tensor(fitted.cv_results_["mean_squared_error"])

    return Case(
        "ridge_cv",
        {"N": N, "D": D, "T": T, "alphas": len(ALPHAS), "form": form},
        dtype,
        make,
        search,
        {
            "eager": simple(search),
            "chassis": simple(chassis, read=read, op="moments_update_"),
            "chassis_one_fit": Provider(
                one_fit,
                read=lambda fitted, x, y: (torch.as_tensor(fitted.coef_.T),),
                of=lambda full: full[:1],
                op="moments_update_",
            ),
            "compile": compiled(search),
        },
        flops=N * D * (D + 1) + 2 * N * D * T + D**3 / 3 + 2 * D * D * T,  # of one fit: no path needs less
        bytes=4 * (N * (D + T) + D * T),
    )
