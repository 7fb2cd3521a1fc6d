"""The whole job on the testbed: fit, compare ranks, measure on held-out source, speak before and after.

Then the same with an expert that has another tokenizer, through a bridge; and both adapters plugged into the one base.
"""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import torch

from chassis.adapter import Adapter, combine
from chassis.bridge.loading import Side, bridge_for, bridged_expert, compare
from chassis.experts import load_expert
from chassis.fit import Base, FitOptions, Progress, fit
from chassis.models import load_causal_lm
from chassis.probes import make_windows
from chassis.results import continuation, measure, routed_generations, summarise
from chassis.routing import least_surprised, surprise
from chassis.testbed import Testbed

OPTIONS = FitOptions(rank=32, ranks=(4, 8, 16, 32, 64), max_windows=1000, max_test_windows=256)
BRIDGED = FitOptions(rank=32, ranks=(8,), layers="none", max_windows=160, max_test_windows=48)
LADDER_WINDOWS = 32
PORT_WINDOWS, PORT_TOKENS = 32, 32
PROMPTS = (
    'def close(self):\n        """Close the file."""\n        if self.',
    "class Reader:\n    def __init__(self, file, encoding=None):\n        ",
    "class Error(Exception):\n    ",
)
REPETITION_PENALTY = 1.3  # models of a million parameters otherwise fall into loops


def run_demo(testbed: Testbed, out: str | Path, progress: Progress | None = None, options: FitOptions = OPTIONS) -> dict:
    """Make the testbed's base speak like its same-tokenizer expert; results as `chassis.report` draws them.

    Adapter, lens and resumable statistics go to `out`. Raises ChassisError if it cannot be written.
    """
    model, tokenizer = load_causal_lm(testbed.base)
    base = Base(model, tokenizer, str(testbed.base))
    expert = load_expert(str(testbed.expert), base.head, tokenizer)
    result = fit(base, expert, testbed.documents["source"], options, out=out, progress=progress)
    scores = measure(base, expert, result, progress)
    for speaker in (model, expert.model):
        speaker.generation_config.repetition_penalty = REPETITION_PENALTY
    results = summarise(base, expert, result, scores, PROMPTS, "A prose model learns to speak Python")
    return results | {"decoding": f"greedy, repetition penalty {REPETITION_PENALTY}"}


def run_bridge_demo(
    testbed: Testbed, out: str | Path, progress: Progress | None = None, options: FitOptions = BRIDGED
) -> tuple[dict, dict]:
    """The other expert read in the base's tokens, and an adapter fitted through that bridge; results for
    `chassis.bridge.report` and for `chassis.report`."""
    base, expert = (Side(*load_causal_lm(f), f.name) for f in (testbed.base, testbed.other_expert))
    documents, report = testbed.documents["source"], progress or (lambda stage, done, total: None)
    bridge = bridge_for(base, expert, "auto", [d.text for d in documents["fit"]])
    bridge.save(Path(out) / "bridge.safetensors")
    ladder = compare(base, expert, bridge, documents, max_windows=LADDER_WINDOWS, progress=report)
    loaded, through = Base(base.model, base.tokenizer, str(testbed.base)), bridged_expert(base, expert, bridge)
    result = fit(loaded, through, documents, options, out=out, progress=lambda s, d, n: report(f"bridge: {s}", d, n))
    scores = measure(loaded, through, result, lambda s, d, n: report(f"bridge: {s}", d, n))
    results = summarise(loaded, through, result, scores, PROMPTS, "The same from an expert with another tokenizer")
    return ladder, results | {"decoding": f"greedy, repetition penalty {REPETITION_PENALTY}"}


def run_port_demo(testbed: Testbed, out: str | Path) -> dict:
    """The adapters of both chapters, read back from `out`, on one base: who speaks on which prompt, and how well on what.

    {"generations": with routes, "nats": {"source" and "prose": {who: nats per token}}}: on the second halves of held-out
    windows, "auto" having chosen by the first.
    """
    base = Base(*load_causal_lm(testbed.base), str(testbed.base))
    adapters = {"code": Adapter.load(out), "bridged": Adapter.load(Path(out) / "bridge")}
    speakers = adapters | {"half of each": combine([(0.5, adapter) for adapter in adapters.values()])}
    nats = {}
    for domain, documents in testbed.documents.items():
        windows = make_windows(documents["test"], base.tokenizer, minimum=128)[:PORT_WINDOWS]
        nats[domain] = _second_halves(base, speakers, adapters, [torch.tensor(window.ids).long() for window in windows])
    base.model.generation_config.repetition_penalty = REPETITION_PENALTY
    prose = testbed.documents["prose"]["test"][0].text[:200]
    prompts, routes = [PROMPTS[1], prose, PROMPTS[1]], ["auto", "auto", "code=0.5,bridged=0.5"]
    speak = partial(continuation, base.model, base.tokenizer, n_tokens=PORT_TOKENS)
    return {"generations": routed_generations(base, adapters, prompts, routes, speak), "nats": nats}


def _second_halves(base: Base, speakers: dict, choices: dict, windows: list[torch.Tensor]) -> dict[str, float]:
    totals = dict.fromkeys(["base", *speakers, "auto"], 0.0)
    for ids in windows:
        half = len(ids) // 2
        first, whole = (surprise(base.model, base.head, speakers, part) for part in (ids[:half], ids))
        second = {name: (whole[name] * (len(ids) - 1) - first[name] * (half - 1)) / (len(ids) - half) for name in whole}
        second["auto"] = second[least_surprised({name: first[name] for name in ("base", *choices)})]
        for name, value in second.items():
            totals[name] += value / len(windows)
    return totals


def same_by_hand(testbed: Testbed, options: FitOptions = OPTIONS) -> str:
    """The `chassis sweep` command that gives the demo's numbers."""
    words = ["chassis", "sweep", "--base", testbed.base, "--expert", testbed.expert]
    for option, split in (("--data", "fit"), ("--validation", "validation"), ("--test", "test")):
        words += [option, testbed.data / f"source_{split}.jsonl"]
    words += ["--ranks", ",".join(map(str, options.ranks)), "--rank", options.rank]
    for option, windows in (("--max-tokens", options.max_windows), ("--max-test-tokens", options.max_test_windows)):
        words += [option, windows * options.window]
    return shlex.join(map(str, words))
