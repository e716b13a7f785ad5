"""Training in a background thread, steered at step boundaries.

A session owns the one thread that moves its run. Whoever wants something posts a :class:`Command`; it is
applied at the next step boundary, before the forward pass, and written down with the step from which it
holds. While nothing trains the run stands at a boundary, so a command is applied at once. On a GPU the next step may
be under way when a command comes; it ends first.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_core.checked import whole
from moe_core.store import StoreError
from moe_core.trainer import MemoryLimitError, NonFiniteError

BUSY = ("training", "pausing", "moving")  # moving: to another step or branch
_alive: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A step cut short by the interpreter's end would crash in native code; let each finish its own."""
    for session in list(_alive):
        session.close()


if hasattr(os, "register_at_fork"):  # a child has none of the threads, and must not wait for them at its end
    os.register_at_fork(after_in_child=_alive.clear)


@dataclass(frozen=True)
class Command:
    """A wish: ``kind`` ("knob", "note", "checkpoint", "finding" or "look"), what it says, and when it was asked.

    ``asked``: seconds since 1970. "look" reads the state between two steps and is not written down.
    """

    kind: str
    payload: dict
    asked: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Progress:
    """Where a run stands. ``tok_s`` and ``seconds_left`` are of the present chunk; None before its first step."""

    state: str  # idle, training, pausing, paused, moving or failed
    step: int
    chunk_done: int
    chunk_total: int
    tok_s: float | None
    seconds_left: float | None
    error: str | None


