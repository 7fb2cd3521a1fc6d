"""Real text on every machine: the source, docstrings and documentation topics of the running Python's standard library.

A document of *source* is one module; a document of *prose* is one documentation topic or all docstrings of one module.
A module's docstrings always fall in the split of the module itself, and text that repeats earlier text is dropped before
splitting, so that nothing held out has a near copy among what a model was trained on.
"""

from __future__ import annotations

import ast
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from chassis.text.corpus import Document, split_of

SPLITS = {"train": 0.5, "fit": 0.3, "validation": 0.07, "test": 0.13}
SALT = "testbed"
# Not part of every installation, or tables rather than text.
EXCLUDED = set("site-packages dist-packages __pycache__ test tests idlelib encodings pydoc_data ensurepip".split())
MIN_CHARACTERS, MAX_CHARACTERS = 800, 32_000
MAX_REPEATED = 0.2  # share of a module's lines that earlier modules may already hold


def standard_library() -> dict[str, dict[str, list[Document]]]:
    """Documents by domain ("source", "prose") and split ("train", "fit", "validation", "test"), in order of their ids."""
    source, prose = [], []
    docstrings: dict[str, tuple[str, str]] = {}
    for name, text in _modules():
        document = Document.from_text(_shorten(text), f"stdlib:{name}")
        source.append(document)
        docstrings[document.id] = (_docstrings(text), f"docstrings:{name}")
    source = _without_repeats(source)
    for document in source:
        prose.append((document.id, *docstrings[document.id]))
    for name, text in _topics():
        document = Document.from_text(text, f"topic:{name}")
        prose.append((document.id, document.text, document.source))

    splits: dict[str, dict[str, list[Document]]] = {d: {s: [] for s in SPLITS} for d in ("source", "prose")}
    for document in source:
        splits["source"][split_of(document.id, SPLITS, SALT)].append(document)
    seen: set[str] = set()
    for key, text, origin in sorted(prose):
        text = _shorten(_new_paragraphs(text, seen))
        if len(text) >= MIN_CHARACTERS:
            splits["prose"][split_of(key, SPLITS, SALT)].append(Document.from_text(text, origin))
    return splits


def _modules() -> Iterator[tuple[str, str]]:
    """(name, text) of the library's modules that are valid UTF-8 and long enough to be a document."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED & set(name.parts[:-1]) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        if len(text) >= MIN_CHARACTERS:
            yield name.as_posix(), text


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from topics.items()


def _docstrings(text: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except SyntaxError:
        return ""
    holders = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders))
    return "\n\n".join(text.strip() for text in found if text)


def _without_repeats(documents: list[Document]) -> list[Document]:
    """Leave out documents of which too many lines stand in documents that come before them in order of id."""
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda d: d.id):
        lines = [line for line in map(str.strip, document.text.splitlines()) if len(line) > 20]
        if sum(line in seen for line in lines) <= MAX_REPEATED * len(lines):
            kept.append(document)
            seen.update(lines)
    return kept


def _new_paragraphs(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split()).lower()
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def _shorten(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return text[: text.rfind("\n", 0, MAX_CHARACTERS) + 1]
