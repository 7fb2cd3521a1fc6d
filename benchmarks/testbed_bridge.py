"""What a fit through a bridge costs on the testbed beside its bar: targets and closed form in times both plain forwards.

    python -m benchmarks.testbed_bridge --rounds 5

Rounds are interleaved: both models' plain forward passes over the text of the demo's windows, each in its own tokens; the
first pass of a bridge just read from its file; a later pass of it over the same text. A pass is the base, the targets and
the moments of all windows, and the closed form they give. Medians over rounds, the first of which warms up and is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from chassis import probes
from chassis.bridge import apply
from chassis.bridge.apply import States
from chassis.bridge.bridge import Bridge
from chassis.bridge.canonical import CanonicalMask
from chassis.bridge.expert import BridgedExpert
from chassis.bridge.forest import Reader
from chassis.bridge.loading import Side, bridge_for, bridged_expert
from chassis.checkpoint import Checkpoint
from chassis.closed_form import factorise, fisher, full_change
from chassis.demo import BRIDGED
from chassis.experts import Readout
from chassis.fit import collect
from chassis.models import load_causal_lm
from chassis.models.forward import forward
from chassis.newton import ProbabilityStatistics
from chassis.page import Row, Table, print_tables
from chassis.probes import Probe, Window, pad
from chassis.testbed import build
from rich.console import Console

from chassis_kernels import ridge

BAR = 2.5
FORWARDS, CLOSED = "Both plain forwards", "closed form"
PARTS = (
    (probes, "capture", "the base's forward"),
    (Bridge, "plans", "plans"),
    (Reader, "read", "states of the expert"),
    (CanonicalMask, "lists", "what cannot follow"),
    (States, "__init__", "projection"),
    (apply, "bridge_project", "projection"),
    (ProbabilityStatistics, "update", "moments"),
    (Probe, "rows", "other"),
)
Seconds = dict[str, np.ndarray]  # part -> [2] of processor time, on the clock


class Stopwatch:
    """Seconds spent in parts, each without the parts inside it."""

    def __init__(self) -> None:
        self.seconds: Seconds = {}
        self._inside = np.zeros(2)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        before, self._inside, begun = self._inside, np.zeros(2), _now()
        yield
        took = _now() - begun
        self.seconds[name] = self.seconds.get(name, np.zeros(2)) + took - self._inside
        self._inside = before + took

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return run


def _now() -> np.ndarray:
    return np.array([time.process_time(), time.perf_counter()])


@torch.no_grad()
def forwards(sides: Sequence[Side], windows: Sequence[Window]) -> Seconds:
    """Base and expert over the text of the windows, with logits, in as many batches as a pass."""
    watch, base = Stopwatch(), sides[0].tokens
    texts = [b"".join(base.bytes[i] for i in window.ids[base.is_text[window.ids]]).decode() for window in windows]
    own = sides[1].tokens.ids_of(texts)
    rows = [window.ids for window in windows], [np.array([sides[1].opens, *ids]) for ids in own]
    for name, side, ids in zip(("the base's", "the expert's"), sides, rows, strict=True):
        for i in range(0, len(ids), BRIDGED.batch_size):
            batch, mask, _ = pad(ids[i : i + BRIDGED.batch_size], "right")
            with watch.part(name):
                forward(side.model, batch, mask)
    return watch.seconds


def one_pass(base: Side, through: BridgedExpert, windows: Sequence[Window]) -> Seconds:
    """What `chassis.fit` does with its windows until it has a closed form."""
    watch, readout = Stopwatch(), Readout.of(base.head)
    with contextlib.ExitStack() as stack:
        for owner, name, part in PARTS:
            stack.enter_context(mock.patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        probe = Probe(base.model, through, (), "all", BRIDGED.batch_size)
        found = collect(probe, readout, windows, Checkpoint(None, ""), lambda *_: None)
    with watch.part(CLOSED):
        target = found.newton(1.0)
        solution = ridge.solve(target.final, BRIDGED.alpha)
        change = full_change(target, solution.W)
        factorise(target, solution, change, fisher(change.joint, target.mean_p)).adapter(BRIDGED.rank)
    return watch.seconds


def measure(rounds: int, n_windows: int) -> tuple[list[dict[str, Seconds]], str]:
    """For each round what forwards, first and later pass took; what was read."""
    testbed = build()
    sides = [Side(*load_causal_lm(folder), folder.name) for folder in (testbed.base, testbed.other_expert)]
    documents = testbed.documents["source"]["fit"]
    counted, found = bridge_for(*sides, "auto", [document.text for document in documents]), []
    windows = bridged_expert(*sides, counted).windows(documents, BRIDGED.window)[:n_windows]
    with tempfile.TemporaryDirectory() as folder:
        path = counted.save(Path(folder) / "bridge.safetensors")
        for _ in range(rounds + 1):
            taken = {FORWARDS: forwards(sides, windows)}
            watch = Stopwatch()
            with watch.part("reading the bridge"):
                through = bridged_expert(*sides, Bridge.load(path, sides[1].tokens, sides[0].tokens))
            taken["First pass"] = watch.seconds | one_pass(sides[0], through, windows)
            taken["Later pass"] = one_pass(sides[0], through, windows)
            found.append(taken)
    return found[1:], f"{len(windows)} windows, {sum(len(window.ids) for window in windows)} tokens of the base"


def tables(rounds: list[dict[str, Seconds]], about: str) -> list[Table]:
    """A table for the forwards and each pass: medians of seconds, and of times the forwards of the same round."""
    plain, found = [sum(taken[FORWARDS].values()) for taken in rounds], []
    for name in rounds[0]:
        rows = [_row(part, [taken[name][part] for taken in rounds], plain) for part in rounds[0][name]]
        rows.append(_row("all", [sum(taken[name].values()) for taken in rounds], plain, "chosen"))
        title = f"{name} (bar: {BAR} × both forwards)" if found else f"{name}: {about}"
        found.append(Table(title, ["part", "processor s", "clock s", "processor ×", "clock ×"], rows))
    return found


def _row(name: str, taken: Sequence[np.ndarray], plain: Sequence[np.ndarray], style: str = "") -> Row:
    seconds = np.median(taken, axis=0)
    times = np.median([one / other for one, other in zip(taken, plain, strict=True)], axis=0)
    return Row([name, *(f"{s:.2f}" for s in seconds), *(f"{t:.2f}" for t in times)], style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=BRIDGED.max_windows)
    arguments = parser.parse_args()
    print_tables(tables(*measure(arguments.rounds, arguments.windows)), Console(width=110))


if __name__ == "__main__":
    main()
