"""From documents to batches: the token files in the cache, and the order in which training reads them.

Letters: B batch_size, S block_size.

The cache (see ``cache.py``) holds::

    <key>/train.bin val.bin    token ids, uint16 (uint32 above 65,536), an end-of-text id after each document
    <key>/tokenizer.json meta.json
    stamps/<stamp>             the key that these files and settings came to the last time

The key is a hash of the documents themselves and the settings: it names the tokens, wherever the files lie
and whatever their format. Working it out means reading everything, so a stamp (paths, sizes, modification
times, as in ``make``) finds it again in milliseconds; a file merely touched or moved costs one reading and
no tokenising.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_core.config import DataConfig
from moe_core.data.cache import cache_root, key_of, unwritable, write_whole
from moe_core.data.corpus import (
    EMBEDDED,
    DataError,
    documents,
    fingerprint,
    is_validation,
    pieces,
    source_files,
)
from moe_core.data.pretrained import Pretrained
from moe_core.data.tokenise import joined
from moe_core.data.tokenizer import END_OF_TEXT, MIN_VOCAB, train_tokenizer

FORMAT = 1  # of the cache: raise it when the same text and settings would give other tokens
PIECE_CHARS = 2048  # a corpus of too few documents to split is cut into pieces of this length
TOKENIZER_CHARS = 64 << 20  # a vocabulary gains little from more text, and training takes time and memory
ENCODE_CHARS = 1 << 20  # tokenised at a time: an encoding in memory is a hundred times the size of its ids


@dataclass(frozen=True)
class TokenData:
    """The tokens of a corpus: ``train`` and ``val`` are 1-D, mapped from the cache, read as they are used.

    ``key`` names exactly these tokens. ``vocab_size`` is what the tokenizer came to: at most what was asked.
    ``end_of_text`` is the id after each document.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer_path: Path
    key: str
    vocab_size: int
    end_of_text: int


def load_tokens(data: DataConfig, vocab_size: int, say: Callable[[str], None] = print,
                pretrained: Pretrained | None = None) -> TokenData:
    """The corpus as tokens: from the cache, or prepared now, which ``say`` is told about.

    The tokenizer is ``pretrained``, or trained here to ``vocab_size``. Two processes may prepare the same corpus
    at once. Raises DataError.
    """
    if pretrained is None and vocab_size < MIN_VOCAB:
        raise DataError(f"vocab_size = {vocab_size}: must be at least {MIN_VOCAB}: bytes, and {END_OF_TEXT}")
    files = source_files(data)
    # Taken before anything is read: a file that changes meanwhile has another stamp the next time.
    stats = [_stat(data, file) for file in files]
    size = sum(stat[1] for stat in stats)
    settings = [FORMAT, data.val_fraction, pretrained.digest if pretrained else vocab_size,
                importlib.metadata.version("tokenizers")]
    root = cache_root()
    stamp = root / "stamps" / key_of(settings, data.text_key, stats)
    if stamp.is_file() and (found := _open(root / stamp.read_text())):
        return found

    what = "the Python standard library's sources" if data.dataset_name == EMBEDDED else data.dataset_name
    vocabulary = "" if pretrained else f"a tokenizer of {vocab_size:,}, then "
    say(f"Preparing {what} once ({len(files):,} file{'s' * (len(files) > 1)}, {size / 1e6:,.1f} MB): "
        f"{vocabulary}tokens")
    started = time.perf_counter()
    share = 0.0 if pretrained else min(1.0, TOKENIZER_CHARS / max(size, 1))
    survey = _survey(lambda: documents(data), data, share)
    if survey.cut:
        say(f"Too few documents to split: cut into {survey.documents:,} of about {PIECE_CHARS:,} characters")
    key = key_of(settings, share, survey.digest)
    try:
        found = _open(root / key) or _prepare(root, key, survey, data, vocab_size, pretrained)
        write_whole(stamp, lambda file: file.write(key.encode()))
    except OSError as error:
        raise unwritable(error) from error
    say(f"{len(found.train):,} training and {len(found.val):,} validation tokens in "
        f"{time.perf_counter() - started:.1f} s, kept in {root / key}")
    return found


