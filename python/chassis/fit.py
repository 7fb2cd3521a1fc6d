"""The main job: one pass over text, then lenses, adapter, rank sweep, refinement and held-out numbers.

documents -> windows -> Probe -> Statistics -> closed_form -> refine -> evaluate -> folder
"""

from __future__ import annotations

import itertools
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from chassis.adapter import FORMAT, Adapter, AdapterConfig
from chassis.checkpoint import Checkpoint
from chassis.closed_form import ClosedForm, closed_form
from chassis.errors import BridgeError, ChassisError
from chassis.experts import AnyExpert, Readout
from chassis.files import ensure_config_is, ensure_writable
from chassis.lens import Lens, LensConfig, fit_lens
from chassis.models import Head, inspect_head, located, vocabulary_hash
from chassis.models.forward import forward
from chassis.newton import INITS, ProbabilityStatistics, newton_closed_form
from chassis.probes import Probe, Rows, Window, check_disjoint, fingerprint, make_windows, pad, save_keys
from chassis.refine import Refinement, refine
from chassis.statistics import Statistics
from chassis.text.corpus import Document

SPLITS = ("fit", "validation", "test")
ROWS_PER_STEP = 2048
VALIDATION_BATCHES = 3
KEPT = 1 << 30  # bytes of rows that refinement keeps, since it comes back to them
PLAIN_BATCHES = 4  # of plain forward passes, which are timed to be shown beside a fit through a bridge
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass
class FitOptions:
    """Settings of a fit. `layers`: "all", "none" or layer numbers; `alpha`: ridge relative to tr(S)/D."""

    rank: int = 32
    ranks: tuple[int, ...] = ()  # further ranks to report
    columns: int | None = None
    alpha: float = 1e-4
    init: str = "both"  # of INITS, for an expert that gives probabilities
    layers: str | tuple[int, ...] = "all"
    positions: str = "all"
    window: int = 128
    batch_size: int = 16
    max_windows: int | None = None  # of the fit split
    max_test_windows: int | None = 512
    refine_steps: int = 60
    refine_rate: float = 2e-2
    seed: int = 0
    checkpoint_seconds: float = 30.0

    def check(self, head: Head) -> tuple[int, ...]:
        """Raise ChassisError for settings this base cannot take; returns the layers to probe."""
        for rank in (self.rank, *self.ranks):
            if not 1 <= rank <= head.width:
                raise ChassisError(f"rank {rank}: expected 1..{head.width}, {head.width} being the width of the base")
        if self.columns is not None and not 1 <= self.columns <= head.vocab_size:
            raise ChassisError(f"{self.columns} columns: expected 1..{head.vocab_size}, the size of the vocabulary")
        if not self.alpha >= 0:
            raise ChassisError(f"alpha {self.alpha}: expected 0 or more, relative to the mean eigenvalue of the Gram matrix")
        if self.init not in INITS:
            raise ChassisError(f"init {self.init!r}: expected one of {', '.join(INITS)}")
        if self.refine_steps < 0 or self.batch_size < 1 or self.window < 2:
            raise ChassisError(
                f"refine_steps {self.refine_steps}, batch_size {self.batch_size}, window {self.window}: "
                "expected at least 0, 1 and 2"
            )
        known = tuple(range(len(head.blocks) + 1))
        layers = {"all": known, "none": ()}.get(self.layers, self.layers) if isinstance(self.layers, str) else self.layers
        unknown = [layer for layer in layers if layer not in known]
        if unknown:
            raise ChassisError(f"layers {unknown}: this base has layers 0..{known[-1]} (or 'all', 'none')")
        return tuple(layers)


@dataclass
class Base:
    """The model that is adapted, its tokenizer and what it is called."""

    model: torch.nn.Module
    tokenizer: object
    name: str = "base"

    def __post_init__(self) -> None:
        self.head = inspect_head(self.model)
        self.readout = Readout.of(self.head)
        self.vocabulary_hash = vocabulary_hash(self.tokenizer)


@dataclass
class FitResult:
    """What a fit gives. `refinements` by rank; `adapters` by (kind, rank), kind "closed form" or "refined"."""

    adapter: Adapter
    lens: Lens
    closed: ClosedForm
    adapters: dict[tuple[str, int], Adapter]
    refinements: dict[int, Refinement]
    windows: dict[str, list[Window]]
    probe: Probe
    seconds: dict[str, float]

    def save(self, folder: str | Path) -> Path:
        """Write the adapter and the hashes of its windows into `folder`, the lens into `folder`/lens."""
        save_keys(self.windows["fit"], ensure_writable(folder))
        self.lens.save(Path(folder) / "lens")
        return self.adapter.save(folder)


