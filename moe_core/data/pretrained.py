"""A tokenizer by name: any that AutoTokenizer knows, from the hub or from a folder. No code of its is run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_core.checked import first_line
from moe_core.config import ModelConfig, RunConfig
from moe_core.data.cache import cache_root, unwritable
from moe_core.data.corpus import DataError

PADDED_TO = 128  # rows of an embedding: a matrix product of a whole number of tiles is quicker on a GPU


@dataclass(frozen=True)
class Pretrained:
    """``backend`` is a ``tokenizers.Tokenizer`` that neither pads nor cuts; ``digest`` names its content.

    ``vocab_size`` is the largest token id + 1; ``end_of_text`` the id that the tokenizer itself ends a text with.
    """

    name: str
    backend: Any
    vocab_size: int
    end_of_text: int
    digest: str


def load_pretrained(name: str) -> Pretrained:
    """The tokenizer in a folder or of that name on the hub. Raises DataError."""
    from transformers import AutoTokenizer

    def refused(what: str) -> DataError:
        return DataError(f"tokenizer = {name!r}: {what}")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(here := found(name), trust_remote_code=False)
    except Exception as error:  # they have no common class, and many lines
        raise refused("cannot be loaded; must be the name of a tokenizer on the Hugging Face hub, or a folder that "
                      f"has one ({first_line(error)})") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refused("must be one that the tokenizers library runs (a tokenizer.json); this one is Python code")
    if tokenizer.eos_token_id is None:
        raise refused("must have an end-of-text token (eos_token), which joins the documents")
    return of_backend(here, backend, tokenizer.eos_token_id)


def of_backend(name: str, backend, end_of_text: int) -> Pretrained:
    """A ``tokenizers.Tokenizer`` with what its texts end with."""
    backend.no_padding()
    backend.no_truncation()
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    digest = hashlib.blake2b(f"{end_of_text} {backend.to_str()}".encode(), digest_size=10).hexdigest()
    return Pretrained(name, backend, vocab_size, end_of_text, digest)


def save_folder(tokenizer: Pretrained, folder: Path, **fields) -> None:
    """Write it as AutoTokenizer loads it, with ``fields`` of its configuration changed."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with quiet_transformers():
        if Path(tokenizer.name).is_file():  # one that was trained here
            saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend,
                                            eos_token=tokenizer.backend.id_to_token(tokenizer.end_of_text), **fields)
        else:
            saved = AutoTokenizer.from_pretrained(tokenizer.name, trust_remote_code=False, **fields)
        saved.save_pretrained(folder)


def adopted(tokenizer: Pretrained) -> Path:
    """A folder of the cache that has it, named by its content. Raises DataError."""
    folder = cache_root() / "tokenizers" / tokenizer.digest
    try:
        return kept_folder(folder, lambda draft: save_folder(tokenizer, draft))
    except OSError as error:
        raise unwritable(error) from error


def found(name: str) -> str:
    """``name``; where it is a folder of :func:`adopted` in a cache that is not here, the same in this cache."""
    path = Path(name)
    if os.path.exists(path) or path.parts[-3:-1] != (cache_root().name, "tokenizers"):
        return name
    return str(cache_root() / "tokenizers" / path.name)


def kept_folder(folder: Path, write: Callable[[Path], object]) -> Path:
    """``folder``, made by ``write(draft)`` whole or not at all where it is not there yet. Raises OSError."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            write(draft := Path(partial, folder.name))
            try:
                draft.rename(folder)
            except OSError:
                if not folder.exists():  # not another process that was first
                    raise
    return folder


def settled_vocabulary(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """The config with the ``vocab_size`` that its tokenizer asks for; unchanged where none is named.

    A ``vocab_size`` that nobody chose (the default, or a preset's) becomes the tokenizer's, padded up to a multiple
    of 128; so does one that is just the tokenizer's own. Another is kept where all tokens have room in it. Token
    ids never reach the padding. Raises DataError where the tokens have no room.
    """
    from moe_core.presets import PRESETS

    if not config.data.tokenizer:
        return config
    tokens = load_pretrained(config.data.tokenizer).vocab_size
    padded, asked = -(-tokens // PADDED_TO) * PADDED_TO, config.model.vocab_size
    unchosen = {ModelConfig().vocab_size, *(fields["vocab_size"] for fields in PRESETS.values())}
    if asked == padded or (asked not in unchosen and asked > tokens):
        return config
    if asked not in unchosen and asked < tokens:
        raise DataError(f"vocab_size = {asked}: must be at least the {tokens:,} tokens of tokenizer = "
                        f"{config.data.tokenizer!r}; {padded} is a good one, and is taken where none is given")
    padding = f", padded to a multiple of {PADDED_TO}" if padded > tokens else ""
    say(f"vocab_size = {padded}: it follows tokenizer {config.data.tokenizer!r} of {tokens:,} tokens{padding}")
    return config.replace(vocab_size=padded)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice beside our own lines; the user's settings are put back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