class Session:
    """``Session(run)``: the run in a background thread. A second one for the same run closes the first."""

    def __init__(self, run):
        if run.session is not None:
            run.session.close()
        run.session = self
        self._run = run
        self._changed = threading.Condition()  # guards all below; never held while a step is computed
        self._queue: deque[Command] = deque()
        self._state = "idle"
        self._done = self._total = 0
        self._stepping = False  # between the boundary before a step and the count of it
        self.chunk_start = run.current_step  # the step that the present chunk, or the last one, began after
        self._clock = 0.0
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        _alive.add(self)

    @property
    def state(self) -> str:
        """"idle", "training", "pausing", "paused", "moving" (to another step or branch) or "failed"."""
        return self._state

    @property
    def closed(self) -> bool:
        """Whether it was closed: it takes no more steps, and another may be in its place."""
        return self._closed

    def start(self, n: int) -> None:
        """Train ``n`` optimizer steps more; returns at once. While a chunk's steps run, it grows by ``n``."""
        n = whole("n", n)
        with self._changed:
            self._changed.wait_for(lambda: self._state != "moving")
            self._refuse_closed()
            if self._state in BUSY:
                if self._state == "pausing":  # what was left is dropped, but for the step that is being taken
                    self._total = self._done + self._stepping
                self._total += n
                self._state = "training"
            else:
                self._done, self._total = 0, n
                self._launch("training", self._train)

    def move(self, go: Callable[[], None]) -> None:
        """Have the session's thread call ``go`` while nothing trains; pauses first. Returns at once.

        For what takes the run to another step or branch. :meth:`wait` waits for it and raises what it raised.
        """
        self.pause()
        with self._changed:
            self._changed.wait_for(lambda: self._state not in BUSY)
            self._refuse_closed()
            self._done = self._total = 0
            self._launch("moving", lambda: (go(), self._rest("idle")))

    def _refuse_closed(self) -> None:
        if self._closed and self._run.session is not self:
            raise RuntimeError("this session is closed; use run.session, the one that took its place")
        if self._closed:
            raise RuntimeError(f"{self._run.path}: is closed; mc.Run.open comes back to it")

    def _launch(self, state: str, work: Callable[[], None]) -> None:
        self._error, self._state = None, state
        self._mark_chunk()
        self._thread = threading.Thread(target=self._work, args=(work,), name="moe-training", daemon=True)
        self._thread.start()
        self._changed.notify_all()

    def _mark_chunk(self) -> None:
        self._clock, self.chunk_start = time.perf_counter(), self._run.current_step

    def pause(self) -> None:
        """Stop at the next step boundary; what is left of the chunk is dropped. Returns at once."""
        with self._changed:
            if self._state == "training":
                self._state = "pausing"
                self._changed.notify_all()

    def post(self, command: Command) -> None:
        """Have ``command`` applied at the next step boundary; at once when nothing trains."""
        with self._changed:
            self._queue.append(command)
            if self._state in BUSY:
                return
            if not self._run.needs_state(command):
                return self._drain()
            self._launch("moving", lambda: (self._run.resume(), self._rest("idle")))
        self.wait()  # outside of the lock: to get there may take steps

    def pending(self) -> list[Command]:
        """What was posted and is not applied yet, oldest first."""
        with self._changed:
            return list(self._queue)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing trains; False when ``timeout`` seconds pass first.

        Raises what the training thread raised, if it did.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._state not in BUSY, timeout):
                return False
            if self._error is not None:
                raise self._error
            return True

    def progress(self) -> Progress:
        """Where the run stands now."""
        with self._changed:
            took = time.perf_counter() - self._clock
            left = took / self._done * (self._total - self._done) if self._done else None
            return Progress(
                self._state, self._run.current_step, self._done, self._total,
                self._done * self._run.config.tokens_per_step / took if self._done and self._state in BUSY else None,
                left if self._state in BUSY else None,
                None if self._error is None else f"{type(self._error).__name__}: {self._error}")

    def close(self) -> None:
        """Stop at the next step boundary and wait for it. The run stays as it is; closing twice is fine."""
        with self._changed:
            self._closed = True
            thread = self._thread
        self.pause()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # whatever it is, it must reach the person and not die with the thread
            try:
                self._run.record_error(error)
            except Exception as second:
                error.add_note(f"and it could not be written to the run's events: {second}")
            # A step that is not finite or does not fit is not applied: the run is whole, and can go on.
            self._rest("paused" if isinstance(error, NonFiniteError | MemoryLimitError) else "failed", error)

    def _train(self) -> None:
        while True:
            if not self._run.begin_chunk(lambda: self._state == "training"):
                return self._rest("paused")
            while self._boundary():
                self._run.advance(more=self._another())
                with self._changed:
                    self._done += 1
                    self._stepping = False
                    self._changed.notify_all()
            self._run.end_chunk()
            with self._changed:
                if self._state == "pausing" or self._done == self._total:
                    return self._rest("paused" if self._done < self._total else "idle")
                # Asked for while the last one was being saved: a chunk of its own, that can be undone alone.
                self._done, self._total = 0, self._total - self._done
                self._mark_chunk()

    def _another(self) -> bool:
        """Whether a step follows the next one with nothing between them, so that it need not wait for its numbers."""
        with self._changed:
            return self._state == "training" and self._done + 1 < self._total and not self._queue

    def _boundary(self) -> bool:
        """Apply what was posted; True if one more step is wanted, or is under way already."""
        with self._changed:
            if not self._run.under_way:
                self._drain()
            self._stepping = self._run.under_way or (self._state == "training" and self._done < self._total)
            return self._stepping

    def _rest(self, state: str, error: BaseException | None = None) -> None:
        with self._changed:
            if error is None and self._state != "moving":
                self._drain()  # what was posted since the last boundary, by who does not wait to hear of it
            self._state, self._error, self._stepping = state, error, False
            self._changed.notify_all()
            if error is None:
                self._drain()

    def _drain(self) -> None:
        while self._queue:
            try:
                self._run.apply(self._queue[0])
            except StoreError:  # a full disk, say: the wish stays, for the next boundary
                raise
            except Exception as error:  # it cannot be done, now or later, and must not stand in the way of the others
                command = self._queue.popleft()
                if self._state not in BUSY:
                    raise
                self._run.refuse(command, error)  # nor stop a night of training
            else:
                self._queue.popleft()
