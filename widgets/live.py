"""Keeps the panel's one figure current without ever being waited for.

One thread writes the figure. It reads the run's store, so training does not know of it; it sends the newest
state and forgets the rest; it keeps one update in flight, and the browser's answer to an update, which plotly
gives when it has drawn, says what drawing costs. The interval follows: drawing takes less than a tenth of the
time, and to make the update, which a long run makes dear, a small part of this process'. Where nobody answers,
nobody looks, and almost nothing is sent.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from moe_core.session import BUSY
from widgets.feed import Feed
from widgets.figures import WIDTH, panel_parts, step_axes
from widgets.panel_widget import PanelFigure

TICK = 0.25  # seconds between two looks at the run
DRAWING_SHARE = 0.08  # of the time may go into drawing; painting, which follows an answer, is not in it
OWN_SHARE = 0.03  # of the time may go into making updates, in the process that may be training
FIRST, SHORTEST, LONGEST = 1.0, 0.25, 30.0  # seconds between two updates while a browser answers
PATIENCE = 2.0  # seconds until an update counts as unanswered, twice as many after each further one
RARELY = 30.0  # seconds between two updates when none was answered for long
FIRST_WORDS = 3  # answers after a page was loaded that are answered with the whole figure
TRIES = 5  # unanswered updates without news after which only a browser's call brings another
LIVE_POINTS = 600  # of a line: more than it has pixels, in most windows


class Live:
    """The thread behind a panel: ``figure`` follows ``run``, ``tick`` is called a few times a second.

    ``news(events)`` hears of each event once, as the store reads it; ``report(error)`` what goes wrong in the
    thread, which goes on after a while.
    """

    def __init__(self, run, tick: Callable[[], None] = lambda: None,
                 news: Callable[[list[dict]], None] = lambda events: None,
                 report: Callable[[Exception], None] = lambda error: None):
        """The figure is there at once, with the whole history; :meth:`start` begins to follow."""
        self._run, self._tick, self._report = run, tick, report
        self._feed, self._width, self._window, self._others = Feed(run, news), WIDTH, None, True
        self._feed.refresh()
        self._traces, self._layout = self._parts()
        self.figure = PanelFigure(self._traces, self._layout | {"template": "none"}, self._on_drawn, self._on_zoomed)
        self.interval = FIRST  # seconds between two updates
        self._took: deque[float] = deque(maxlen=5)  # seconds from an update to its answer
        self._own = 0.0  # seconds that the last update took to make
        self._sent_at, self._waiting, self._unanswered = 0.0, set(), 0  # waiting: edit ids without an answer
        self._stale, self._kept = False, True  # there is something to show; a new page gets what is shown
        self._expected = 0  # answers that may come of a view that is being made
        self._warming = self._reloaded = False
        self._wanted: deque[tuple[str, object]] = deque()
        self._wake, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="moe-panel", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def drawing(self) -> float | None:
        """Seconds that the browser takes for an update, median of the last ones; None before the first."""
        return statistics.median(self._took) if self._took else None

    def wake(self) -> None:
        """Look at the run now, not at the next tick."""
        self._wake.set()

    def select(self, layer: int | None) -> None:
        """Show this layer, None for the mean of all."""
        self._want("layer", layer)

    def resize(self, width: int) -> None:
        """Lay out for this many pixels."""
        self._want("width", width)

    def show_others(self, shown: bool) -> None:
        """Draw the other branches, or leave them out."""
        self._want("others", shown)

    @property
    def has_others(self) -> bool:
        """Whether the run has other branches with lines to draw."""
        return bool(self._feed.others)

    def expect(self) -> None:
        """A page is about to show the figure anew, and will need all of it."""
        self._expected = FIRST_WORDS
        self._reload()

    def close(self) -> None:
        """Stop following; the figure stays as it is. Waits for the thread."""
        self._closed = True
        self.wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    # ---- the thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause = TICK
        while not self._closed:
            self._wake.wait(pause)
            self._wake.clear()
            try:
                self._tick()
                if not self._closed:  # the run may be, and the panel with it
                    self._update()
                pause = TICK
            except Exception as error:  # a panel that shows its error beats one that stands still
                self._report(error)
                pause = min(2 * pause + 1, RARELY)

    def _update(self) -> None:
        asked = False
        while self._wanted:
            name, value = self._wanted.popleft()
            if name == "layer":
                self._feed.select(value)
            else:
                setattr(self, f"_{name}", value)
            asked = True
        resting = self._run.session.state not in BUSY
        if asked or self._due(resting):
            if self._feed.refresh() or asked:
                self._stale = True
            overdue = bool(self._waiting) and not asked
            if self._stale or overdue:
                self._send(overdue)
        if asked or (resting and not self._stale and not self._kept):
            self.figure.keep()
            self._kept = True

    def _due(self, resting: bool) -> bool:
        waited = time.perf_counter() - self._sent_at
        if self._reloaded:
            return True
        if not self._waiting:
            # At rest a last row or a note is shown at once: it is one update, not one of many.
            return waited >= (SHORTEST if resting else self.interval)
        if resting and self._unanswered >= TRIES and self._run.current_step == self._feed.last_step:
            return False
        return waited >= min(PATIENCE * 2**self._unanswered, RARELY)

    def _parts(self) -> tuple[list[dict], dict]:
        feed = self._feed
        traces, layout = panel_parts(
            feed.metrics, feed.shares, feed.marks, feed.layer, self._width, LIVE_POINTS, self._window,
            others=feed.others if self._others else {}, top_k=self._run.config.router.top_k)
        # A figure left to size itself takes the size of the moment it is made, before it is in the page, and
        # later follows the window but no side bar.
        return traces, layout | {"width": self._width, "autosize": False}

    def _send(self, again: bool) -> None:
        """Bring the figure up to date, and the browser: with what is new, or ``again`` with all of it."""
        started = time.thread_time()
        traces, layout = self._parts()
        figure = self.figure
        with figure.guard:
            whole = again or self._reloaded
            self._unanswered = self._unanswered + 1 if again else 0
            self._stale = self._kept = self._reloaded = False
            self._sent_at, before = time.perf_counter(), figure._last_trace_edit_id
            with figure.batch_update():
                for shown, old, new in zip(figure.data, self._traces, traces, strict=True):
                    for path, value in _changes(old, new):
                        shown[path] = value
                for path, value in _changes(self._layout, layout):
                    figure.layout[path] = value
            if whole:
                figure.send_whole()
            self._traces, self._layout = traces, layout
            self._waiting.update(range(before + 1, figure._last_trace_edit_id + 1))
            self._own = time.thread_time() - started

    def _on_drawn(self, edit_id: int) -> None:
        """The browser has drawn. Called on the kernel's thread for messages, under the figure's guard."""
        if self._expected:
            # Who speaks may be the view that is being made, which shows what was kept last and missed what was
            # sent since, or one that was there before: all of it again, for the next few answers.
            self._expected -= 1
            self._waiting.clear()
            self._reload()
        elif edit_id == max(self._waiting, default=None):  # any other is a second view's, or came late
            self._waiting.clear()
            if not self._warming:  # a page's first drawing takes several times as long as the next ones
                self._took.append(time.perf_counter() - self._sent_at)
                self.interval = min(max(self.drawing / DRAWING_SHARE, self._own / OWN_SHARE, SHORTEST), LONGEST)
            self._warming = False
        self._unanswered = 0

    def _reload(self) -> None:
        self._stale = self._warming = self._reloaded = True
        self.wake()

    def _on_zoomed(self, changes: dict) -> None:
        """A person has moved the step axis: draw what is in sight in full detail. As :meth:`_on_drawn`."""
        steps = step_axes(self._layout)
        for name in steps:
            window = changes.get(f"{name}.range", (changes.get(f"{name}.range[0]"), changes.get(f"{name}.range[1]")))
            if None not in window:
                return self._want("window", tuple(window))
        if any(changes.get(f"{name}.autorange") for name in steps):
            self._want("window", None)

    def _want(self, name: str, value) -> None:
        self._wanted.append((name, value))
        self.wake()


def _changes(old, new, path: str = "") -> Iterator[tuple[str, object]]:
    """What to set, by plotly's dotted path, to make ``old`` into ``new``."""
    if isinstance(new, dict):
        for key, value in new.items():
            yield from _changes(old[key], value, f"{path}.{key}" if path else key)
    elif isinstance(new, list) and new and isinstance(new[0], dict):
        for i, value in enumerate(new):
            yield from _changes(old[i], value, f"{path}[{i}]")
    elif isinstance(new, np.ndarray) or new != old:  # plotly itself leaves out an array that is the same
        yield path, new
