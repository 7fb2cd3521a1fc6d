"""From what is typed to what the library takes: models, experts, documents, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from chassis.errors import ChassisError

BYTES_PER_TOKEN = 8  # generous: reading a hub dataset stops once there is surely enough text


def load_base(name: str, dtype: str | None, device: str):
    """The base as `chassis.fit.Base`."""
    from chassis.fit import Base

    model, tokenizer = load_model(name, dtype, device)
    return Base(model, tokenizer, name)


def load_expert(spec: str, base, dtype: str | None, device: str, bridge: str | None = None, texts: Sequence[str] = ()):
    """What `spec` names, as `chassis.experts.load_expert` reads it, for this base; with `bridge`, a model with any tokenizer
    read through that file, or through a bridge counted on `texts` ("auto")."""
    from chassis import experts

    if bridge is not None:
        from chassis.bridge.loading import Side, bridge_for, bridged_expert

        sides = Side(base.model, base.tokenizer, base.name), Side(*load_model(spec, dtype, device), spec)
        return bridged_expert(*sides, bridge_for(*sides, bridge, texts))
    return experts.load_expert(spec, base.head, base.tokenizer, dtype=dtype, device=device)


def read_documents(
    data: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
    *,
    text_column: str,
    split: str,
    max_tokens: int | None,
) -> dict[str, list]:
    """Documents for "fit", "validation" and "test"; what has no source of its own is split off `data` by hash."""
    from chassis.text.corpus import load_documents, split_documents

    shares = {"validation": 0.0 if validation else 0.1, "test": 0.0 if test else 0.1}
    shares["fit"] = 1 - sum(shares.values())
    options = {"text_column": text_column, "split": split}
    own = {"validation": validation, "test": test}
    opened = {name: load_documents(paths, **options) for name, paths in own.items() if paths}
    wanted = None if max_tokens is None else int(max_tokens / shares["fit"])
    documents = split_documents(read_all(data, **options, max_tokens=wanted), shares)
    return documents | {name: list(source) for name, source in opened.items()}


def read_all(data: Sequence[str], *, text_column: str, split: str, max_tokens: int | None) -> list:
    """All documents of `data`; of hub datasets, which may have no end, enough for `max_tokens`."""
    from chassis.text.corpus import HUB_PREFIX, load_documents

    documents = load_documents(data, text_column=text_column, split=split)
    if max_tokens is None or not all(source.startswith(HUB_PREFIX) for source in data):
        return list(documents)
    return list(_take(documents, max_tokens * BYTES_PER_TOKEN))


def parse_layers(text: str) -> str | tuple[int, ...]:
    """Which layers `all`, `none` or `0,4,8` means."""
    return text if text in ("all", "none") else parse_numbers("layers", text, "all, none or numbers such as 0,4,8")


def parse_numbers(name: str, text: str, expected: str) -> tuple[int, ...]:
    """Comma-separated whole numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ChassisError(f"{name} {text!r}: expected {expected}") from error


def adapter_and_base(folder: Path, base: str | None, dtype: str | None, device: str):
    """The adapter in `folder` and the base it was fitted on, or the one named."""
    adapters, loaded = adapters_and_base({"": folder}, base, dtype, device)
    adapter = adapters[""]
    adapter.check_base(width=loaded.head.width, vocab_size=loaded.head.vocab_size, vocabulary_hash=loaded.vocabulary_hash)
    adapter.check_finite()
    return adapter, loaded


def adapters_and_base(folders: Mapping[str, Path], base: str | None, dtype: str | None, device: str):
    """The adapters {name: folder} and the one base they were fitted on, or the one named."""
    from chassis.adapter import Adapter

    adapters = {name: Adapter.load(folder) for name, folder in folders.items()}
    bases = sorted({adapter.config.base for adapter in adapters.values()})
    if base is None and len(bases) > 1:
        raise ChassisError(
            f"the adapters were fitted on different bases ({', '.join(bases)}): plug those of one, or give --base"
        )
    return adapters, load_base(base or bases[0], dtype, device)


def mixture(plug: Sequence[str], route: str):
    """The linear composition `route`, such as code=0.7,docs=0.3, of the adapters of `plug` as one adapter."""
    from chassis.adapter import Adapter, combine
    from chassis.routing import parse_route

    adapters = {name: Adapter.load(folder) for name, folder in plugs(plug).items()}
    weights = parse_route(route)
    weights = {weights: 1.0} if isinstance(weights, str) else weights
    if unknown := [name for name in weights if name not in adapters]:
        raise ChassisError(f"--route {route}: no --plug named {', '.join(unknown)}; plugged: {', '.join(adapters)}")
    return combine([(weight, adapters[name]) for name, weight in weights.items()])


def plugs(texts: Sequence[str]) -> dict[str, Path]:
    """What `code=out1` and its like name; raises ChassisError for anything else, and for a name given twice."""
    pairs = [text.partition("=") for text in texts]
    named = {name: Path(folder) for name, _, folder in pairs}
    if len(named) != len(pairs) or not all(name and folder for name, _, folder in pairs):
        raise ChassisError(f"--plug {' --plug '.join(texts)}: expected name=folder, each name once")
    return named


def prompts(tokenizer, windows: Sequence, count: int = 3, length: int = 16) -> list[str]:
    """Openings of windows of some held-out documents."""
    first = {window.document: window for window in reversed(windows) if len(window.ids) > length}
    texts = [tokenizer.decode(window.ids[:length], skip_special_tokens=True) for window in first.values()]
    texts = [text for text in texts if text.strip()]
    return texts[:: max(1, len(texts) // count)][:count]


def quiet() -> None:
    """Keep transformers' own progress bars and advice off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(name: str, dtype: str | None, device: str):
    """Model and tokenizer; ChassisError for a device that cannot be used here."""
    import torch

    from chassis.models import load_causal_lm

    quiet()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ChassisError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return load_causal_lm(name, dtype=dtype, device=device)


def _take(documents: Iterable, n_bytes: int) -> Iterable:
    """Documents until `n_bytes` of text have been given."""
    given = 0
    for document in documents:
        yield document
        given += len(document.text.encode())
        if given >= n_bytes:
            return
