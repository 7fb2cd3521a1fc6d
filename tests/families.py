"""A tokenizer of every family, trained on the spot."""

import json

from chassis.testbed import tokenizers as testbed
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BYTES = testbed.BYTES
TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the dog's tail wags. " * 3,
    "def function(self, x):\n    return x + 1\n\n\nclass Name(object):\n    pass\n",
    "naïve café, ΑΒΓ αβγ; привет мир! 日本語のテキスト 한국어 🙂\t\ttabs\r\nlines",
    "isn't don't we'll 1234567890 3.14 http://a.b/c?d=e&f …—“”",
] * 4


def byte_level(vocab_size: int = 400, **options) -> PreTrainedTokenizerFast:
    """GPT-2's kind; `normalizer`, `prefix_space`, `pattern` (a pre-tokenizer in place of GPT-2's), `specials`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=options.get("ignore_merges", False)))
    tokenizer.normalizer = options.get("normalizer")
    level = pre_tokenizers.ByteLevel(add_prefix_space=options.get("prefix_space", False), use_regex="pattern" not in options)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([options["pattern"], level]) if "pattern" in options else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=options.get("specials", ["<|endoftext|>"]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(options.get("texts", TEXTS), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def sentencepiece_bpe(vocab_size: int = 460) -> PreTrainedTokenizerFast:
    """Llama-2's kind: ▁ by normalizer, byte fallback."""
    return testbed.sentencepiece_style(TEXTS, vocab_size)


def metaspace_bpe(scheme: str = "always", vocab_size: int = 460) -> PreTrainedTokenizerFast:
    """▁ by pre-tokenizer; the byte tokens listed as special added ones, as some conversions leave them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>", *BYTES], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram(vocab_size: int = 460) -> PreTrainedTokenizerFast:
    """Unigram with byte fallback and ▁ by pre-tokenizer."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - 256, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] += [[piece, -20.0] for piece in BYTES]
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wordpiece(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """BERT's kind, which forgets white space."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=["[UNK]", "[SEP]", "[PAD]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]", pad_token="[PAD]")


def add(tokenizer: PreTrainedTokenizerFast, *contents: str, special: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer with these added tokens."""
    tokenizer.add_tokens([AddedToken(c, special=special, normalized=False) for c in contents], special_tokens=special)
    return tokenizer


FAMILIES = {
    "byte_level": byte_level,
    "byte_level_nfc": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte_level_prefix_space": lambda: byte_level(prefix_space=True),
    "byte_level_ignore_merges": lambda: byte_level(ignore_merges=True),
    "sentencepiece_bpe": sentencepiece_bpe,
    "metaspace_always": metaspace_bpe,
    "metaspace_first": lambda: metaspace_bpe("first"),
    "metaspace_never": lambda: metaspace_bpe("never"),
    "unigram": unigram,
}
