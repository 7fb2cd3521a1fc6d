"""The two tokenizers of the testbed, trained on its text: one as SentencePiece-style models use, one as GPT-2's heirs do."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# A word with the mark of the space before it; of a longer run of spaces all but the last stay together.
WORDS = Regex("▁?[^▁\n]+|▁+(?=▁[^▁\n])|▁+|\n+")


def sentencepiece_style(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """BPE over text in which ▁ stands for a space, one leading space added, unknown characters spelled in byte tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(WORDS, "isolated")
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials + BYTES, limit_alphabet=120, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer = _plain_byte_tokens(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def byte_level(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """BPE over the bytes of the text; its only special token ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", padding_side="left")


def synthetic_bpe(n: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of n tokens by merges drawn at random: a vocabulary of any size in seconds."""
    rng = random.Random(seed)
    letters = list("etaoinshrdlucmfwypvbgk")
    vocab, merges = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
    words = [*letters, *("Ġ" + c for c in letters)]
    for word in words[len(letters) :]:
        vocab[word] = len(vocab)
        merges.append((word[0], word[1:]))
    while len(vocab) < n:
        left, right = rng.choice(words), rng.choice(letters)
        if left + right not in vocab and len(left) < 12:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
            words.append(left + right)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _plain_byte_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Take the byte tokens off the list of special ones, where the trainer puts them and raw text would match them."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in set(BYTES)]
    return Tokenizer.from_str(json.dumps(state))
