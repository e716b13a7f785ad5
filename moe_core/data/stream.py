"""Training batches from a data set that is streamed: documents -> tokens -> windows -> shuffled -> batches.

Letters: B batch_size, S block_size, N shuffle_buffer.

A thread fills one buffer of N windows after the other and shuffles each by ``(seed, its number)`` alone. Training
takes windows from one while the next is filled. So the whole state is what is left of the present buffer, which
nothing ever writes to again, and the place in the stream at which the buffer was full: to take it costs nothing, and
whoever goes back to it trains on at once, without reading a document twice.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_core.data.batches import parts_of
from moe_core.data.corpus import DataError, is_validation
from moe_core.data.hub import Documents
from moe_core.data.prefetch import Ahead
from moe_core.data.pretrained import Pretrained
from moe_core.data.tokenise import Tokenisers

CHUNK_CHARS = 1 << 19  # tokenised at a time: some 130,000 tokens
START = {"number": 0, "epoch": 0, "cursor": None, "left": None}  # of the first buffer


class Stream:
    """Batches without end from documents that are read once an epoch, in order, and tokenised on the way.

    Documents whose hash puts them on the validation side are left out where ``val_fraction`` is not None. Raises
    DataError from :meth:`next` where documents cannot be had; the next call tries again from the same document.
    """

    def __init__(self, documents: Documents, tokenizer: Pretrained, *, block_size: int, batch_size: int,
                 shuffle_buffer: int, seed: int, val_fraction: float | None = None, num_workers: int = 0,
                 prefetch_factor: int = 2, pin: bool = False, say: Callable[[str], None] = print):
        self._tokenizer, self._batch_size, self._pin = tokenizer, batch_size, pin
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        self._windows, self._index = np.empty((0, block_size + 1), dtype), 0
        self._tokenisers = Tokenisers(tokenizer.backend, tokenizer.end_of_text, dtype, num_workers)
        self._ahead = Ahead(_Filling(
            documents, self._tokenisers, block_size + 1, shuffle_buffer, seed, val_fraction,
            prefetch_factor * max(1, num_workers), say), START, depth=1)

    def next(self) -> Tensor:
        """The next batch, int64 [B, S + 1]: inputs are ``[:, :-1]``, targets ``[:, 1:]``. Raises DataError."""
        while (left := len(self._windows) - self._index) < self._batch_size:
            buffer = self._ahead.get()
            self._windows, self._index = (
                np.concatenate([self._windows[self._index :], buffer]) if left else buffer), 0
        picked = self._windows[self._index : self._index + self._batch_size]
        self._index += len(picked)
        batch = torch.from_numpy(picked.astype(np.int64))
        return batch.pin_memory() if self._pin else batch

    def state_dict(self) -> dict[str, Any]:
        """The windows of the present buffer that are still to come, [n, S + 1], and where the stream goes on."""
        return {"windows": torch.from_numpy(self._windows[self._index :]), "place": self._ahead.place,
                "tokenizer": self._tokenizer.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at exactly the next window. Raises DataError where the state is of another stream."""
        windows = state["windows"].cpu().numpy()
        if state["tokenizer"] != self._tokenizer.digest:
            raise DataError(f"tokenizer = {self._tokenizer.name!r}: is not the one that this run was trained with; its "
                            "content has changed")
        if windows.shape[1:] != self._windows.shape[1:]:
            raise DataError(f"block_size = {self._windows.shape[1] - 1}: the state was saved with block_size = "
                            f"{windows.shape[1] - 1}")
        self._windows, self._index = windows, 0
        if state["place"]["number"] != self._ahead.place["number"]:
            self._ahead.seek(state["place"])  # else what is being filled is the right one already

    def close(self) -> None:
        """End the thread, and the processes that tokenise."""
        self._ahead.close()
        self._tokenisers.close()


class _Filling:
    """The shuffled buffers from a place on, with the place after each: what :class:`Ahead` makes ready."""

    def __init__(self, documents: Documents, tokenisers: Tokenisers, width: int, windows: int, seed: int,
                 val_fraction: float | None, in_flight: int, say: Callable[[str], None]):
        self._documents, self._tokenisers, self._width, self._size = documents, tokenisers, width, windows * width
        self._seed, self._val_fraction, self._in_flight, self._say = seed, val_fraction, in_flight, say
        self._chunk_chars = min(CHUNK_CHARS, 4 * self._size)
        self._said_end = False

    def __call__(self, place: dict[str, Any], stop: threading.Event) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        number, epoch, cursor, left = (place[name] for name in START)
        parts = [] if left is None else [left.cpu().numpy()]
        while True:
            # What is left may hold whole buffers itself: they come first, as they would have without a stop.
            for ids, after in itertools.chain([(None, cursor)], self._tokens(epoch, cursor, stop)):
                cursor = after
                parts += [] if ids is None else [ids]
                while sum(map(len, parts)) >= self._size:
                    tokens = np.concatenate(parts)
                    parts = [tokens[self._size :].copy()]
                    yield self._shuffled(tokens[: self._size], number), _place(number + 1, epoch, cursor, parts[0])
                    number += 1
            if cursor is None:
                raise DataError(f"{self._documents.title}: must hold text to train on; there is none in it")
            # An epoch's last buffer is shorter: two epochs are never mixed.
            epoch, cursor, tokens = epoch + 1, None, np.concatenate(parts)
            self._say_end(epoch)
            whole = len(tokens) // self._width * self._width
            parts = [tokens[whole:].copy()]
            if whole:
                yield self._shuffled(tokens[:whole], number), _place(number + 1, epoch, None, parts[0])
                number += 1

    def _shuffled(self, tokens: np.ndarray, number: int) -> np.ndarray:
        windows = tokens.reshape(-1, self._width)
        return windows[np.random.default_rng([self._seed, number]).permutation(len(windows))]

    def _tokens(self, epoch: int, cursor: Any, stop: threading.Event) -> Iterator[tuple[np.ndarray, Any]]:
        """Token ids of the training documents of what is left of an epoch, and the cursor after each chunk."""
        waiting: deque = deque()
        for texts, after in self._chunks(epoch, cursor, stop):
            waiting.append((self._tokenisers.submit(texts), after))
            while len(waiting) > self._in_flight:
                ids, after = waiting.popleft()
                yield ids.result(), after
        for ids, after in waiting:
            yield ids.result(), after

    def _chunks(self, epoch: int, cursor: Any, stop: threading.Event) -> Iterator[tuple[list[list[str]], Any]]:
        chunk, chars = [], 0
        for texts, after in self._documents.read(epoch, cursor, stop):
            if self._val_fraction is not None:
                texts = [text for text in texts if not is_validation(text, self._val_fraction)]
            chunk += map(parts_of, texts)
            chars += sum(map(len, texts))
            if chars >= self._chunk_chars:
                yield chunk, after
                chunk, chars = [], 0
        if chunk:
            yield chunk, after

    def _say_end(self, epoch: int) -> None:
        if not self._said_end:
            self._say(f"{self._documents.title}: read to its end; training goes on from its start, as epoch "
                      f"{epoch + 1}")
            self._said_end = True


def _place(number: int, epoch: int, cursor: Any, left: np.ndarray) -> dict[str, Any]:
    return {"number": number, "epoch": epoch, "cursor": cursor, "left": torch.from_numpy(left)}
