"""Tables by decoded strings, the way vocabularies are usually compared: here to be measured beside tables by bytes.

A token is the string that `decode([id])` gives. Alone, a SentencePiece-style token loses its leading space and a byte-level
one does not; parts of characters all become U+FFFD; special tokens match by their spelling. Nothing is known of positions
inside a token or of what cannot follow, and what found no counterpart is scaled away.

* exact: the base token of the same string, of several the last;
* two_segment: the same, and half to each of two tokens that the base's own encoding of the string has.
"""

from __future__ import annotations

import numpy as np
import torch

from chassis.bridge.bridge import Bridge
from chassis.bridge.leaves import Leaves
from chassis.text.token_bytes import TokenBytes
from chassis_kernels import BridgeTable

METHODS = {"exact": "exact, by decode", "two_segment": "two_segment, by decode"}


def decoded_bridge(method: str, expert: TokenBytes, base: TokenBytes, tokenizers: tuple) -> Bridge:
    """The bridge of a name in METHODS; `tokenizers`: the expert's and the base's of transformers."""
    one, other = tokenizers
    ids = {other.decode([i]): i for i in range(base.n_tokens) if i in base.content}
    entries: list[tuple[int, int, float]] = []
    for index in range(expert.n_tokens):
        text = one.decode([index]) if index in expert.content else ""
        parts = other.encode(text, add_special_tokens=False) if method == "two_segment" and text not in ids else []
        if text in ids:
            entries.append((index, ids[text], 1.0))
        elif len(parts) == 2:
            entries += [(index, part, 0.5) for part in parts]
    rows, columns, weights = (np.array(column) for column in zip(*entries, strict=True)) if entries else (np.zeros(0),) * 3
    leaves = Leaves(expert)
    table = BridgeTable.from_entries(
        torch.from_numpy(rows).long(),
        torch.from_numpy(columns).long(),
        torch.from_numpy(weights).float(),
        (len(leaves), base.width),
        n_expert=expert.width,
    )
    unigram = torch.full((base.width,), 1 / base.width, dtype=torch.float64)
    return Bridge(expert, base, METHODS[method], table, leaves, unigram)
