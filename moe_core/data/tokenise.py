"""Text to token ids, many documents at a time: in threads of this process, or in processes of their own.

The tokenizers library shares a call out over the cores by itself and lets go of Python's lock; what it leaves to
Python, making arrays of its lists, costs about a fortieth of the work. Beyond some twenty cores, or beside a
training loop that needs Python's lock itself, processes do that part too (``num_workers``).

This file is also the program of such a process, run by its path: it imports no torch and nothing of moe_core.
Frames on its pipes are 8 bytes of length, then the content: the tokenizer, then JSON lists of documents; back, ids.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np


def joined(backend, documents: list[list[str]], end: int, dtype) -> np.ndarray:
    """The ids of the documents, 1-D, with ``end`` after each; a document is the parts that it is tokenised in."""
    encodings = backend.encode_batch_fast([part for parts in documents for part in parts], add_special_tokens=False)
    lists = [encoding.ids for encoding in encodings]
    out = np.empty(sum(map(len, lists)) + len(documents), dtype)
    at, following = 0, iter(lists)
    for parts in documents:
        for ids in itertools.islice(following, len(parts)):
            out[at : at + len(ids)] = np.fromiter(ids, dtype, len(ids))
            at += len(ids)
        out[at] = end
        at += 1
    return out


class Tokenisers:
    """``submit(documents)`` gives a future of :func:`joined` ids; ``workers`` processes, or threads where it is 0."""

    def __init__(self, backend, end: int, dtype, workers: int):
        self._backend, self._end, self._dtype = backend, end, np.dtype(dtype)
        # Two threads: while one makes arrays under Python's lock, the other's text keeps the cores busy.
        self._pool = ThreadPoolExecutor(workers or 2, thread_name_prefix="moe-tokenise")
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes = [_Process(backend, end, self._dtype) for _ in range(workers)]
        for process in self._processes:
            self._idle.put(process)
        self._let_go = weakref.finalize(self, _end, self._pool, self._processes)

    def submit(self, documents: list[list[str]]) -> Future[np.ndarray]:
        if self._processes:
            return self._pool.submit(_in_a_process, self._idle, documents)
        return self._pool.submit(joined, self._backend, documents, self._end, self._dtype)

    def close(self) -> None:
        """End the threads and processes."""
        self._let_go()


def _end(pool: ThreadPoolExecutor, processes: list[_Process]) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.end()


def _in_a_process(idle: queue.SimpleQueue, documents: list[list[str]]) -> np.ndarray:
    process = idle.get()
    try:
        return process.joined(documents)
    finally:
        idle.put(process)


class _Process:
    """A process of this file, and its pipes. One that has ended is started anew by the next call."""

    def __init__(self, backend, end: int, dtype: np.dtype):
        self._content, self._arguments, self._dtype = backend.to_str().encode(), [str(end), dtype.name], dtype
        self._running: subprocess.Popen | None = None

    def joined(self, documents: list[list[str]]) -> np.ndarray:
        try:
            running = self._running or self._start()
            _write(running.stdin, json.dumps(documents).encode())
            return np.frombuffer(_read(running.stdout), self._dtype)
        except (OSError, EOFError, ValueError) as error:
            from moe_core.data.corpus import DataError

            status = self.end()
            raise DataError(f"num_workers: a process that tokenises has ended (exit status {status}); start training "
                            "again to go on, or use num_workers = 0") from error

    def _start(self) -> subprocess.Popen:
        # By its path, and with Python's safe path: no neighbour of this file is taken for a module.
        self._running = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__), *self._arguments], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        _write(self._running.stdin, self._content)
        return self._running

    def end(self) -> int | None:
        running, self._running = self._running, None
        if running is None:
            return None
        running.kill()
        with contextlib.suppress(OSError):  # what it was being told is lost with it
            running.stdin.close()
        running.stdout.close()
        return running.wait()


def _write(file, content: bytes) -> None:
    file.write(len(content).to_bytes(8, "little") + content)
    file.flush()


def _read(file) -> bytes:
    head = file.read(8)
    content = file.read(size := int.from_bytes(head, "little"))
    if len(head) < 8 or len(content) < size:
        raise EOFError
    return content


def _main(end: int, dtype: str) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(_read(sys.stdin.buffer).decode())
    while True:
        _write(sys.stdout.buffer, joined(backend, json.loads(_read(sys.stdin.buffer)), end, dtype).tobytes())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's interrupt is for the process that trains
    with contextlib.suppress(EOFError, BrokenPipeError):  # the other side is gone
        _main(int(sys.argv[1]), sys.argv[2])
