"""The bytes of every token, and encodings of text with the byte at which each token ends.

    tokens = TokenBytes.from_tokenizer(tokenizer, width=model_head_rows)
    tokens.bytes[i]                 bytes of token i, b"" for special tokens and padding
    tokens.roles["eos"]             id of the end token; `role_of[i]` is the role of token i, None for text
    encoded = tokens.encode(text)   .ids [n], .ends [n]: offsets into encoded.data, the bytes the tokenizer sees

Two tokenizers agree on bytes where their strings do not: "Ġthe", "▁the" and " the" are one token, and a token may be a part
of a character. The rules are read off the tokenizer's own decoder, and then checked against what it encodes and decodes.

Text is encoded without the space that some tokenizers put before it, so that every part of a text can be encoded and all
offsets count the text's own bytes; and what looks like a special token in a text stays text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from chassis.errors import TokenizerError
from chassis.text import tokenizer_json as rules
from chassis.text.samples import SAMPLES

END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<|end_of_turn|>", "<|return|>")
CHECKED_TOKENS = 4096  # of a larger vocabulary so many, evenly spread, are compared with the decoder's output


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids [n] int64 of a text and the offset [n] int64 in `data`, its normalised UTF-8, at which each token ends."""

    ids: np.ndarray
    ends: np.ndarray
    data: bytes

    def __len__(self) -> int:
        return len(self.ids)


