"""Where a tokenizer's tokens lie in a batch of texts, in bytes of UTF-8: what alignment works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from chassis.errors import ChassisError

ROLES = ("bos", "eos", "sep", "cls", "mask", "other")  # in a token's place: 1 + index; 0 is text
OUTSIDE = -1  # padding, and what belongs to no text that both sides share


class Spans(NamedTuple):
    """Tokens of a batch and the bytes they cover. Padding and positions outside the shared text have `end` -1."""

    ids: np.ndarray  # [B, T] int64, the padding token at padding
    mask: np.ndarray  # [B, T] bool: a token, not padding
    start: np.ndarray  # [B, T] int64 bytes before the token
    end: np.ndarray  # [B, T] int64
    role: np.ndarray  # [B, T] int8: 0 text, 1 + index into ROLES special
    unknown: np.ndarray  # [B, T] bool: the token does not say which text it stands for
    texts: tuple[bytes, ...]  # what the offsets count in


def text_spans(
    tokenizer,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    add_special_tokens: bool = True,
    padding_side: str = "right",
) -> Spans:
    """Tokenize `texts`, cut each to `max_length` tokens, pad the batch and find the bytes of each token.

    Raises ChassisError for a tokenizer that gives no offsets, and for text that UTF-8 cannot hold.
    """
    encodings = _encode(tokenizer, texts, add_special_tokens, max_length)
    places = [_utf8_ends(text) for text in texts]
    return _collect(tokenizer, encodings, texts, places, places, padding_side)


def chat_spans(
    tokenizer,
    chats: Sequence[Sequence[Mapping[str, str]]],
    *,
    max_length: int | None = None,
    padding_side: str = "right",
) -> Spans:
    """The same for conversations, through the tokenizer's own chat template.

    Offsets count in the messages' contents one after the other; what the template adds belongs to no shared text, so that
    two models align on the contents whatever their templates. Raises ChassisError where the template leaves a content out.
    """
    rendered, contents, starts, ends = [], [], [], []
    for chat in chats:
        texts = [text for message in chat if (text := message["content"].strip())]
        template = _template_parts(tokenizer, chat, texts)
        length = sum(map(len, template)) + sum(map(len, texts)) + 1
        start, end = np.full(length, OUTSIDE, dtype=np.int64), np.full(length, OUTSIDE, dtype=np.int64)
        cursor = base = 0
        for part, text in zip(template, texts, strict=False):
            # A token of the content may take in the template's white space before it.
            start[cursor + len(part.rstrip()) : cursor + len(part)] = base
            cursor += len(part)
            places = base + _utf8_ends(text)
            start[cursor : cursor + len(text)], end[cursor + 1 : cursor + len(text) + 1] = places[:-1], places[1:]
            cursor, base = cursor + len(text), int(places[-1])
        rendered.append("".join(a + b for a, b in zip(template, [*texts, ""], strict=True)))
        contents.append("".join(texts))
        starts.append(start)
        ends.append(end)
    encodings = _encode(tokenizer, rendered, False, max_length)
    spans = _collect(tokenizer, encodings, contents, starts, ends, padding_side)
    # Special tokens of a template stand between messages, where the other side's template may have none.
    outside = (spans.role > 0) | (spans.end < 0) | (spans.start < 0)
    return spans._replace(end=np.where(outside, OUTSIDE, spans.end), role=np.where(outside, 0, spans.role).astype(np.int8))


def _template_parts(tokenizer, chat: Sequence[Mapping[str, str]], texts: Sequence[str]) -> list[str]:
    """What the template writes before, between and after the contents, one string more than there are contents."""
    mark = "\ue000"  # a private-use character: no template writes it
    bare = [{**message, "content": mark if message["content"].strip() else ""} for message in chat]
    parts = tokenizer.apply_chat_template(bare, tokenize=False).split(mark)
    if len(parts) == len(texts) + 1:
        stripped = [{**message, "content": message["content"].strip()} for message in chat]
        if tokenizer.apply_chat_template(stripped, tokenize=False) == "".join(
            a + b for a, b in zip(parts, [*texts, ""], strict=True)
        ):
            return parts
    raise ChassisError(
        f"the chat template leaves out, repeats or rewrites a message's content (first message: {texts[:1]}): "
        "align plain texts instead"
    )


def _encode(tokenizer, texts: Sequence[str], add_special_tokens: bool, max_length: int | None) -> list:
    if not getattr(tokenizer, "is_fast", False):
        raise ChassisError(
            f"{type(tokenizer).__name__} is not a fast tokenizer and cannot say which text a token covers: "
            "load one with a tokenizer.json (AutoTokenizer converts most models)"
        )
    if max_length is not None and max_length < 1:
        raise ChassisError(f"max_length {max_length}: expected at least 1 token")
    if not len(texts):
        return []
    truncation = {"truncation": True, "max_length": max_length} if max_length else {}
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False, **truncation).encodings


def _collect(tokenizer, encodings, texts, starts, ends, padding_side: str) -> Spans:
    """Pad; `starts[i][c]` is the byte of a token that starts at character c of text i, or OUTSIDE; `ends` likewise."""
    if padding_side not in ("left", "right"):
        raise ChassisError(f"padding_side {padding_side!r}: expected 'left' or 'right'")
    roles = _special_roles(tokenizer)
    width = max((len(e.ids) for e in encodings), default=0)
    shape = len(encodings), width
    ids = np.full(shape, tokenizer.pad_token_id or 0, dtype=np.int64)
    mask, unknown = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    start, end = np.full(shape, OUTSIDE, dtype=np.int64), np.full(shape, OUTSIDE, dtype=np.int64)
    role = np.zeros(shape, dtype=np.int8)
    for row, (encoding, first, last) in enumerate(zip(encodings, starts, ends, strict=True)):
        n = len(encoding.ids)
        at = slice(0, n) if padding_side == "right" else slice(width - n, width)
        tokens, offsets = np.asarray(encoding.ids), np.asarray(encoding.offsets, dtype=np.int64).reshape(n, 2)
        ids[row, at], mask[row, at] = tokens, True
        special = np.asarray(encoding.special_tokens_mask, dtype=bool)
        kinds = np.where(special, len(ROLES), 0)
        for token, kind in roles.items():
            kinds[tokens == token] = kind
        # A special token added around the text has no place of its own: it stands where the text before it ends.
        placed = np.maximum.accumulate(np.where(kinds > 0, 0, offsets[:, 1])) if n else offsets[:, 1]
        start[row, at] = first[np.where(kinds > 0, placed, offsets[:, 0])]
        end[row, at] = last[np.where(kinds > 0, placed, offsets[:, 1])]
        role[row, at] = kinds
        unknown[row, at] = tokens == (-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id)
    unknown &= role == 0
    return Spans(ids, mask, start, end, role, unknown, tuple(_utf8(text) for text in texts))


def _special_roles(tokenizer) -> dict[int, int]:
    """Token id -> 1 + index into ROLES. The unknown token stands for text; a token with two roles has the first."""
    named = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES[:-1]}
    roles = {}
    for index, role in enumerate(ROLES[:-1]):
        if named[role] is not None:
            roles.setdefault(named[role], index + 1)
    return roles


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ChassisError(f"a text holds a lone surrogate at character {error.start}: it has no UTF-8 bytes") from error


def _utf8_ends(text: str) -> np.ndarray:
    """Byte at each character and at the end, [len(text) + 1] int64."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])
