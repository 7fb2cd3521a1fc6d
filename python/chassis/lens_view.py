"""What each layer would say at each position of a text: top tokens, entropy, and the KL to what is said in the end.

Layers are read through a `Lens`, or, without one, as they are through final norm and unembedding (the logit lens).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from chassis.errors import ChassisError
from chassis.evaluate import token_texts
from chassis.experts import Readout
from chassis.files import write_folder
from chassis.fit import Base
from chassis.lens import FINAL, Lens
from chassis.models import Head, capture
from chassis.page import RAMP, Row, Table, colour, number, plain, print_tables, render

N_TOP = 5
CELL = 12  # characters of a position in the terminal


@torch.no_grad()
def view(base: Base, text: str, lens: Lens | None = None, expert=None, *, max_tokens: int = 128) -> dict:
    """Read `text` (its first `max_tokens` tokens) layer by layer; JSON-able results that `write_view` and `print_view` show.

    The end against which KL (in nats) is measured is the output of `expert`, the one the lens was fitted to; without one
    the model's own. Raises ChassisError for an empty text, or a lens of another model.
    """
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"][:, :max_tokens]
    if not ids.numel():
        raise ChassisError("the text has no tokens: give some to look at")
    layers = range(base.head.n_layers) if lens is None else [layer for layer in lens.layers if layer != FINAL]
    if unknown := [layer for layer in layers if layer > base.head.n_layers]:
        raise ChassisError(f"the lens has layers {unknown}, {base.name} only 0..{base.head.n_layers}: it is another model's")
    if lens is not None:
        lens.check_base(width=base.head.width, vocabulary_hash=base.vocabulary_hash)
    captured = capture(base.model, ids, layers=tuple(layers))
    to_expert = lens is not None and lens.config.target == "final"
    if to_expert and expert is None:
        raise ChassisError(f"this lens leads to {lens.config.expert!r}: give that expert too")
    readout = expert.readout if to_expert else base.readout
    end = expert.rows(ids, torch.ones_like(ids), captured.final) if to_expert else captured.final
    last = _log_probs(end[0], readout)
    rows = []
    for layer in layers:
        states = captured.layers[layer][0]
        if lens is not None:
            states = lens.hidden(layer, states)
        if not to_expert:
            states = _normed(base.head, states)
        rows.append(
            {"layer": layer, "name": _name(layer, base.head)} | _cells(_log_probs(states, readout), last, base.tokenizer)
        )
    if to_expert and FINAL in lens.layers:
        states = lens.hidden(FINAL, captured.final[0])
        rows.append({"layer": FINAL, "name": "final"} | _cells(_log_probs(states, readout), last, base.tokenizer))
    name = expert.name if to_expert else base.name
    rows.append({"layer": "end", "name": "said"} | _cells(last, last, base.tokenizer))
    kind = "logit lens" if lens is None else f"lens to {Path(name).name}"
    return {"title": "Layer by layer", "lens": kind, "base": base.name, "end": name,
            "tokens": token_texts(base.tokenizer, ids[0].tolist()), "layers": rows}  # fmt: skip


def print_view(results: dict, console) -> None:
    """The table of the last positions that fit, layers from the bottom up as text flows: the end is the last line."""
    results = plain(results)
    n_shown = max(1, min(len(results["tokens"]), (console.width - 26) // CELL))
    columns = ["after", "KL", "entropy", *(_short(token) for token in results["tokens"][-n_shown:])]
    rows = []
    for layer in results["layers"]:
        means = [number(layer["mean_kl"]), number(layer["mean_entropy"])]
        tokens = [_short(cell["top"][0]["token"]) for cell in layer["cells"][-n_shown:]]
        rows.append(Row([layer["name"], *means, *tokens], "chosen" if layer["layer"] == "end" else ""))
    title = f"Top token at the last {n_shown} of {len(results['tokens'])} positions ({results['lens']})"
    print_tables([Table(title, columns, rows)], console)


def write_view(results: dict, folder: str | Path) -> Path:
    """Write lens.html, which needs nothing but itself, and lens.json into `folder`; returns the path of the page."""
    results = plain(results)
    kls = sorted(cell["kl"] for row in results["layers"] for cell in row["cells"])
    top = max(kls[int(0.95 * (len(kls) - 1))], 0.1)
    grid = []
    for row in reversed(results["layers"]):
        cells = []
        for cell in row["cells"]:
            lines = [f"{item['token']!r} {item['p']:.1%}" for item in cell["top"]]
            tip = "\n".join([f"KL {cell['kl']:.3f}, entropy {cell['entropy']:.3f} nats", *lines])
            cells.append(cell | {"token": _visible(cell["top"][0]["token"]), "colour": colour(cell["kl"] / top), "tip": tip})
        grid.append(row | {"cells": cells})
    means = [
        Row([row["name"], number(row["mean_kl"]), number(row["mean_entropy"]), f"{row['agree']:.1%}".replace("%", " %")])
        for row in results["layers"]
    ]
    page = render(
        "lens.html",
        title=results["title"],
        r=results,
        grid=grid,
        given=[_visible(token) for token in results["tokens"]],
        top=f"{top:.1f}",
        tables=[Table("Layers, mean over positions", ["after", "KL", "entropy", "same top token"], means)],
        ramp=RAMP,
        notes=["KL and entropy in nats."],
    )
    return (
        write_folder(folder, {"lens.json": json.dumps(results, indent=2, allow_nan=False), "lens.html": page}) / "lens.html"
    )


def _normed(head: Head, states: Tensor) -> Tensor:
    return states if head.final_norm is None else head.final_norm(states.to(head.weight.dtype))


def _log_probs(states: Tensor, readout: Readout) -> Tensor:
    """[T, V] fp32."""
    logits = states.float()
    if readout.weight is not None:
        bias = None if readout.bias is None else readout.bias.float()
        logits = torch.nn.functional.linear(logits, readout.weight.float(), bias) * readout.scale
        logits = logits if readout.softcap is None else readout.softcap * torch.tanh(logits / readout.softcap)
    if not torch.isfinite(logits).all():
        raise ChassisError("the logits are NaN or infinite on this text: try dtype float32")
    return logits.log_softmax(-1)


def _cells(log_probs: Tensor, last: Tensor, tokenizer) -> dict:
    """Top tokens, entropy and KL at each position, and their means."""
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    kl = (last.exp() * (last - log_probs)).sum(-1).clamp_min(0)
    top = log_probs.topk(min(N_TOP, log_probs.shape[-1]))
    cells = []
    for position in range(len(log_probs)):
        pairs = zip(top.indices[position].tolist(), top.values[position].exp().tolist(), strict=True)
        tokens = [{"token": _text(tokenizer, index), "p": p} for index, p in pairs]
        cells.append({"top": tokens, "entropy": entropy[position].item(), "kl": kl[position].item()})
    agree = (log_probs.argmax(-1) == last.argmax(-1)).float().mean().item()
    return {"cells": cells, "mean_kl": kl.mean().item(), "mean_entropy": entropy.mean().item(), "agree": agree}


def _text(tokenizer, index: int) -> str:
    """A token as it reads after another one: alone it would lose its leading space."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    start, both = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (before, [*before, index]))
    return both[len(start) :] if both.startswith(start) else both


def _name(layer: int, head: Head) -> str:
    return "embedding" if layer == 0 else f"block {layer} of {head.n_layers}"


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _short(token: str) -> str:
    seen = _visible(token)
    return seen if len(seen) < CELL else seen[: CELL - 2] + "…"