class TokenBytes:
    """A vocabulary as byte strings, made by `from_tokenizer`; ids run to `width`, those >= len(tokenizer) being padding.

    `lossy` marks tokenizers that drop white space (WordPiece): their bytes do not add up to the text, and the ends of
    tokens are those that the tokenizer itself reports.
    """

    def __init__(self, state: dict, named: dict[str, int], width: int | None, name: str) -> None:
        pieces = rules.pieces(state)
        n = max(pieces) + 1
        if width is not None and width < n:
            raise TokenizerError(f"{name}: its {n} tokens do not fit a head of {width} rows; give the model they belong to")
        self.name, self.n_tokens, self.width = name, n, width or n
        self.lossy = rules.family(state, name) == "wordpiece"
        self.plain = Tokenizer.from_str(json.dumps(rules.plain_copy(state)))
        self.plain.encode_special_tokens = True
        self.model = state["model"]
        self._normalizer = rules.text_normalizer(state)
        self._marks_spaces = rules.family(state, name) == "sentencepiece"
        self.content = pieces
        self.bytes: list[bytes] = [b""] * self.width
        self.role_of: list[str | None] = ["padding"] * self.width
        for index, data in rules.token_bytes(state, name).items():
            self.bytes[index], self.role_of[index] = data or b"", None if data else "other"
        self._single = rules.byte_pieces(state)
        self.roles = {role: index for role, index in named.items() if self.role_of[index] is not None}
        for index, piece in self.content.items():
            if self.role_of[index] and piece in END_OF_TURN:
                self.roles.setdefault("eot", index)
        for role in ("pad", "unk", "bos", "eot", "eos"):  # of several roles of one token the last of these counts
            if role in self.roles:
                self.role_of[self.roles[role]] = role
        self.is_text = np.array([role is None for role in self.role_of])
        self.lengths = np.array([len(data) for data in self.bytes], dtype=np.int64)
        self.hash = hashlib.sha256(self.plain.to_str().encode()).hexdigest()

    @classmethod
    def from_tokenizer(cls, tokenizer, *, width: int | None = None, check: bool = True) -> TokenBytes:
        """Read a fast tokenizer of transformers (or its backend). `width`: rows of the model's head, when it is padded.

        Raises TokenizerError if the tokenizer is not a fast one, if its decoder is of an unknown kind (named), if the head
        has fewer rows than there are tokens, and if, for one of the samples it is checked on (shown), the bytes of the
        tokens are not those of the text.
        """
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerError(
                f"{name}: not a fast tokenizer, so that the bytes of its tokens cannot be known; "
                "load one with a tokenizer.json (AutoTokenizer converts most models)"
            )
        named = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "unk")}
        state = json.loads(backend.to_str())
        named["unk"] = rules.unknown_id(state) if named["unk"] is None else named["unk"]
        tokens = cls(state, {role: index for role, index in named.items() if index is not None}, width, name)
        if check:
            tokens._check_decoder(backend)
            tokens._check_encoder()
        return tokens

    def normalize(self, text: str) -> str:
        """The text as the tokenizer reads it: Unicode normal form and the like, but no marks for spaces."""
        text = self._normalizer.normalize_str(text) if self._normalizer is not None else text
        return text.replace("▁", " ") if self._marks_spaces else text

    def encode(self, text: str) -> Encoded:
        """Tokens of a text that may stand anywhere: no space is put before it, no special token is added or recognised.

        Raises TokenizerError where the tokens do not add up to the text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode` for several texts at once."""
        texts = [self.normalize(text) for text in texts]
        encodings = self.plain.encode_batch_fast(texts, add_special_tokens=False)
        return [self._encoded(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids alone, of texts that are normalised already: the fast way through many short ones."""
        return [encoding.ids for encoding in self.plain.encode_batch_fast(texts, add_special_tokens=False)]

    def tuples_of(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """`ids_of` as tuples. The garbage collector leaves them alone; of many lists it would visit all there is."""
        return [tuple(encoding.ids) for encoding in self.plain.encode_batch_fast(texts, add_special_tokens=False)]

    def _encoded(self, text: str, ids: list[int]) -> Encoded:
        ids, data = np.array(ids, dtype=np.int64), text.encode()
        if self.lossy or not self.is_text[ids].all():
            return Encoded(ids, self._reported_ends(text), data)
        ends = self.lengths[ids].cumsum()
        if (ends[-1] if len(ends) else 0) != len(data):
            raise TokenizerError(f"{self.name}: the tokens of {_shown(text)} spell {_shown(self._spell(ids))}")
        return Encoded(ids, ends, data)

    def _reported_ends(self, text: str) -> np.ndarray:
        """Ends as the tokenizer reports them, for tokens whose bytes do not tell: characters it does not know."""
        ends = [end for _, end in self.plain.encode(text, add_special_tokens=False).offsets]
        return np.concatenate([[0], np.cumsum([len(c.encode()) for c in text])]).astype(np.int64)[ends]

    @cached_property
    def ids_by_bytes(self) -> dict[bytes, list[int]]:
        """Text tokens by their bytes; of duplicates the one that encodings use comes first."""
        table: dict[bytes, list[int]] = {}
        for index in np.flatnonzero(self.is_text).tolist():
            table.setdefault(self.bytes[index], []).append(index)
        repeated = [data for data, ids in table.items() if len(ids) > 1]
        for data in repeated:
            text = data.decode(errors="ignore")
            used = self.ids_of([text])[0] if text.encode() == data else []
            table[data].sort(key=lambda index: ([index] != used, self.content[index] in self._single, index))
        return table

    def _spell(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.bytes[index] for index in ids)

    def _check_decoder(self, backend: Tokenizer) -> None:
        """What a token adds to a decoded text must be its bytes, for tokens that are whole characters."""
        anchor = next((ids[-1] for ids in self.ids_of(["a", "e", "1", "."]) if ids and self.is_text[ids[-1]]), None)
        if anchor is None:
            raise TokenizerError(f"{self.name}: encodes none of 'a', 'e', '1', '.' as text")
        texts = np.flatnonzero(self.is_text)
        texts = texts[:: -(-len(texts) // CHECKED_TOKENS)]
        before = backend.decode([anchor], skip_special_tokens=False)
        for index in texts.tolist():
            data = self.bytes[index]
            if data.decode(errors="ignore").encode() != data:
                continue
            after = backend.decode([anchor, index], skip_special_tokens=False).removeprefix(before)
            if after.encode() != data and not (self.lossy and _dense(after) == _dense(data.decode())):
                raise TokenizerError(
                    f"{self.name}: token {index} ({self.content[index]!r}) was read as {data!r} but decodes to {after!r}"
                )

    def _check_encoder(self) -> None:
        """The bytes of the tokens of a text must be the bytes of the text."""
        for sample in SAMPLES:
            text = self.normalize(sample)
            (ids,) = self.ids_of([text])
            if not self.is_text[ids].all():
                strange = [i for i in ids if not self.is_text[i] and self.role_of[i] != "unk"]
                if strange:
                    raise TokenizerError(f"{self.name}: the text {_shown(sample)} holds the special tokens {strange}")
                continue  # characters it does not know: there is nothing to compare
            spelled = self._spell(ids)
            if spelled != text.encode() and not (self.lossy and _dense(spelled.decode()) == _dense(text)):
                raise TokenizerError(
                    f"{self.name}: the tokens of {_shown(sample)} spell {_shown(spelled)}, expected {_shown(text)}; "
                    "this tokenizer changes text in a way that cannot be followed byte by byte"
                )


def _dense(text: str) -> str:
    return "".join(text.split())


def _shown(text: str | bytes) -> str:
    return repr(text if len(text) <= 60 else text[:57]) + ("" if len(text) <= 60 else f" … ({len(text)})")
