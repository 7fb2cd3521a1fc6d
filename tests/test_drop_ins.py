"""The README's drop-ins for fitting: each row's two sides are run and compared, and so is the example below them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.linear_model import Ridge, RidgeCV

import chassis_kernels

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = README.split("## Drop-ins")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\| `(.+?)` \| `(.+?)` \|", SECTION, re.MULTILINE))


@pytest.fixture
def names():
    torch.manual_seed(0)
    X = torch.randn(300, 12, dtype=torch.float64) * torch.arange(1, 13) ** -0.7 + 4
    H = X @ torch.randn(12, 5, dtype=torch.float64) + torch.randn(300, 5, dtype=torch.float64)
    Y = H[:, :3]
    found = {name: getattr(chassis_kernels, name) for name in chassis_kernels.__all__}
    found |= {
        "torch": torch,
        "solve": torch.linalg.solve,
        "I": torch.eye(12, dtype=torch.float64),
        "lam": 2.0,
        "k": 2,
        "D": 12,
    }
    found |= {"X": X, "Y": Y, "H": H, "Xc": X - X.mean(0), "Yc": Y - Y.mean(0), "alphas": (0.1, 1.0, 10.0)}
    found["W_U"], found["z"] = torch.randn(40, 5, dtype=torch.float64), torch.randn(6, 50)
    return found | {each.__name__: each for each in (CCA, IncrementalPCA, Ridge, RidgeCV)}


def first(result):
    return result[0] if isinstance(result, tuple) else result


CLAIMS = {
    "solve(Xc.T @ Xc": lambda theirs, ours, n: (theirs, first(ours)),
    "torch.linalg.lstsq": lambda theirs, ours, n: (theirs, first(ours)),
    "fit_ridge(X, H @": lambda theirs, ours, n: (first(theirs), first(ours).dense()),
    "Ridge(lam)": lambda theirs, ours, n: (theirs.coef_, ours.coef_),
    "RidgeCV(alphas)": lambda theirs, ours, n: ((theirs.coef_, theirs.alpha_), (ours.coef_, ours.alpha_)),
    "IncrementalPCA(k)": lambda theirs, ours, n: (PCA(2).fit(n["X"].numpy()).components_, ours.components_),
    "torch.logsumexp": lambda theirs, ours, n: (theirs, ours),
    "torch.cov": lambda theirs, ours, n: (theirs, ours),
    "CCA(k)": lambda theirs, ours, n: (
        [np.corrcoef(*pair)[0, 1] for pair in zip(*(s.T for s in theirs.transform(n["X"], n["Y"])), strict=True)],
        ours.canonical_correlations_,
    ),
}


@pytest.mark.parametrize("start", CLAIMS)
def test_a_drop_in_gives_what_it_replaces(start, names):
    (theirs,) = (code for code in ROWS if code.startswith(start))
    pair = CLAIMS[start](eval(theirs, names), eval(ROWS[theirs], names), names)
    for a, b in zip(*(each if isinstance(each, tuple) else (each,) for each in pair), strict=True):
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=1e-5, atol=1e-7)


def test_the_batch_sums_of_the_table_are_moments(names):
    (theirs,) = (code for code in ROWS if code.startswith("xx += "))
    names |= {"x": names["X"], "y": names["Y"], "T": 3, "xx": 0, "xy": 0}
    exec(theirs, names)
    ours = eval(ROWS[theirs], names)
    n, mean_x, mean_y = 300, names["x"].mean(0), names["y"].mean(0)
    torch.testing.assert_close(ours.S, names["xx"] - n * torch.outer(mean_x, mean_x))
    torch.testing.assert_close(ours.C, names["xy"] - n * torch.outer(mean_x, mean_y))


def test_the_example_runs_and_does_what_its_comments_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = {}
    exec(re.search(r"```python\n(.*?)```", SECTION, re.DOTALL).group(1), found)
    assert found["ridge"].alpha_.shape == (8,) and "(11, 8)" in capsys.readouterr().out
    loaded = chassis_kernels.StreamingRidgeCV.load("ridge.safetensors")
    assert np.array_equal(loaded.alpha_, found["ridge"].alpha_)
    x, y = found["x"], found["y"]
    assert found["similarity"].shape == (2, 1) and found["mapped"](x).shape == y.shape
    torch.testing.assert_close(found["mapped"](x).square().mean(), y.square().mean(), rtol=1e-4, atol=0)
    assert torch.corrcoef(torch.cat([found["without"], y[:, :1]], 1).T)[-1, :-1].abs().max() < 1e-4