def fit(
    base: Base,
    expert: AnyExpert,
    documents: Mapping[str, Sequence[Document]],
    options: FitOptions | None = None,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Fit lenses and an adapter that make `base` speak like `expert`.

    `documents` has "fit", "validation" and "test" documents; no window may be in two of them. With `out`, statistics are
    kept there while they are collected, so that a killed fit goes on where it was with the identical result. Needs memory
    for the moments, a few batches and, while it refines, KEPT bytes of rows beside the models. Raises ChassisError for
    anything the caller can put right, before any long work where that is possible.
    """
    options, report = options or FitOptions(), progress or (lambda stage, done, total: None)
    layers = options.check(base.head)
    _check_expert(base, expert)
    if out is not None:
        ensure_config_is(out, "format", FORMAT)
    windows = _windows(base, expert, documents, options)
    layers = () if expert.log_probs else layers
    probe = Probe(base.model, expert, layers, options.positions, options.batch_size)
    clock = _Clock()
    checkpoint = Checkpoint(out, _identity(base, expert, windows["fit"], layers, options), options.checkpoint_seconds)
    statistics = collect(probe, base.readout, windows["fit"], checkpoint, report)
    clock.mark("statistics")
    held = _held(probe, windows) if expert.log_probs or options.refine_steps else []
    clock.mark("validation_rows")
    closed = _closed_form(statistics, expert, held, options)
    names = located(base.name), located(expert.name)
    lens = fit_lens(closed.statistics, options.alpha, LensConfig(*names, base.vocabulary_hash))
    ranks = sorted({options.rank, *options.ranks})
    adapters = {("closed form", rank): closed.adapter(rank, options.columns) for rank in ranks}
    clock.mark("closed_form")
    refinements = _refine(closed, probe, windows["fit"], held, ranks, options, report) if options.refine_steps else {}
    adapters |= {("refined", rank): refinement.adapter for rank, refinement in refinements.items()}
    clock.mark("refine")
    plain = {"plain_forward": _plain_forwards(probe, windows["fit"])} if expert.log_probs else {}
    config = AdapterConfig(
        base=names[0],
        expert=names[1],
        vocabulary_hash=base.vocabulary_hash,
        width=base.head.width,
        vocab_size=base.head.vocab_size,
        positions=options.positions,
        data_fingerprint=fingerprint(windows["fit"]),
        n_rows=statistics.n_rows,
    )
    for (kind, rank), adapter in adapters.items():
        adapter.config = replace(config, rank=rank, refined=kind == "refined" and refinements[rank].kept)
        if rank in refinements:
            found = refinements[rank]
            adapter.config.no_op_kl = found.no_op_validation_kl
            adapter.config.kl = found.validation_kl if kind == "refined" else found.closed_form_validation_kl
    chosen = adapters.get(("refined", options.rank), adapters["closed form", options.rank])
    seconds = clock.seconds | {f"{name}_forward": value for name, value in probe.seconds.items()} | plain
    result = FitResult(chosen, lens, closed, adapters, refinements, windows, probe, seconds)
    if out is not None:
        result.save(out)
        checkpoint.remove()
    return result


def collect(
    probe: Probe, base: Readout, windows: Sequence[Window], checkpoint: Checkpoint, progress: Progress
) -> Statistics:
    """One pass over `windows`: moments of every layer and the mean probabilities; goes on from `checkpoint`."""
    if probe.expert.log_probs:
        statistics = ProbabilityStatistics(base, probe.expert.readout, probe.expert.width)
        probe = replace(probe, pairs=statistics.pairs)
    else:
        statistics = Statistics(base, probe.expert.readout, layers=probe.layers)
    total = -(-len(windows) // probe.batch_size)
    done = checkpoint.load(statistics)
    progress("statistics", done, total)
    for rows in probe.batches(windows, skip=done):
        statistics.update(rows)
        done += 1
        checkpoint.save(statistics, done, force=done == total)
        progress("statistics", done, total)
    return statistics


def _closed_form(statistics: Statistics, expert: AnyExpert, held: list[Rows], options: FitOptions) -> ClosedForm:
    if not expert.log_probs:
        return closed_form(statistics, options.alpha)
    semantic = None
    if options.init != "newton":
        try:
            semantic = expert.semantic_change(statistics.base, statistics.pairs, options.alpha)
        except BridgeError as error:
            if options.init == "semantic":
                raise
            warnings.warn(f"the start is a Gauss-Newton step alone: {error}", stacklevel=2)
    return newton_closed_form(statistics, options.alpha, options.rank, held, semantic, init=options.init)


@torch.no_grad()
def _plain_forwards(probe: Probe, windows: Sequence[Window]) -> float:
    """Seconds that both models' own forward passes over the windows take, measured on PLAIN_BATCHES of their batches."""
    starts = range(0, len(windows), probe.batch_size)
    starts = starts[:: max(1, len(starts) // PLAIN_BATCHES)]
    sample = [windows[start : start + probe.batch_size] for start in starts]
    begun = time.perf_counter()
    for batch in sample:
        forward(probe.model, *pad([window.ids for window in batch], probe.padding_side)[:2])
        probe.expert.plain_forward(batch)
    return (time.perf_counter() - begun) * len(windows) / sum(map(len, sample))


def _lean(probe: Probe) -> Probe:
    """The same without layers, and with a clock of its own."""
    return replace(probe, layers=(), seconds=dict.fromkeys(probe.seconds, 0.0))


def _held(probe: Probe, windows: Mapping[str, list[Window]]) -> list[Rows]:
    """Validation rows that starts and steps are chosen on."""
    return list(itertools.islice(_lean(probe).batches(windows["validation"]), VALIDATION_BATCHES))


def _refine(closed, probe, windows, held, ranks, options, progress) -> dict[int, Refinement]:
    """Refine each rank on the same batches of `windows` in an order of its own, against held validation rows."""
    order = list(windows)
    random.Random(options.seed).shuffle(order)
    progress("refine", 0, options.refine_steps)
    return refine(
        closed,
        ranks,
        _steps(_lean(probe), order),
        held,
        steps=options.refine_steps,
        rate=options.refine_rate,
        columns=options.columns,
        expert=probe.expert.readout,
        progress=lambda step: progress("refine", step, options.refine_steps),
    )


def _steps(probe: Probe, windows: Sequence[Window]) -> Iterator[Rows]:
    """Batches of at least ROWS_PER_STEP rows, over the windows again and again; the first KEPT bytes of them are kept."""
    waiting: list[Rows] = []
    kept: list[Rows] = []
    while True:
        known = kept[:]
        for number, rows in enumerate(itertools.chain(known, probe.batches(windows, skip=len(known)))):
            if number == len(kept) and sum(r.nbytes for r in kept) + rows.nbytes <= KEPT:
                kept.append(rows)
            waiting.append(rows)
            if sum(len(r.final) for r in waiting) >= ROWS_PER_STEP:
                yield Rows.join(waiting)
                waiting = []


def _windows(
    base: Base, expert: AnyExpert, documents: Mapping[str, Sequence[Document]], options: FitOptions
) -> dict[str, list[Window]]:
    missing = [split for split in SPLITS if not documents.get(split)]
    if missing:
        total = sum(len(documents.get(split) or ()) for split in SPLITS)
        raise ChassisError(
            f"no {' and no '.join(missing)} documents ({total} in all): fitting, choosing and measuring each need documents "
            "of their own; give more documents, or name them with --validation and --test"
        )
    if expert.log_probs:
        windows = {split: expert.windows(documents[split], options.window) for split in SPLITS}
    else:
        windows = {split: make_windows(documents[split], base.tokenizer, length=options.window) for split in SPLITS}
    windows["fit"] = windows["fit"][: options.max_windows]
    windows["test"] = windows["test"][: options.max_test_windows]
    for split in SPLITS[1:]:
        check_disjoint(windows["fit"], windows[split])
    rows = len(windows["fit"]) if options.positions == "last" else sum(len(w.ids) for w in windows["fit"])
    if rows < 2 * base.head.width:
        raise ChassisError(
            f"{rows} rows to fit a map of width {base.head.width}: expected at least {2 * base.head.width}; give more text"
        )
    return windows


def _check_expert(base: Base, expert: AnyExpert) -> None:
    weight = expert.readout.weight
    if weight is not None and weight.shape[0] != base.head.vocab_size:
        raise ChassisError(
            f"the expert {expert.name!r} has a vocabulary of {weight.shape[0]} tokens and the base {base.head.vocab_size}: "
            "they do not share a tokenizer"
        )


def _identity(base: Base, expert: AnyExpert, windows: Sequence[Window], layers: tuple[int, ...], options: FitOptions) -> str:
    parts = base.name, base.vocabulary_hash, expert.name, fingerprint(windows), layers, options.positions, options.batch_size
    parts += (expert.width,) if expert.log_probs else ()
    heads = [float(r.weight.double().sum()) for r in (base.readout, expert.readout) if r.weight is not None]
    return repr((*parts, *heads))


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
