"""Small tokenizers and made-up experts for tests of the bridge."""

import numpy as np
import torch
from chassis.bridge.pretokens import FOLLOWING
from chassis.text.token_bytes import TokenBytes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def bpe(alphabet: str, *merges: tuple[str, str]) -> TokenBytes:
    """BPE over these characters with these merges, each of the characters a byte."""
    merges = [(a.replace(" ", "Ġ"), b.replace(" ", "Ġ")) for a, b in merges]
    pieces = [*alphabet.replace(" ", "Ġ"), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenBytes.from_tokenizer(tokenizer, check=False)


def random_logits(plan, width, seed=0):
    """Logits that depend on the tokens that lead to a node alone."""
    rows = [torch.Generator().manual_seed(hash((seed, *plan.tree.path(node))) % 2**62) for node in range(len(plan.tree))]
    return torch.stack([2 * torch.randn(width, generator=g) for g in rows])


def encodings(expert, data):
    """Of a beginning of a piece, before each of FOLLOWING."""
    found = set()
    for after in FOLLOWING:
        encoded = expert.encode(data.decode() + after)
        n = int(np.searchsorted(encoded.ends, len(data), side="right"))
        if sum(expert.lengths[encoded.ids[:n]]) == len(data):
            found.add(tuple(encoded.ids[:n].tolist()))
    return found
