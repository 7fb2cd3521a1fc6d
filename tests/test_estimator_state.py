"""Every estimator is saved, resumed, merged and killed without a bit of difference."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from estimator_problems import ESTIMATORS, batches, joined, outcome
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import BUDGET

from chassis_kernels import StreamingPCA, StreamingRidge, StreamingRidgeCV

EACH = pytest.mark.parametrize("name", ESTIMATORS)
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from estimator_problems import ESTIMATORS, batches
for number, (make, options) in enumerate(ESTIMATORS.values()):
    estimator = make()
    for done, batch in enumerate(batches(**options)[:3]):
        estimator.partial_fit(*batch)
        if done < 2:
            estimator.save(f"{sys.argv[2]}/{number}.safetensors")
if sys.argv[3] == "in a save":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    estimator.save(f"{sys.argv[2]}/{number}.safetensors")
os.kill(os.getpid(), signal.SIGKILL)
"""


@EACH
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_going_on_from_a_file_gives_the_same_bits(name, stop, tmp_path):
    make, options = ESTIMATORS[name]
    straight, stopped, parts = make(), make(), batches(**options)
    for batch in parts[:stop]:
        stopped.partial_fit(*batch)
    path = tmp_path / "fit.safetensors"
    stopped.save(path)
    resumed = type(stopped).load(path)
    assert resumed.get_params() == {k: list(v) if isinstance(v, tuple) else v for k, v in stopped.get_params().items()}
    resumed, looked_at = type(stopped).load(path), resumed
    assert torch.equal(outcome(looked_at, parts[0][0]), outcome(stopped, parts[0][0]))  # merges the rows that wait
    for batch in parts[stop:]:
        resumed.partial_fit(*batch)
    for batch in parts:
        straight.partial_fit(*batch)
    assert torch.equal(outcome(resumed, parts[0][0]), outcome(straight, parts[0][0]))
    assert resumed.n_samples_seen_ == straight.n_samples_seen_ == 119


@pytest.mark.parametrize("moment", ["between batches", "in a save"])
def test_a_killed_job_goes_on_with_the_same_bits(moment, tmp_path):
    arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), moment]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for number, (name, (make, options)) in enumerate(ESTIMATORS.items()):
        parts, straight = batches(**options), make()
        resumed = type(straight).load(tmp_path / f"{number}.safetensors")
        seen = int(resumed.n_samples_seen_)
        assert seen == 19  # two batches; the third was lost
        for done, batch in enumerate(parts):
            straight.partial_fit(*batch)
            if done >= 2:
                resumed.partial_fit(*batch)
        assert torch.equal(outcome(resumed, parts[0][0]), outcome(straight, parts[0][0])), name


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_parts_equal_one_pass(name, dtype):
    make, options = ESTIMATORS[name]
    parts = batches(**options, dtype=dtype)
    whole, left, right = make().fit(*joined(parts)), make().fit(*joined(parts[:2])), make().fit(*joined(parts[2:]))
    right_before = outcome(right, parts[0][0])
    merged = make().merge(left).merge(right)
    assert merged.n_samples_seen_ == whole.n_samples_seen_ and left.n_samples_seen_ == 19
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4  # centring by part in float32; float32 results
    torch.testing.assert_close(outcome(merged, parts[0][0]), outcome(whole, parts[0][0]), rtol=tolerance, atol=tolerance)
    assert torch.equal(outcome(right, parts[0][0]), right_before)


@given(
    cuts=st.lists(st.integers(1, 118), max_size=8),
    name=st.sampled_from(list(ESTIMATORS)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@BUDGET
def test_any_split_into_batches_equals_one(cuts, name, dtype):
    make, options = ESTIMATORS[name]
    whole, edges = joined(batches(**options, dtype=dtype)), sorted({0, 119, *cuts})
    parts = make()
    for a, b in zip(edges, edges[1:], strict=False):
        parts.partial_fit(*(t if t is None else t[a:b] for t in whole))
    tolerance = 1e-8 if dtype == torch.float64 else 2e-4  # centring by batch in float32; float32 results
    expected = outcome(make().fit(*whole), whole[0])
    torch.testing.assert_close(outcome(parts, whole[0]), expected, rtol=tolerance, atol=tolerance)


def test_names_and_shapes_of_what_was_fitted_are_kept(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.random.default_rng(0).normal(size=(20, 3)), columns=["a", "b", "c"])
    StreamingRidge().fit(frame, frame["a"]).save(tmp_path / "fit.safetensors")
    loaded = StreamingRidge.load(tmp_path / "fit.safetensors")
    assert loaded.feature_names_in_.tolist() == ["a", "b", "c"] and loaded.predict(frame).shape == (20,)
    assert loaded.coef_.shape == (3,)
    with pytest.raises(ValueError, match="feature names"):
        loaded.partial_fit(frame[["b", "a", "c"]], frame["a"])


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "fit.safetensors"
    x, y, *_ = batches()[0]
    StreamingRidge().fit(x, y).save(path)
    with pytest.raises(ValueError, match="'class': 'StreamingRidge'}, expected .*'class': 'StreamingPCA'"):
        StreamingPCA.load(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        StreamingRidge.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not written by this version of StreamingRidge.save"):
        StreamingRidge.load(path)
    assert json.dumps(os.listdir(tmp_path)) == '["fit.safetensors"]'


def test_fits_that_do_not_go_together_are_not_merged():
    (x, y, *_), groups = batches()[0], torch.arange(18)
    ridge = StreamingRidge().fit(x, y)
    before = ridge.coef_
    for other, message in (
        (StreamingPCA().fit(x), "cannot merge StreamingPCA into StreamingRidge"),
        (StreamingRidge().fit(x, y[:, :2]), "do not go together"),
        (StreamingRidge().fit(x[:, 1:], y), "cannot merge a fit of"),
    ):
        with pytest.raises(ValueError, match=message):
            ridge.merge(other)
    with pytest.raises(ValueError, match="do not go together"):
        StreamingRidgeCV().fit(x, y).merge(StreamingRidgeCV().fit(x, y, groups=groups))
    assert np.array_equal(ridge.coef_, before)
    with pytest.raises(Exception, match="not fitted yet"):
        ridge.merge(StreamingRidge())


def test_parameters_that_are_arrays_are_saved_as_numbers(tmp_path):
    x, y, *_ = batches()[0]
    StreamingRidgeCV(np.array([0.1, 1.0]), n_folds=np.int64(4)).fit(x, y).save(tmp_path / "fit.safetensors")
    loaded = StreamingRidgeCV.load(tmp_path / "fit.safetensors")
    assert loaded.alphas == [0.1, 1.0] and loaded.n_folds == 4
    with pytest.raises(TypeError, match="a parameter of type object cannot be saved"):
        StreamingRidge(nan="drop", alpha_scale="none").set_params(alpha=1.0).fit(x, y).set_params(alpha=object()).save("x")
