"""Tokens as text: the bytes that each one stands for, what they read as in a row, and what class each is of.

A token of a byte-level vocabulary may hold a part of a character: its bytes are exact here, and the character
is shown at the token that completes it, so that the pieces of a document joined are its text.

T tokens of one document, in order.
"""

from __future__ import annotations

import codecs
import json
import keyword
import re
from collections.abc import Sequence

import numpy as np

# Every token is in exactly one, the first that fits:
CLASSES = (
    "special",       # a token of the tokenizer's own, such as the end of a text
    "byte",          # a part of a character that a later token completes
    "keyword",       # a reserved word of Python begins in it; in prose that is "and", "for", "in" and the like
    "word start",    # another word or name begins in it: letters, digits and underscores, the first no digit
    "continuation",  # it goes on with a word that began in an earlier token
    "number",        # digits and no letter
    "punctuation",   # any other sign that is not white space, symbols and emoji too
    "newline",       # white space with a line end
    "space",         # other white space
)
_CLASS = {name: index for index, name in enumerate(CLASSES)}
_WORD = re.compile(r"[^\W\d]\w*")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """A tokenizer as this module needs it: a ``tokenizers.Tokenizer``, or one of ``transformers`` that wraps one.

    None stands for no tokenizer at all (a run on an array of ids): a token's text is then its number.
    """

    def __init__(self, tokenizer):
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._added, self._decoder = {}, ""
        if tokenizer is not None:
            self._added = self._tokenizer.get_added_tokens_decoder()
            self._decoder = json.dumps(json.loads(self._tokenizer.to_str()).get("decoder"), ensure_ascii=False)
        self._is_bytes = "ByteLevel" in self._decoder

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any special token around it. Raises ValueError where there is no tokenizer."""
        if self._tokenizer is None:
            raise ValueError("texts: this run has no tokenizer, its data are token ids; leave texts out, or name "
                             "one in the config's tokenizer")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def is_special(self, token_id: int) -> bool:
        added = self._added.get(token_id)
        return added is not None and added.special

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text, exactly. An id that the vocabulary lacks reads as its number."""
        token = None if self._tokenizer is None else self._tokenizer.id_to_token(token_id)
        if token is None:
            return f"[{token_id}]".encode()
        if (added := self._added.get(token_id)) is not None:
            return added.content.encode()
        if self._is_bytes and all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        if (one := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes.fromhex(one[1])
        if "WordPiece" in self._decoder:
            return token[2:].encode() if token.startswith("##") else f" {token}".encode()
        return token.replace("▁", " ").encode()  # SentencePiece's sign for a space


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: a byte that prints in Latin-1 stands for itself, the rest take the code points from 256 on."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = sorted(set(range(256)) - set(shown))
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def pieces_of(tokens: Sequence[bytes]) -> list[str]:
    """What each token of a document shows, T texts: a character stands at the token that completes it.

    Bytes that are no UTF-8 come out as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(token, final=at == len(tokens) - 1) for at, token in enumerate(tokens)]


def shown(token: bytes) -> str:
    """One token by itself, for a table: quoted text, or quoted bytes (b'...') where it is a part of a character."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def classes_of(pieces: Sequence[str], special: Sequence[bool]) -> np.ndarray:
    """The class of each token of a document, [T] of indices into :data:`CLASSES`."""
    text = "".join(piece if not own else "\n" * len(piece) for piece, own in zip(pieces, special, strict=True))
    begins = np.full(len(text) + 1, -1)  # where the word that a character belongs to begins
    words = {}
    for word in _WORD.finditer(text):
        begins[word.start() : word.end()] = word.start()
        words[word.start()] = word[0]
    found, at = np.empty(len(pieces), np.int64), 0
    for token, (piece, own) in enumerate(zip(pieces, special, strict=True)):
        found[token] = _CLASS["special" if own else _class_of(piece, at, begins, words)]
        at += len(piece)
    return found


def _class_of(piece: str, at: int, begins: np.ndarray, words: dict[int, str]) -> str:
    if not piece:
        return "byte"
    inside = begins[at : at + len(piece)]
    if (inside >= 0).any():
        started = [words[begin] for begin in inside.tolist() if begin >= at]
        if not started:
            return "continuation"
        return "keyword" if any(map(keyword.iskeyword, started)) else "word start"
    if any(char.isdigit() for char in piece):
        return "number"
    if not piece.isspace():
        return "punctuation"
    return "newline" if "\n" in piece else "space"
