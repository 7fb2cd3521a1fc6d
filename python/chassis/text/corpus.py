"""Documents from files, folders, JSON lines, Parquet and the hub, and a split of them by hash.

A document's id is the hash of its text, and its split is a hash of its id. So an exact copy is the same document wherever
it was found, and adding, removing or reordering documents never moves another one to a different split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from chassis.errors import DataError

PLAIN_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*PLAIN_SUFFIXES, ".jsonl", ".parquet")
HUB_PREFIX = "hf://"
DEFAULT_FRACTIONS = {"fit": 0.8, "validation": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Document:
    """One text with the hash that names it and the place it was read from."""

    id: str
    text: str
    source: str

    @classmethod
    def from_text(cls, text: str, source: str) -> Document:
        return cls(document_id(text), text, source)


def document_id(text: str) -> str:
    """16 hexadecimal digits: the BLAKE2b hash of the text's UTF-8 bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class Documents:
    """Documents read lazily, exact copies dropped; every `iter()` reads the sources again.

    `duplicates` and `blank` count, for the latest pass, the documents left out because their text had been seen
    and because it held nothing but white space.
    """

    def __init__(self, sources: list[str], text_column: str, split: str, limit: int | None):
        self.sources, self.text_column, self.split, self.limit = sources, text_column, split, limit
        self.duplicates = self.blank = 0

    def __iter__(self) -> Iterator[Document]:
        self.duplicates = self.blank = 0
        seen: set[str] = set()
        for source in self.sources:
            for text, origin in _read(source, self.text_column, self.split):
                if not text or text.isspace():
                    self.blank += 1
                    continue
                document = Document.from_text(text, origin)
                if document.id in seen:
                    self.duplicates += 1
                    continue
                seen.add(document.id)
                yield document
                if len(seen) == self.limit:
                    return
        if not seen:
            raise DataError(f"no documents in {', '.join(self.sources)}: {self.blank} were blank; give text to read")


def load_documents(
    source: str | Path | Iterable[str | Path],
    *,
    text_column: str = "text",
    split: str = "train",
    limit: int | None = None,
) -> Documents:
    """Open one source or several: paths to .txt, .md, .py (a document per file), .jsonl, .parquet (a document per row),
    folders of those (searched through), or `hf://owner/name[:config]` (streamed by the `datasets` library).

    `text_column` names the text in JSON lines, Parquet and hub rows; `split` is the hub split; `limit` stops after that many
    documents. Raises DataError at once for a path that does not exist or is of an unknown kind, and while reading for
    empty files, bytes that are not UTF-8, a text column that is absent, an unreachable hub, or no documents at all.
    """
    given = [source] if isinstance(source, str | Path) else list(source)
    if not given:
        raise DataError("no source of documents was given: name a file, a folder or hf://owner/name")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: expected at least one document, or None for all of them")
    sources = [path for item in given for path in _expand(str(item))]
    return Documents(sources, text_column, split, limit)


def split_of(document_id: str, fractions: Mapping[str, float] = DEFAULT_FRACTIONS, salt: str = "") -> str:
    """Name of the split a document belongs to, by hash of its id alone; `fractions` maps names to shares that sum to 1."""
    total = sum(fractions.values())
    if not fractions or min(fractions.values()) < 0 or abs(total - 1) > 1e-6:
        raise DataError(f"split fractions {dict(fractions)} sum to {total:g}: expected shares >= 0 that sum to 1")
    digest = hashlib.blake2b(f"{salt}\0{document_id}".encode(), digest_size=8).digest()
    position, edge = int.from_bytes(digest, "big") / 2**64, 0.0
    names = [name for name, share in fractions.items() if share > 0]
    for name in names:
        edge += fractions[name]
        if position < edge:
            return name
    return names[-1]


def split_documents(
    documents: Iterable[Document], fractions: Mapping[str, float] = DEFAULT_FRACTIONS, salt: str = ""
) -> dict[str, list[Document]]:
    """Documents by split, in the order they came; every name in `fractions` is a key, its list empty if none fell there."""
    splits: dict[str, list[Document]] = {name: [] for name in fractions}
    for document in documents:
        splits[split_of(document.id, fractions, salt)].append(document)
    return splits


def _expand(source: str) -> list[str]:
    if source.startswith(HUB_PREFIX):
        return [source]
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"{source}: no such file or folder (for a dataset on the hub write hf://owner/name)")
    if path.is_dir():
        found = sorted(str(p) for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file() and p.stat().st_size)
        if not found:
            raise DataError(f"{source}: no documents in this folder; looked for files ending in {', '.join(SUFFIXES)}")
        return found
    if path.suffix not in SUFFIXES:
        raise DataError(f"{source}: unknown kind of file; expected one ending in {', '.join(SUFFIXES)}")
    if not path.stat().st_size:
        raise DataError(f"{source}: the file is empty")
    return [str(path)]


def _read(source: str, text_column: str, split: str) -> Iterator[tuple[str, str]]:
    """(text, origin) pairs of one source."""
    if source.startswith(HUB_PREFIX):
        return _read_hub(source, text_column, split)
    if source.endswith(".jsonl"):
        return _read_jsonl(source, text_column)
    if source.endswith(".parquet"):
        return _read_parquet(source, text_column)
    return iter([(_decode(Path(source).read_bytes(), source, 0), source)])


def _decode(data: bytes, source: str, offset: int) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"{source}: byte 0x{data[error.start]:02x} at offset {at} is not UTF-8; convert the file to UTF-8 first"
        ) from error


def _text_of(row: object, text_column: str, origin: str) -> str:
    columns = sorted(row) if isinstance(row, Mapping) else []
    if text_column not in columns:
        raise DataError(_no_column(origin, text_column, columns))
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{origin}: column {text_column!r} holds {type(text).__name__}, expected a string")
    return text or ""


def _no_column(origin: str, text_column: str, columns: list[str]) -> str:
    present = ", ".join(map(repr, columns)) or "none"
    return f"{origin}: no text column {text_column!r}; the columns present are {present} (choose one with text_column)"


def _read_jsonl(source: str, text_column: str) -> Iterator[tuple[str, str]]:
    offset = 0
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            origin = f"{source}:{number}"
            text = _decode(line, source, offset)
            offset += len(line)
            if text.isspace() or not text:
                continue
            try:
                row = json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                raise DataError(f"{origin}: not JSON ({error.msg} at column {error.colno})") from error
            yield _text_of(row, text_column, origin), origin


def _read_parquet(source: str, text_column: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise DataError(_no_column(source, text_column, columns))
            rows = (row for batch in file.iter_batches(columns=[text_column]) for row in batch.to_pylist())
            for number, row in enumerate(rows):
                origin = f"{source}:{number}"
                yield _text_of(row, text_column, origin), origin
    except pyarrow.ArrowException as error:
        raise DataError(f"{source}: not a readable Parquet file ({error})") from error


def _read_hub(source: str, text_column: str, split: str) -> Iterator[tuple[str, str]]:
    from datasets import load_dataset

    name, _, config = source.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise DataError(f"{source}: expected hf://owner/name or hf://owner/name:config")
    try:
        for number, row in enumerate(load_dataset(name, config or None, split=split, streaming=True)):
            origin = f"{source}/{split}:{number}"
            yield _text_of(row, text_column, origin), origin
    except DataError:
        raise
    except Exception as error:  # the network, the hub and the readers of many formats each raise their own kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{source}: cannot read split {split!r} from the hub ({reason[0]}). Check the name, the split, the network and, "
            "for a private dataset, your login; or download the data and give the path to its .jsonl or .parquet files"
        ) from error