@dataclass(frozen=True)
class _Survey:
    """What one reading of the corpus shows."""

    texts: Callable[[], Iterable[str]]  # the documents again
    digest: str
    sample: list[str]  # training text for the tokenizer
    documents: int
    val_documents: int
    cut: bool


def _survey(texts: Callable[[], Iterable[str]], data: DataConfig, share: float, cut: bool = False) -> _Survey:
    digest, sample, n, n_val, chars = hashlib.blake2b(digest_size=16), [], 0, 0, 0
    for text in texts():
        digest.update(fingerprint(text))
        n, chars = n + 1, chars + len(text)
        if is_validation(text, data.val_fraction):
            n_val += 1
        else:  # a part of every document, so that a long corpus is not judged by its first files
            sample.append(text[: math.ceil(len(text) * share)])
    if 0 < n_val < n:
        return _Survey(texts, digest.hexdigest(), sample, n, n_val, cut)
    if not n:
        raise DataError(f"dataset_name = {data.dataset_name!r}: must hold text; every document is empty")
    if not cut:  # one long file, say: its pieces are documents of their own
        return _survey(lambda: (piece for text in texts() for piece in pieces(text, PIECE_CHARS)
                                if piece.strip()), data, share, cut=True)
    raise DataError(f"dataset_name = {data.dataset_name!r}: {chars:,} characters are too few to split at "
                    f"val_fraction = {data.val_fraction}; give more text or another val_fraction")


def _prepare(root: Path, key: str, survey: _Survey, data: DataConfig, vocab_size: int,
             pretrained: Pretrained | None) -> TokenData:
    """Writes the folder of ``key`` under a temporary name and renames it: it is there whole or not at all."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as partial:
        folder = Path(partial, "tokens")
        folder.mkdir()
        if pretrained:
            tokenizer, size, end = pretrained.backend, pretrained.vocab_size, pretrained.end_of_text
        else:
            tokenizer = train_tokenizer(survey.sample, vocab_size)
            size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END_OF_TEXT)
        tokenizer.save(str(folder / "tokenizer.json"))
        dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
        n_train, n_val, digest = _write_tokens(folder, survey.texts(), data.val_fraction, tokenizer, end, dtype)
        if digest != survey.digest:
            raise DataError(f"dataset_name = {data.dataset_name!r}: must not change while it is read")
        (folder / "meta.json").write_text(json.dumps({
            "vocab_size": size, "end_of_text": end, "dtype": dtype.name, "train_tokens": n_train, "val_tokens": n_val,
            "documents": survey.documents, "val_documents": survey.val_documents}))
        try:
            folder.rename(root / key)
        except OSError:
            if not _open(root / key):  # not another process that was first, but a damaged folder
                (root / key).rename(Path(partial, "damaged"))
                folder.rename(root / key)
    return _open(root / key)


def _write_tokens(folder: Path, texts: Iterable[str], val_fraction: float, tokenizer, end: int, dtype):
    """Both token files; returns their lengths in tokens and the digest of the documents written."""
    digest, counts = hashlib.blake2b(digest_size=16), [0, 0]
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for chunk in _chunks(texts):
            sides: tuple[list, list] = [], []
            for text in chunk:
                digest.update(fingerprint(text))
                sides[is_validation(text, val_fraction)].append(parts_of(text))
            for side, file in enumerate((train, val)):
                ids = joined(tokenizer, sides[side], end, dtype)
                file.write(ids.tobytes())
                counts[side] += len(ids)
    return *counts, digest.hexdigest()


def parts_of(text: str) -> list[str]:
    """A document as the texts to tokenise one by one: itself, or pieces where its encoding would be too large."""
    return [text] if len(text) <= ENCODE_CHARS else pieces(text, ENCODE_CHARS)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, chars = [], 0
    for text in texts:
        chunk.append(text)
        chars += len(text)
        if chars >= ENCODE_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _open(folder: Path) -> TokenData | None:
    """The tokens in a folder of the cache; None when it is not there or not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sides = [np.memmap(folder / f"{side}.bin", meta["dtype"], mode="r") for side in ("train", "val")]
        whole = [len(side) for side in sides] == [meta["train_tokens"], meta["val_tokens"]]
    except (OSError, ValueError, KeyError):
        return None
    path = folder / "tokenizer.json"
    if not whole or not path.is_file():
        return None
    # A cache from before there were other tokenizers than the own, whose mark is 0, does not say it.
    return TokenData(*sides, path, folder.name, meta["vocab_size"], meta.get("end_of_text", 0))


