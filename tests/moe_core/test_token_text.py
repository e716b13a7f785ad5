"""Tokens as text: their bytes, the pieces that people read, and the class of each."""

import random

from moe_core.data import train_tokenizer
from moe_core.token_text import CLASSES, TokenText, classes_of, pieces_of

TEXT = "def measure(value):\n    return value + 1  # naïve 🎈 and 漢字\n"


def test_a_token_that_is_a_part_of_a_character_keeps_its_bytes():
    """Whatever the text, the pieces join to it and the bytes to its UTF-8; a character is shown once it is whole."""
    text = TokenText(train_tokenizer([TEXT * 50, "It was 1859, the best of times.\n" * 50], 400))
    fresh = "".join(chr(random.choice((random.randrange(32, 0xD800), random.randrange(0x1F300, 0x1F6FF))))
                    for _ in range(50))
    for one in (TEXT, fresh, "<script>alert('🎈')</script>\t\n"):
        own = [text.bytes_of(i) for i in text.encode(one)]
        assert b"".join(own) == one.encode() and "".join(pieces_of(own)) == one
    balloon = [text.bytes_of(i) for i in text.encode("🧿")]
    assert len(balloon) > 1 and pieces_of(balloon) == [""] * (len(balloon) - 1) + ["🧿"]
    assert pieces_of(balloon[:-1])[-1] == "\ufffd"


def test_each_token_is_of_the_class_that_its_place_in_the_text_gives_it():
    """Words by where they begin, reserved words as a whole, and what is no text on its own."""
    tokens = ["def", " mea", "sure", "(", "x", "1", "):", "\n    ", " return", " ", "12", ".5", " if", "fy",
              b"\xf0\x9f", b"\x8e\x88", "\t", "end", "naïve"]
    own = [t.encode() if isinstance(t, str) else t for t in tokens]
    special = [t == "end" for t in tokens]  # of which no word is a part
    assert [CLASSES[c] for c in classes_of(pieces_of(own), special)] == [
        "keyword", "word start", "continuation", "punctuation", "word start", "continuation", "punctuation", "newline",
        "keyword", "space", "number", "number", "word start", "continuation", "byte", "punctuation", "space", "special",
        "word start"]


def test_tokenizers_that_are_not_byte_level_are_read_too():
    """Bytes in angle brackets and the sign for a space (SentencePiece), and pieces of words (WordPiece)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_of_emoji = [f"<0x{b:02X}>" for b in "🧿".encode()]
    vocab = {token: i for i, token in enumerate(["<unk>", "▁", "t", "h", "▁t", "▁th", "e", "▁the", *bytes_of_emoji])}
    sentence = Tokenizer(models.BPE(vocab, [("▁", "t"), ("▁t", "h"), ("▁th", "e")], byte_fallback=True,
                                    unk_token="<unk>"))
    sentence.pre_tokenizer = pre_tokenizers.Metaspace()
    sentence.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "route": 1, "##r": 2, "##s": 3}, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    for tokenizer, text, want in ((sentence, "the 🧿", [b" the", b" ", *([b] for b in "🧿".encode())]),
                                  (pieces, "routers route", [b" route", b"r", b"s", b" route"])):
        read = TokenText(tokenizer)
        assert [read.bytes_of(i) for i in read.encode(text)] == [bytes(one) for one in want]
