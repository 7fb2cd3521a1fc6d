"""Short texts that show what a tokenizer does to spaces, line ends, scripts and characters of several bytes."""

from itertools import product

PARTS = (
    "The quick brown fox", "jumps", "isn't", "don't we'll", "x = f(a, b)[0]", "1234567890", "3.14", "ΑΒΓ αβγ", "naïve café",
    "日本語のテキスト", "한국어", "привет мир", "שלום", "مرحبا", "🙂", "👩‍👩‍👧", "𝔘𝔫𝔦", "e\u0301", "ﬁ ½ ²", "…—“”",
    "<s></s>", "<unk>", "<|endoftext|>", "\u00a0", "#include <x>", "self.__init__", "AAAAAA",
    "if x:\n    return y\n", "http://a.b/c?d=e&f",
)  # fmt: skip
JOINTS = ("", " ", "  ", "\n", "\t", "\r\n", "    ")
SAMPLES = (
    *(part for part in PARTS),
    *(joint + PARTS[0] + joint for joint in JOINTS),
    *(a + joint + b for (a, b), joint in zip(product(PARTS[::3], PARTS[1::2]), JOINTS * 30, strict=False)),
    " " * 17, "\n\n\n  \n", "a" * 50, "\t\tx\t y", "",
)  # fmt: skip
