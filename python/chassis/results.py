"""A fit and its held-out scores as one JSON-able dictionary, the shape that `chassis.report` draws."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
import transformers

import chassis
from chassis.adapter import Adapter
from chassis.evaluate import Score, Scores, evaluate, passage
from chassis.experts import AnyExpert, ModelExpert
from chassis.finite import FiniteLogits
from chassis.fit import Base, FitResult, Progress
from chassis.port import BASE, Port, attach
from chassis.probes import Window
from chassis.routing import least_surprised, parse_route, surprise
from chassis_kernels import backends


def measure(base: Base, expert: AnyExpert, result: FitResult, progress: Progress | None = None) -> Scores:
    """Score every adapter and lens of a fit on its test windows."""
    test = result.windows["test"]
    report = progress or (lambda stage, done, total: None)
    names = {f"{kind}|{rank}": adapter for (kind, rank), adapter in result.adapters.items()}
    return evaluate(
        result.probe,
        test,
        base.readout,
        adapters=names,
        lens=result.lens,
        progress=lambda done: report("evaluate", done, len(test)),
    )


def summarise(
    base: Base, expert: AnyExpert, result: FitResult, scores: Scores, prompts: Sequence[str] = (), title: str = "chassis fit"
) -> dict:
    """Everything the report shows; KLs in nats per token, sizes in bytes, times in seconds."""
    options_rank = result.adapter.rank
    refinement = result.refinements.get(options_rank)
    chosen = scores.adapters[f"{'refined' if refinement else 'closed form'}|{options_rank}"]
    n_layers = len(base.head.blocks)
    return {
        "title": title,
        "base": base.name,
        "expert": expert.name,
        "vocabulary_hash": base.vocabulary_hash,
        "positions": result.probe.positions,
        "rank": options_rank,
        "refined": bool(refinement and refinement.kept),
        "data": _data(result.windows),
        "no_op": {"kl": scores.no_op.kl, "stderr": scores.no_op.stderr, "top1": scores.no_op.top1},
        "layers": [
            {"layer": layer, "name": "final" if layer == "final" else f"layer {layer} of {n_layers}"} | _kl(scores, score)
            for layer, score in scores.layers.items()
        ],
        "ranks": [_rank_row(name, scores, score, result) for name, score in scores.adapters.items()],
        "bits_per_byte": {
            "base": scores.no_op.bits_per_byte,
            "adapted": chosen.bits_per_byte,
            "expert": scores.expert.bits_per_byte,
            "gap_closed": scores.gap_closed(chosen),
        },
        "spectrum": result.closed.spectrum.tolist(),
        "start": result.closed.weights,  # shares of what a start through a bridge is made of
        "refinement": refinement.summary() if refinement else None,
        "seconds": result.seconds | {"total": sum(v for k, v in result.seconds.items() if not k.endswith("_forward"))},
        "memory": {"moments_bytes": result.closed.statistics.n_bytes},
        "generations": generations(base, expert, result.adapter, prompts),
        "passage": passage(result.probe, densest(result.windows["test"]), base.readout, result.adapter, base.tokenizer),
        "environment": environment(),
    }


def generations(base: Base, expert: AnyExpert, adapter: Adapter, prompts: Sequence[str], n_tokens: int = 48) -> list[dict]:
    """Greedy continuations of each prompt by the base, the adapted base and, if it is a model, the expert."""
    rows = []
    for prompt in prompts:
        row = {"prompt": prompt, "base": continuation(base.model, base.tokenizer, prompt, n_tokens)}
        with attach(base.model, adapter):
            row["adapted"] = continuation(base.model, base.tokenizer, prompt, n_tokens)
        if isinstance(expert, ModelExpert):
            row["expert"] = continuation(expert.model, base.tokenizer, prompt, n_tokens)
        rows.append(row)
    return rows


def continuation(model: torch.nn.Module, tokenizer, prompt: str, n_tokens: int, **options) -> str:
    """What `model` adds to `prompt`: greedy unless `options` for `generate` say otherwise.

    Raises ChassisError at a token whose logits are NaN or infinite.
    """
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    start = encoded["input_ids"].shape[1]
    options = {"do_sample": False, "max_new_tokens": n_tokens, "pad_token_id": tokenizer.pad_token_id} | options
    ids = model.generate(**encoded, logits_processor=[FiniteLogits([prompt], start)], **options)[0].tolist()
    whole, given = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids[:start]))
    return whole[len(given) :] if whole.startswith(given) else tokenizer.decode(ids[start:], skip_special_tokens=True)


def routed_generations(
    base: Base,
    adapters: Mapping[str, Adapter],
    prompts: Sequence[str],
    routes: Sequence[str],
    speak: Callable[[str], str],
) -> list[dict]:
    """What the base says to each prompt, and what the one it is routed to says; `speak` continues a prompt with the model.

    A route is a name of `adapters`, "base", weights such as code=0.7,docs=0.3, or "auto": whoever is least surprised.
    """
    rows = []
    with Port(base.model, base.tokenizer) as port:
        for name, adapter in adapters.items():
            port.plug(name, adapter)
        for prompt, wanted in zip(prompts, routes, strict=True):
            ids = base.tokenizer(prompt, return_tensors="pt")["input_ids"]
            surprises = surprise(base.model, base.head, adapters, ids)
            chosen = least_surprised(surprises) if wanted == "auto" else parse_route(wanted)
            port.route(BASE)
            row = {"prompt": prompt, "base": speak(prompt)}
            port.route(chosen)
            rows.append(row | {"adapted": speak(prompt), "route": chosen, "surprise": surprises})
    return rows


def densest(windows: Sequence[Window]) -> Window:
    """The full-length window whose tokens spell the most text: a passage worth reading."""
    return max(windows, key=lambda window: (len(window.ids), window.n_bytes, window.key))


def environment() -> dict:
    """What the numbers were measured on."""
    return {
        "chassis": chassis.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_isa": backends.cpu_isa(),
    }


def _kl(scores: Scores, score: Score) -> dict:
    return {"kl": score.kl, "stderr": score.stderr, "share_removed": scores.share_removed(score), "top1": score.top1}


def _rank_row(name: str, scores: Scores, score: Score, result: FitResult) -> dict:
    kind, rank = name.split("|")
    adapter = result.adapters[kind, int(rank)]
    return {
        "rank": int(rank),
        "kind": kind,
        "columns": None if adapter.cols is None else len(adapter.cols),
        **_kl(scores, score),
        "bits_per_byte": score.bits_per_byte,
        "gap_closed": scores.gap_closed(score),
        "parameters": adapter.n_parameters,
        "bytes": adapter.n_bytes,
    }


def _data(windows: dict[str, list[Window]]) -> dict:
    counts = {}
    for split, items in windows.items():
        counts[f"{split}_documents"] = len({window.document for window in items})
        counts[f"{split}_windows"] = len(items)
        counts[f"{split}_tokens"] = sum(len(window.ids) for window in items)
        counts[f"{split}_bytes"] = sum(window.n_bytes for window in items)
    return counts
