"""Tables that need no text: from the bytes of an expert token to base tokens.

* exact: the base token with the same bytes, nothing where there is none;
* two_segment: the same, and half to each of two base tokens that spell the token together;
* longest_prefix: the longest base token that the bytes begin with;
* canonical: the first token of the base's encoding of the bytes.

Special tokens go to the base token of the same role, whatever the method.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from chassis.text.token_bytes import TokenBytes
from chassis_kernels import BridgeTable

METHODS = ("exact", "two_segment", "longest_prefix", "canonical")


def string_table(method: str, expert: TokenBytes, base: TokenBytes, strings: Sequence[bytes]) -> BridgeTable:
    """M [rows, V_B] by one of METHODS; `strings` are the rows' bytes, the expert's tokens first."""
    own = base.ids_by_bytes
    rows: list[int] = []
    ids: list[int] = []
    weights: list[float] = []
    if method == "canonical":
        first = first_tokens(base, strings)
        rows, ids = np.flatnonzero(first >= 0).tolist(), first[first >= 0].tolist()
        weights = [1.0] * len(rows)
    elif method == "longest_prefix":
        for row, data in enumerate(strings):
            index = longest_prefix(own, data)
            if index is not None:
                rows.append(row), ids.append(index), weights.append(1.0)
    else:
        segments = encodings(base, strings) if method == "two_segment" else [None] * len(strings)
        for row, (data, parts) in enumerate(zip(strings, segments, strict=True)):
            if data in own:
                rows.append(row), ids.append(own[data][0]), weights.append(1.0)
            elif parts is not None and len(parts) == 2:
                rows += [row, row]
                ids += parts
                weights += [0.5, 0.5]
    for index, target in special_pairs(expert, base).items():
        rows.append(index), ids.append(target), weights.append(1.0)
    entries = torch.tensor(rows, dtype=torch.long), torch.tensor(ids, dtype=torch.long), torch.tensor(weights)
    return BridgeTable.from_entries(*entries, (len(strings), base.width), n_expert=expert.width)


def special_pairs(expert: TokenBytes, base: TokenBytes) -> dict[int, int]:
    """Base token of each special expert token that has a counterpart: of the same role, else of the same name."""
    named = {base.content[i]: i for i, role in enumerate(base.role_of) if role not in (None, "padding")}
    pairs = {}
    for index, role in enumerate(expert.role_of):
        if role in (None, "padding"):
            continue
        target = base.roles.get(role, named.get(expert.content[index]))
        if target is None and role == "eot":
            target = base.roles.get("eos")
        if target is not None and base.role_of[target] is not None:
            pairs[index] = target
    return pairs


def encodings(base: TokenBytes, strings: Sequence[bytes]) -> list[list[int] | None]:
    """The base's encoding of each string; None for what is no text (part of a character) or not spelled by it."""
    texts = [_text(data) for data in strings]
    known = [row for row, text in enumerate(texts) if text]
    found: list[list[int] | None] = [None] * len(strings)
    for row, ids in zip(known, base.ids_of([texts[row] for row in known]), strict=True):
        if b"".join(base.bytes[i] for i in ids) == strings[row]:
            found[row] = ids
    return found


def first_tokens(base: TokenBytes, strings: Sequence[bytes]) -> np.ndarray:
    """First token [n] of the base's encoding of each string, -1 for none.

    A string that breaks off inside a character is encoded up to there; one that begins inside a character gets the longest
    token it begins with, or, if there is none, the first that begins with it.
    """
    own, ordered = base.ids_by_bytes, None
    first = np.full(len(strings), -1, dtype=np.int64)
    whole = [_whole(data) for data in strings]
    for row, (ids, data) in enumerate(zip(encodings(base, whole), strings, strict=True)):
        if ids:
            first[row] = ids[0]
        elif data:
            index = longest_prefix(own, data)
            if index is None:
                from chassis.bridge.leaves import prefix_range

                ordered = sorted(own) if ordered is None else ordered
                low, high = prefix_range(ordered, data)
                index = own[ordered[low]][0] if low < high else -1
            first[row] = index
    return first


def longest_prefix(own: dict[bytes, list[int]], data: bytes) -> int | None:
    for end in range(len(data), 0, -1):
        if data[:end] in own:
            return own[data[:end]][0]
    return None


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _whole(data: bytes) -> bytes:
    """The characters that `data` begins with and that are all there."""
    try:
        data.decode()
        return data
    except UnicodeDecodeError as error:
        return data[: error.start]
