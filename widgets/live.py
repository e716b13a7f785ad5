"""Keeps the panel's one figure current without ever being waited for.

One thread writes the figure. It reads the run's store, so training does not know of it; it sends the newest
state and forgets the rest; it keeps one update in flight, and the browser's answer to an update, which plotly
gives when it has drawn, says what drawing costs. The interval follows: drawing takes less than a tenth of the
time. Where nobody answers, nobody looks, and almost nothing is sent.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy

import numpy as np
import plotly.graph_objects as go
from plotly.basedatatypes import Undefined
from plotly.serializers import custom_serializers
from traitlets import Dict, observe

from moe_core.session import BUSY
from widgets.feed import Feed
from widgets.figures import WIDTH, panel_parts, step_axes

TICK = 0.25  # seconds between two looks at the run
DRAWING_SHARE = 0.08  # of the time may go into drawing; what follows an answer, painting, is not in it
FIRST, SHORTEST, LONGEST = 1.0, 0.25, 30.0  # seconds between two updates while a browser answers
PATIENCE = 2.0  # seconds until an update counts as unanswered, twice as many after each further one
RARELY = 30.0  # seconds between two updates when none was answered for long
TRIES = 5  # unanswered updates without news after which only a browser's call brings another
LIVE_POINTS = 600  # of a line: more than it has pixels, in most windows
MOVING = ("x", "y", "z", "customdata", "text", "marker.symbol", "marker.opacity")  # what grows in a trace


class PanelFigure(go.FigureWidget):
    """A FigureWidget that hears when a browser has drawn it, at next to no cost.

    Plotly's own handler of that answer copies every trace's defaults back into Python, tens of milliseconds
    that a training thread in the same process would feel; nothing here reads them.
    """

    _set_trace_uid = False  # the charts' own say what a trace is
    _js2py_traceDeltas = Dict(allow_none=True).tag(sync=True, echo_update=False, **custom_serializers)

    def __init__(self, *args, **kwargs):
        self._guard = threading.RLock()
        self._drawn: Callable[[int], None] = lambda edit_id: None
        self._zoomed: Callable[[dict], None] = lambda changes: None
        super().__init__(*args, **kwargs)
        self._config = {"displaylogo": False, "showSendToCloud": False,
                        "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}

    def set_state(self, sync_data):
        # While a message is taken in, traitlets holds all notifications of this object, those of another
        # thread's assignments included, and merges them: an update sent meanwhile would be lost.
        with self._guard:
            super().set_state(sync_data)

    @observe("_js2py_traceDeltas")
    def _handler_js2py_traceDeltas(self, change):
        if change["new"]:
            self._drawn(change["new"]["trace_edit_id"])
            self._js2py_traceDeltas = None

    @observe("_js2py_relayout")
    def _handler_js2py_relayout(self, change):
        if change["new"]:
            self._zoomed(change["new"]["relayout_data"])
        super()._handler_js2py_relayout(change)

    def send_whole(self) -> None:
        """Send everything that moves. Plotly sends what has changed, which a page loaded since cannot build on."""
        restyle = {path: [_at(trace, path) for trace in self._data] for path in MOVING}
        titles = {f"annotations[{i}].text": note.text for i, note in enumerate(self.layout.annotations)}
        self._send_update_msg(restyle, titles, list(range(len(self.data))))

    def keep(self) -> None:
        """Make what is shown the state that a page gets when it is loaded anew."""
        with self._guard, self.hold_sync():
            self._widget_data = deepcopy(self._data)
            self._widget_layout = deepcopy(self._layout)


class Live:
    """The thread behind a panel: ``figure`` follows ``run``, ``tick`` is called a few times a second.

    ``news(events)`` hears of each event once, as the store reads it; ``report(error)`` what goes wrong in the
    thread, which goes on after a while.
    """

    def __init__(self, run, tick: Callable[[], None] = lambda: None,
                 news: Callable[[list[dict]], None] = lambda events: None,
                 report: Callable[[Exception], None] = lambda error: None):
        self._run, self._tick, self._report = run, tick, report
        self._feed, self._width, self._window = Feed(run, news), WIDTH, None
        self._feed.refresh()
        self._traces, self._layout = self._parts()
        self.figure = PanelFigure(self._traces, self._layout | {"template": "none"})
        self.figure._drawn, self.figure._zoomed = self._on_drawn, self._on_zoomed
        self.interval = FIRST  # seconds between two updates
        self._took: deque[float] = deque(maxlen=5)  # seconds from an update to its answer
        self._sent_at, self._waiting, self._unanswered = 0.0, set(), 0  # waiting: edit ids without an answer
        self._stale, self._kept = False, True  # there is something to show; a new page gets what is shown
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
            if self._stale or self._waiting:
                self._send()
        if asked or (resting and not self._stale and not self._kept):
            self.figure.keep()
            self._kept = True

    def _due(self, resting: bool) -> bool:
        waited = time.perf_counter() - self._sent_at
        if not self._waiting:
            # At rest a last row or a note is shown at once: it is one update, not one of many.
            return waited >= (SHORTEST if resting else self.interval)
        if resting and self._unanswered >= TRIES and self._run.current_step == self._feed.last_step:
            return False
        return waited >= min(PATIENCE * 2**self._unanswered, RARELY)

    def _parts(self) -> tuple[list[dict], dict]:
        feed = self._feed
        traces, layout = panel_parts(feed.metrics, feed.shares, feed.marks, feed.layer, self._width, LIVE_POINTS,
                                     self._window)
        # A figure left to size itself takes the size of the moment it is made, before it is in the page, and
        # later follows the window but no side bar.
        return traces, layout | {"width": self._width, "autosize": False}

    def _send(self) -> None:
        traces, layout = self._parts()
        figure = self.figure
        with figure._guard:
            whole = self._reloaded or bool(self._waiting)
            self._unanswered = self._unanswered + 1 if self._waiting else 0
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

    def _on_drawn(self, edit_id: int) -> None:
        """The browser has drawn. Called on the kernel's thread for messages, under the figure's guard."""
        if edit_id not in self._waiting:  # a page that was just loaded: it shows the state that was kept last
            self._stale = self._warming = self._reloaded = True
            self.wake()
        elif edit_id == max(self._waiting):
            self._waiting.clear()
            if not self._warming:  # a page's first drawing takes several times as long as the next ones
                self._took.append(time.perf_counter() - self._sent_at)
                self.interval = min(max(self.drawing / DRAWING_SHARE, SHORTEST), LONGEST)
            self._warming = False
        self._unanswered = 0


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


def _at(trace: dict, path: str):
    """What a trace has at a dotted path; plotly's mark for nothing where it has no such thing."""
    for key in path.split("."):
        trace = trace.get(key, Undefined) if isinstance(trace, dict) else Undefined
    return trace


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
