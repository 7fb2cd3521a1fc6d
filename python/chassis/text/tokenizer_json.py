"""How a tokenizer.json writes the bytes of a token, and the tokenizer that encodes any part of a text by the same rules.

Three families are told apart by the decoder: *byte-level* pieces are written in GPT-2's alphabet of 256 printable
characters, *sentencepiece* pieces with ▁ for a space and perhaps <0xHH> for a byte, *wordpiece* pieces with a mark where no
space precedes.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator

from tokenizers import Tokenizer

from chassis.errors import TokenizerError

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
UNTYPABLE = "\ufdd0"  # a code point that Unicode keeps free of any use: no text holds it


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def steps(part: dict | None) -> Iterator[dict]:
    """A normalizer, pre-tokenizer or decoder as its single steps."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    inner = next(value for key, value in part.items() if key != "type")
    for step in inner:
        yield from steps(step)


def family(state: dict, name: str = "tokenizer") -> str:
    """ "byte-level", "sentencepiece" or "wordpiece"; raises TokenizerError for any other decoder, by its name."""
    kinds = {step["type"] for step in steps(state["decoder"])}
    if "ByteLevel" in kinds:
        return "byte-level"
    if "WordPiece" in kinds:
        return "wordpiece"
    if "Metaspace" in kinds or any(_marks_space(step, decoding=True) for step in steps(state["decoder"])):
        return "sentencepiece"
    found = "+".join(step["type"] for step in steps(state["decoder"])) or "none"
    raise TokenizerError(
        f"{name}: its decoder is {found}, expected ByteLevel, Metaspace, Replace(▁) or WordPiece; "
        "the bytes of its tokens cannot be known"
    )


def pieces(state: dict) -> dict[int, str]:
    """Every token by id, added ones included."""
    vocab = state["model"]["vocab"]
    table = {index: piece for piece, index in vocab.items()} if isinstance(vocab, dict) else {}
    table = table or {index: piece for index, (piece, _) in enumerate(vocab)}
    return table | {token["id"]: token["content"] for token in state["added_tokens"]}


def unknown_id(state: dict) -> int | None:
    """The token that stands for characters the model does not know."""
    model = state["model"]
    if model.get("unk_token") is None:
        return model.get("unk_id")
    return next((index for index, piece in pieces(state).items() if piece == model["unk_token"]), None)


def byte_pieces(state: dict) -> set[str]:
    """Pieces such as <0x0A> that stand for a byte; none where the decoder does not say so."""
    if not any(step["type"] == "ByteFallback" for step in steps(state["decoder"])):
        return set()
    return {piece for piece in pieces(state).values() if BYTE_PIECE.fullmatch(piece)}


def token_bytes(state: dict, name: str = "tokenizer") -> dict[int, bytes | None]:
    """Bytes of every token by id; None for special tokens. Added tokens that are not special are text as it is written."""
    kind, model, single = family(state, name), state["model"], byte_pieces(state)
    added = {token["id"]: token for token in state["added_tokens"]}
    mark = next((step["prefix"] for step in steps(state["decoder"]) if step["type"] == "WordPiece"), "")

    def read(index: int, piece: str) -> bytes | None:
        if piece in single:
            return bytes([int(BYTE_PIECE.fullmatch(piece)[1], 16)])
        if index in added:
            return None if added[index]["special"] or not piece else piece.encode()
        if piece == model.get("unk_token") or index == model.get("unk_id") or not piece:
            return None
        if kind == "byte-level":
            known = all(character in BYTE_OF for character in piece)
            return bytes(BYTE_OF[character] for character in piece) if known else piece.encode()
        if kind == "sentencepiece":
            return piece.replace("▁", " ").encode()
        return piece[len(mark) :].encode() if piece.startswith(mark) else f" {piece}".encode()

    return {index: read(index, piece) for index, piece in pieces(state).items()}


def text_normalizer(state: dict):
    """What the tokenizer does to a text's characters before anything else, the marking of spaces left out; None: nothing."""
    kept = [
        step
        for step in steps(state["normalizer"])
        if not _marks_space(step) and step["type"] not in ("Prepend", "ByteLevel")
    ]
    if not kept:
        return None
    bare = {"type": "BPE", "vocab": {}, "merges": []}
    empty = {"version": "1.0", "added_tokens": [], "pre_tokenizer": None, "post_processor": None, "decoder": None}
    return Tokenizer.from_str(json.dumps(empty | {"model": bare, "normalizer": _sequence(kept, "normalizers")})).normalizer


def plain_copy(state: dict) -> dict:
    """The tokenizer without a dummy space before the text, without special tokens around it and deaf to those in it."""
    plain = copy.deepcopy({key: value for key, value in state.items() if key != "model"})
    plain |= {"model": dict(state["model"]), "truncation": None, "padding": None, "post_processor": None}
    plain["normalizer"] = _sequence([s for s in steps(plain["normalizer"]) if s["type"] != "Prepend"], "normalizers")
    for step in steps(plain["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    single = byte_pieces(state)
    plain["added_tokens"] = [
        token | {"lstrip": False, "rstrip": False, "single_word": False}
        for token in plain["added_tokens"]
        if token["content"] not in single
    ]
    _hide_specials(state, plain)
    return plain


def _hide_specials(state: dict, plain: dict) -> None:
    """Rename special pieces where the model itself, not the list of added tokens, would find them in a text."""
    model = plain["model"]
    hidden = {index for index, data in token_bytes(state).items() if data is None}
    if model["type"] == "Unigram":
        model["vocab"] = [
            [f"{UNTYPABLE}{i}" if i in hidden else piece, score] for i, (piece, score) in enumerate(model["vocab"])
        ]
    elif model.get("ignore_merges"):
        keep = model.get("unk_token")
        model["vocab"] = {f"{UNTYPABLE}{i}" if i in hidden and p != keep else p: i for p, i in model["vocab"].items()}
    else:
        return
    for token in plain["added_tokens"]:
        if token["id"] in hidden and token["content"] != model.get("unk_token"):
            token["content"] = f"{UNTYPABLE}{token['id']}"


def _marks_space(step: dict, decoding: bool = False) -> bool:
    if step["type"] != "Replace":
        return False
    pattern = step["pattern"].get("String", step["pattern"].get("Regex"))
    return (pattern, step["content"]) == (("▁", " ") if decoding else (" ", "▁"))


def _sequence(parts: list[dict], key: str) -> dict | None:
    return {"type": "Sequence", key: parts} if parts else None
