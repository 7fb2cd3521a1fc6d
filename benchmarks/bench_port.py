"""The cases of `benchmarks/ops/port.py` under pytest-benchmark, and decoding on the testbed in each form of an adapter."""

import copy
from functools import partial

import pytest
import torch

from benchmarks import timing
from benchmarks.pytest_entry import entry

test_port = entry("port")
TOKENS, RANK, ROUNDS = 64, 32, 21


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    """{name: model} of the testbed's base with one random adapter of rank 32 in each form."""
    from chassis.adapter import Adapter, AdapterConfig
    from chassis.export import export_peft
    from chassis.merge import merge
    from chassis.models import inspect_head, load_causal_lm
    from chassis.port import attach
    from chassis.testbed import build

    model, _ = load_causal_lm(build().base)
    head = inspect_head(model)
    normal = torch.Generator().manual_seed(0)
    U, V = (torch.randn(*shape, generator=normal) * 0.01 for shape in ((head.width, RANK), (RANK, head.vocab_size)))
    bias, zeros = torch.randn(head.vocab_size, generator=normal) * 0.01, torch.zeros(head.width)
    adapter = Adapter(U, V, bias, zeros, torch.ones(head.width), None, AdapterConfig(vocab_size=head.vocab_size))
    found = {name: copy.deepcopy(model) for name in ("base", "attached", "merged", "peft")}
    attach(found["attached"], adapter)
    merge(found["merged"], adapter)
    folder = tmp_path_factory.mktemp("lora")
    export_peft(adapter, head, folder)
    found["peft"] = pytest.importorskip("peft").PeftModel.from_pretrained(found["peft"], folder)
    return found


@pytest.mark.parametrize("rows", [1, 16])
def test_decoding_on_the_testbed(speakers, rows, capsys):
    """Prints milliseconds per token and the ratio to the base; the models take turns, as in `benchmarks/run.py`."""
    ids = torch.arange(8).repeat(rows, 1) + 5
    options = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "pad_token_id": 0}
    steps = {name: [partial(model.generate, input_ids=ids, **options)] for name, model in speakers.items()}
    times = timing.rounds_of(steps, ROUNDS, torch.device("cpu"))
    with capsys.disabled():
        print(f"\ngreedy decoding, {rows} rows, {ROUNDS} rounds: median and 20-80 % of the ratio to the base")
        for name, each in times.items():
            ratio, low, high = timing.spread(timing.ratios(each, times["base"]))
            print(f"{name:>9} {timing.spread(each)[0] / TOKENS:.3f} ms a token, {ratio:.3f} ({low:.3f}-{high:.3f})")
