"""From what is typed to what the library takes: models, experts, documents, numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from chassis.errors import ChassisError

BIAS_PREFIX = "bias:"
BYTES_PER_TOKEN = 8  # generous: reading stops once there is surely enough text


def load_base(name: str, dtype: str | None, device: str):
    """The base as `chassis.fit.Base`."""
    from chassis.fit import Base

    model, tokenizer = _load(name, dtype, device)
    return Base(model, tokenizer, name)


def load_expert(spec: str, base, dtype: str | None, device: str):
    """A checkpoint by name or folder, or `bias:word=2.5,other=-3`, or `bias:{"word": 2.5}` for strings with commas."""
    from chassis.experts import LogitBiasExpert, ModelExpert
    from chassis.models import inspect_head, vocabulary_hash

    if spec.startswith(BIAS_PREFIX):
        return LogitBiasExpert.from_strings(base.head, base.tokenizer, parse_bias(spec), spec)
    model, tokenizer = _load(spec, dtype, device)
    if vocabulary_hash(tokenizer) != base.vocabulary_hash:
        raise ChassisError(
            f"the expert {spec} has another vocabulary ({len(tokenizer)} tokens) than the base {base.name} "
            f"({len(base.tokenizer)} tokens): an adapter needs an expert with the base's tokenizer"
        )
    return ModelExpert(model, inspect_head(model), spec)


def parse_bias(spec: str) -> dict[str, float]:
    """`bias:a=1,b=-2` or `bias:{"a": 1, "b": -2}` -> {string: added to its logit}."""
    text = spec.removeprefix(BIAS_PREFIX).strip()
    expected = f"expected {BIAS_PREFIX}word=2.5,other=-3 or {BIAS_PREFIX}" + '{"word": 2.5, "other": -3}'
    try:
        if text.startswith("{"):
            edits = json.loads(text)
        else:
            edits = dict(part.rsplit("=", 1) for part in text.split(","))
        edits = {str(key): float(value) for key, value in edits.items()}
    except (ValueError, TypeError) as error:
        raise ChassisError(f"expert {spec!r} cannot be read: {expected}") from error
    if not edits or "" in edits:
        raise ChassisError(f"expert {spec!r} names no token: {expected}")
    return edits


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
    limit = None if max_tokens is None else int(max_tokens * BYTES_PER_TOKEN / shares["fit"])
    opened = {"validation": validation, "test": test}
    options = {"text_column": text_column, "split": split}
    sources = {name: load_documents(paths, **options) for name, paths in opened.items() if paths}
    documents = split_documents(_take(load_documents(data, **options), limit), shares)
    return documents | {name: list(_take(source, limit)) for name, source in sources.items()}


def read_all(data: Sequence[str], *, text_column: str, split: str, max_tokens: int | None) -> list:
    """All documents of `data`, or enough of them for `max_tokens`."""
    from chassis.text.corpus import load_documents

    limit = None if max_tokens is None else max_tokens * BYTES_PER_TOKEN
    return list(_take(load_documents(data, text_column=text_column, split=split), limit))


def parse_layers(text: str) -> str | tuple[int, ...]:
    """"all", "none" or "0,4,8"."""
    return text if text in ("all", "none") else parse_numbers("layers", text, "all, none or numbers such as 0,4,8")


def parse_numbers(name: str, text: str, expected: str) -> tuple[int, ...]:
    """Comma-separated whole numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ChassisError(f"{name} {text!r}: expected {expected}") from error


def adapter_and_base(folder: Path, base: str | None, dtype: str | None, device: str):
    """The adapter in `folder` and the base it was fitted on, or the one named."""
    from chassis.adapter import Adapter

    adapter = Adapter.load(folder)
    loaded = load_base(base or adapter.config.base, dtype, device)
    adapter.check_base(
        width=loaded.head.width, vocab_size=loaded.head.vocab_size, vocabulary_hash=loaded.vocabulary_hash
    )
    return adapter, loaded


def prompts(tokenizer, windows: Sequence, count: int = 3, length: int = 16) -> list[str]:
    """How some of the held-out documents begin."""
    first = {window.document: window for window in reversed(windows) if len(window.ids) > length}
    texts = [tokenizer.decode(window.ids[:length], skip_special_tokens=True) for window in first.values()]
    texts = [text for text in texts if text.strip()]
    return texts[:: max(1, len(texts) // count)][:count]


def _load(name: str, dtype: str | None, device: str):
    import torch
    from transformers.utils import logging

    from chassis.models import load_causal_lm

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ChassisError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return load_causal_lm(name, dtype=dtype, device=device)


def _take(documents: Iterable, limit: int | None) -> Iterable:
    """Documents until `limit` bytes of text have been given."""
    given = 0
    for document in documents:
        yield document
        given += len(document.text.encode())
        if limit is not None and given >= limit:
            return
