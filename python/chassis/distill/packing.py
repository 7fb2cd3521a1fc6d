"""Documents joined into samples of about the same length, so that few positions are padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from chassis.errors import ChassisError
from chassis.text.corpus import Document


def pack(documents: Iterable[Document], length: int, by: str = "characters", tokenizer=None) -> Iterator[str]:
    """Texts of at most `length` characters, or tokens of `tokenizer`, joined by newlines; longer documents are cut.

    A cut falls behind the last line end that fits, else behind the last character or token that does. Raises ChassisError
    for an unknown unit.
    """
    if by not in ("characters", "tokens") or (by == "tokens" and tokenizer is None):
        raise ChassisError(f"packing by {by!r}: expected characters, or tokens and a tokenizer")
    ends = _character_ends if by == "characters" else _token_ends(tokenizer)
    parts: list[str] = []
    used = 0
    for document in documents:
        text = document.text
        while text:
            at = ends(text)
            size = len(at)
            if used and used + 1 + size > length:
                yield "\n".join(parts)
                parts, used = [], 0
            if size <= length:
                parts.append(text)
                used += size + bool(used)
                break
            cut = at[length - 1]
            line = text.rfind("\n", 1, cut)
            cut = line + 1 if line > 0 else cut
            yield text[:cut].removesuffix("\n")
            text = text[cut:]
    if parts:
        yield "\n".join(parts)


def _character_ends(text: str) -> range:
    return range(1, len(text) + 1)


def _token_ends(tokenizer) -> Callable[[str], list[int]]:
    """The character at which each token of a text ends; at least one a token, so that cutting makes progress."""

    def ends(text: str) -> list[int]:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [max(stop, 1) for _, stop in found["offset_mapping"]]

    return ends