def _stat(data: DataConfig, file: Path) -> tuple[str, int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise DataError(f"dataset_name = {data.dataset_name!r}: {file} cannot be read "
                        f"({error.strerror})") from error
    return str(file), stat.st_size, stat.st_mtime_ns


class Batches:
    """Training batches without end: the token stream cut into windows of S + 1, shuffled anew each epoch.

    The order of an epoch comes from ``(seed, epoch)`` alone, so a place in it is two numbers: see
    :meth:`state_dict`. A batch at the end of an epoch is filled up from the next, so that every window is
    seen exactly once an epoch; only the tokens after the last whole window are never seen. ``pin`` puts
    batches in page-locked memory, for copies to a GPU that do not wait. Raises DataError when the tokens
    do not fill one batch.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int, pin: bool = False):
        self._windows = _windows(tokens, block_size)
        if not len(self._windows):
            raise DataError(f"block_size = {block_size}: must be less than the {len(tokens):,} training tokens")
        if len(self._windows) < batch_size:
            raise DataError(f"batch_size = {batch_size}: must be at most {len(self._windows):,}, the windows "
                            f"of block_size + 1 = {block_size + 1} in {len(tokens):,} training tokens")
        self._batch_size, self._seed, self._pin = batch_size, seed, pin
        self._epoch = -1
        self._seek(0, 0)

    def __len__(self) -> int:
        """Windows in an epoch."""
        return len(self._windows)

    def next(self) -> torch.Tensor:
        """The next batch, int64 [B, S + 1]: inputs are ``[:, :-1]``, targets ``[:, 1:]``."""
        picks = self._order[self._index : self._index + self._batch_size]
        self._index += len(picks)
        if self._index == len(self):
            self._seek(self._epoch + 1, self._batch_size - len(picks))
            picks = np.concatenate([picks, self._order[: self._index]])
        batch = torch.from_numpy(self._windows[picks].astype(np.int64))
        return batch.pin_memory() if self._pin else batch

    def state_dict(self) -> dict[str, int]:
        """Where :meth:`next` goes on: the epoch, and the windows already taken of it."""
        return {"epoch": self._epoch, "index": self._index}

    def close(self) -> None:
        """Nothing is held but the mapped file."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at exactly this place. Raises DataError when these tokens have no such place."""
        epoch, index = state["epoch"], state["index"]
        if epoch < 0 or not 0 <= index < len(self):
            raise DataError(f"epoch = {epoch}, index = {index}: must be a place in these {len(self):,} "
                            "windows; it was saved with another text or block_size")
        self._seek(epoch, index)

    def _seek(self, epoch: int, index: int) -> None:
        if epoch != self._epoch:  # the order of a long epoch takes a second to draw
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._windows))
        self._epoch, self._index = epoch, index


def validation_batches(tokens: np.ndarray, block_size: int, batch_size: int, n: int) -> list[torch.Tensor]:
    """At most ``n`` batches, int64 [B, S + 1], always the same: windows spread over all the tokens, in order.

    Fewer when the tokens fill no more, and one smaller batch when they do not fill even one. Raises
    DataError when they do not fill one window.
    """
    windows = _windows(tokens, block_size)
    if not len(windows):
        raise DataError(f"block_size = {block_size}: must be less than the {len(tokens):,} validation "
                        "tokens; or give more text or a larger val_fraction")
    rows = min(batch_size, len(windows))
    count = min(n, len(windows) // rows) * rows
    picked = windows[np.arange(count) * len(windows) // count].astype(np.int64)
    return list(torch.from_numpy(picked).split(rows))


def _windows(tokens: np.ndarray, block_size: int) -> np.ndarray:
    """``tokens`` as [windows, S + 1], without the rest at the end; a view, nothing is read."""
    width = block_size + 1
    return tokens[: len(tokens) // width * width].reshape(-1, width)
