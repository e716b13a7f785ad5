"""Items made ready ahead by a thread; the place that a checkpoint saves is the one after the last item taken."""

from __future__ import annotations

import atexit
import copy
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from moe_core.data.batches import Batches

_EXIT_SECONDS = 10.0  # that the interpreter's end waits for a thread that is in native code


class _Line:
    """One run of the thread, and all that it shares with :class:`Ahead`, to which it holds no reference."""

    def __init__(self, make: Callable[[Any, threading.Event], Iterator[tuple[Any, Any]]], place: Any, depth: int):
        self.stop = threading.Event()
        self._depth = depth
        self.ready: deque[tuple[Any, Any]] = deque()
        self._changed = threading.Condition()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, args=(make, place), name="moe-data", daemon=True)
        _lines.add(self)
        self.thread.start()

    def _work(self, make, place) -> None:
        error: BaseException = RuntimeError("the data was closed while it was waited for")
        try:
            items = make(place, self.stop)
            while self._has_room():
                item = next(items)
                with self._changed:
                    self.ready.append(item)
                    self._changed.notify_all()
        except BaseException as raised:
            # Nobody reads the traceback of a line that was ended, and it would hold all that it used.
            error = raised.with_traceback(None) if self.stop.is_set() else raised
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def _has_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.stop.is_set() or len(self.ready) < self._depth)
            return not self.stop.is_set()

    def take(self) -> tuple[Any, Any]:
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self.error is not None)
            if not self.ready:
                raise self.error
            self._changed.notify_all()
            return self.ready.popleft()

    def end(self) -> None:
        self.stop.set()
        with self._changed:
            self._changed.notify_all()


_lines: weakref.WeakSet[_Line] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A daemon thread that is cut short in native code brings the process down at its end."""
    for line in list(_lines):
        line.end()
    for line in list(_lines):
        line.thread.join(_EXIT_SECONDS)


class Ahead:
    """What ``make(place, stop)`` yields from ``place`` on, an item at a time, made ready by a thread.

    ``make`` gives an endless iterator of (item, the place after it), and gives up soon when ``stop`` is set. The
    thread starts when the first item is asked for; at most ``depth`` items are ready or in the making.
    """

    def __init__(self, make: Callable[[Any, threading.Event], Iterator[tuple[Any, Any]]], place: Any, depth: int):
        self._make, self._depth = make, depth
        self.place = place  # after the last item taken
        self._line: _Line | None = None

    def get(self) -> Any:
        """The next item. Raises what making it raised; then the next call tries again from the same place."""
        line = self._line
        if line is not None and line.error is not None and not line.ready:
            # Raised already, or waiting here since some time ago; a dropped connection may be back by now.
            self.close()
            line = None
        item, self.place = (line or self._start()).take()
        return item

    def seek(self, place: Any) -> None:
        """Go on from another place; what was ready is dropped."""
        self.close()
        self.place = place

    def close(self) -> None:
        """End the thread, without waiting for it. :meth:`get` would start another."""
        if self._line is not None:
            self._let_go()
            self._line = None

    def _start(self) -> _Line:
        self._line = _Line(self._make, self.place, self._depth)
        self._let_go = weakref.finalize(self, self._line.end)  # also where nobody calls close()
        return self._line


class Prefetched:
    """:class:`Batches`, ``depth`` of them made ready ahead: copied out of the file and into page-locked memory."""

    def __init__(self, batches: Batches, depth: int):
        self._batches = batches  # knows which places there are; the threads move copies of it
        self._ahead = Ahead(_Following(batches), batches.state_dict(), depth)

    def next(self) -> Tensor:
        """The next batch, int64 [B, S + 1]."""
        return self._ahead.get()

    def state_dict(self) -> dict[str, int]:
        """Where :meth:`next` goes on, whatever is ready already."""
        return dict(self._ahead.place)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at exactly this place. Raises DataError when these tokens have no such place."""
        if state != self._ahead.place:
            self._batches.load_state_dict(state)
            self._ahead.seek(dict(state))

    def close(self) -> None:
        """End the thread."""
        self._ahead.close()


class _Following:
    """The batches after a place, with the place after each."""

    def __init__(self, batches: Batches):
        self._batches = batches

    def __call__(self, place: dict[str, int], stop: threading.Event) -> Iterator[tuple[Tensor, dict[str, int]]]:
        own = copy.copy(self._batches)  # shares the mapped file; a thread that was let go may still be reading
        own.load_state_dict(place)
        while True:
            yield own.next(), own.state_dict()
