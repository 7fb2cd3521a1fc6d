"""Lenses: the same as regressing on logits, saved and loaded, refused where they do not fit."""

import pytest
import torch
from chassis.errors import ChassisError
from chassis.lens import Lens, fit_lens
from chassis.probes import Probe, make_windows
from chassis.statistics import Statistics
from support import documents, pair

from chassis_kernels import fit_ridge


@pytest.fixture(scope="module")
def fitted(tiny_lm, tiny_tokenizer):
    base, expert = pair(tiny_lm, tiny_tokenizer)
    layers = (0, 2, 3)
    batches = list(Probe(base.model, expert, layers).batches(make_windows(documents(20), tiny_tokenizer, length=48)))
    statistics = Statistics(base.readout, expert.readout, layers=layers)
    for rows in batches:
        statistics.update(rows)
    return expert, batches, fit_lens(statistics, 1e-4)


def test_lens_through_the_unembedding_is_ridge_on_the_logits(fitted):
    """(S + a)^-1 X'(H W') = ((S + a)^-1 X'H) W': fp32 rounding of the rows is all that may differ."""
    expert, batches, lens = fitted
    x = torch.cat([rows.layers[2] for rows in batches]).double()
    logits = torch.cat([rows.expert for rows in batches]).double() @ expert.readout.weight.double().T
    weight, bias = fit_ridge(x, logits, 1e-4, alpha_scale="trace")
    mine = lens.hidden(2, x.float()).double() @ expert.readout.weight.double().T
    assert (mine - (x @ weight + bias)).norm() < 1e-4 * mine.norm()


def test_saved_and_loaded_lens_is_the_same(fitted, tmp_path):
    _, batches, lens = fitted
    again = Lens.load(lens.save(tmp_path))
    assert again.layers == lens.layers == [0, 2, 3, "final"]
    assert all(torch.equal(a, b) for l in lens.layers for a, b in zip(lens.maps[l], again.maps[l], strict=True))


def test_unknown_layers_widths_and_folders_are_refused(fitted, tmp_path):
    _, batches, lens = fitted
    with pytest.raises(ChassisError, match="no lens for layer 1"):
        lens.hidden(1, batches[0].final)
    with pytest.raises(ChassisError, match="width 31 for a lens of width 32"):
        lens.hidden(0, batches[0].final[:, :31])
    with pytest.raises(ChassisError, match="no readable lens"):
        Lens.load(tmp_path / "nothing")
    folder = lens.save(tmp_path)
    (folder / "lens.safetensors").write_bytes(b"junk")
    with pytest.raises(ChassisError, match="no readable lens"):
        Lens.load(folder)
