"""A shoot-out to look at: every entry's loss over steps, tokens and seconds, as a figure or live while it trains.

:func:`shootout_figure` is a pure function of the runs' rows; :class:`ShootoutView` feeds the same traces to one
figure from the runs' stores, so that whoever trains does not know of it.
"""

from __future__ import annotations

import html
import itertools
import math
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import ipywidgets as ipw
import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_core.shootout import Shootout
from moe_core.shootout.table import TAIL, Line
from widgets.charts import STEP, Chart
from widgets.colors import expert_colors
from widgets.figures import MEDIUM, WIDTH, Place, arrange
from widgets.marks import Marks
from widgets.panel_widget import PanelFigure
from widgets.series import POINTS, thin
from widgets.workbench import answer_while_cells_run

Lines = Mapping[str, Mapping[int, Line]]  # label -> seed -> what that run has left, as Shootout.lines() gives it
OVER = {"steps": STEP, "tokens": "tokens", "seconds": "seconds of training"}
FORMATS = {"steps": ",d", "tokens": "~s", "seconds": ""}
VALUES = {"train/ce": "Train cross-entropy", "val/loss": "Validation loss"}
UIDS = {"train/ce": "train", "val/loss": "val"}
LIVE_POINTS, LIVE_WIDTH = 300, 960  # of a line, seeds together; pixels, which a notebook's cell has on most screens
SHORTEST, LONGEST, DRAWING_SHARE = 2.0, 10.0, 0.08  # seconds between two updates; of the time goes into drawing
STYLE = """<style>.moe-shootout { overflow-x: auto; font-size: 12px; line-height: 1.5 }
.moe-shootout th, .moe-shootout td { padding: 1px 10px 1px 0; white-space: nowrap; text-align: right }</style>"""
KEY = 22  # pixels of a row of the key above the charts

_views: weakref.WeakValueDictionary[Path, ShootoutView] = weakref.WeakValueDictionary()


def shootout_figure(lines: Lines, over: Sequence[str] = tuple(OVER), smooth: int | None = None, width: int = WIDTH,
                    limit: int = POINTS) -> go.Figure:
    """Train cross-entropy and validation loss over each of ``over``: steps, tokens, seconds.

    A colour an entry: its seeds thin, their mean bold. ``smooth``: steps of the training loss' running mean (None:
    5 % of them, so that its last point is the loss in the table; 1: as it is); ``width``: pixels to lay out for;
    ``limit``: most points of a line. Raises ValueError for another ``over``.
    """
    traces, layout = shootout_parts(lines, over, smooth, width, limit)
    return go.Figure(traces, layout | {"width": width, "template": "none"})


def shootout_parts(lines: Lines, over: Sequence[str] = tuple(OVER), smooth: int | None = None, width: int = WIDTH,
                   limit: int = POINTS) -> tuple[list[dict], dict]:
    """:func:`shootout_figure` as plain traces and layout. Which traces there are depends on the labels alone."""
    for name in over:
        if name not in OVER:
            raise ValueError(f"over = {name!r}: must be one of {', '.join(OVER)}")
    beside = len(over) == 1 and width >= MEDIUM
    places = []
    for (row, value), (column, x) in itertools.product(enumerate(VALUES), enumerate(over)):
        chart = _chart(lines, value, x, smooth, limit, key=row == column == 0)
        places.append(Place(chart, 0, row) if beside else Place(chart, row, column))
    traces, layout = arrange(places, Marks(), width)
    traces = [trace for trace in traces if not trace["uid"].endswith("-marks")]  # there are none to show
    entry = 50 + 7 * max(map(len, lines), default=0)
    room = KEY * -(-entry * len(lines) // width)
    layout["height"] += room
    layout["margin"] = layout["margin"] | {"t": room}
    layout["showlegend"] = True
    layout["legend"] |= {"x": 0.01, "y": 1, "yanchor": "bottom", "title": {"text": ""}, "entrywidth": entry - 40}
    return traces, layout


def _chart(lines: Lines, value: str, over: str, smooth: int | None, limit: int, key: bool) -> Chart:
    traces, means, start = [], [], []
    for i, (label, color) in enumerate(zip(lines, expert_colors(len(lines)), strict=True)):
        seeds = [_points(line, value, over, smooth) for line in lines[label].values()]
        done = [s for s, line in zip(seeds, lines[label].values(), strict=True) if line.done]
        mean = _mean(done or seeds[:1])
        hover = f"{label} %{{y:.4f}}<br>{OVER[over]} %{{x:,.5~g}}<extra></extra>"
        uid, alike = f"{UIDS[value]}-{over}-{i}", {"type": "scatter", "legendgroup": label, "hovertemplate": hover}
        x, y = _joined(seeds if len(seeds) > 1 else [], limit)
        traces.append(alike | {"uid": f"{uid}-seeds", "x": x, "y": y, "mode": "lines", "opacity": 0.35,
                               "line": {"color": color, "width": 1}, "showlegend": False})
        x, y = thin(*mean.T, limit)
        traces.append(alike | {"uid": uid, "x": x, "y": y, "name": label, "line": {"color": color, "width": 2},
                               "mode": "lines+markers" if value == "val/loss" and len(x) <= 40 else "lines",
                               "marker": {"size": 4}, "showlegend": key})
        if len(mean) > 5:
            means.append(mean[:, 1])
            start.append(mean[len(mean) // 6, 1])
    y_axis: dict = {"title": "nats per token"}
    if start:  # the first sixth falls so far that it would press all that follows flat
        low, high = float(np.nanmin(np.concatenate(means))), float(np.nanmax(start))
        if high > low:
            y_axis["range"] = [low - 0.05 * (high - low), high]
    title = VALUES[value] if value == "val/loss" or smooth == 1 else f"{VALUES[value]}, running mean"
    return Chart(f"{UIDS[value]}-{over}", f"<b>{title}</b>", tuple(traces), y=y_axis, over_steps=over == "steps",
                 x={"title": OVER[over], "rangemode": "tozero", "tickformat": FORMATS[over], "showgrid": False})


def _points(line: Line, value: str, over: str, smooth: int | None) -> np.ndarray:
    """[n, 2] of one run: x and the value, where it was measured."""
    rows: pd.DataFrame = line.rows
    y = rows[value]
    if value == "train/ce":
        y = y.rolling(smooth or max(round(TAIL * len(rows)), 1), min_periods=1).mean()
    x = rows.index if over == "steps" else rows[over]
    return np.stack([np.asarray(x, np.float64), y.to_numpy(np.float64)], 1)[y.notna().to_numpy()]


def _mean(seeds: list[np.ndarray]) -> np.ndarray:
    """[n, 2]: the mean over seeds, point by point, as far as the shortest goes."""
    if not seeds:
        return np.zeros((0, 2))
    n = min(map(len, seeds))
    return np.mean([points[:n] for points in seeds], 0)


def _joined(seeds: list[np.ndarray], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Several lines as one trace, with a gap between two."""
    gap, parts = np.full((1, 2), np.nan, np.float32), []
    for points in seeds:
        parts += [np.stack(thin(*points.T, max(limit // len(seeds), 8)), 1), gap]
    joined = np.concatenate(parts) if parts else np.zeros((0, 2), np.float32)
    return joined[:, 0], joined[:, 1]


class ShootoutView(ipw.VBox):
    """A shoot-out while it trains, here or in another process: one figure, what is done, and the table so far.

    It reads the runs' stores and follows until every run is done. Made again for the same shoot-out it takes the
    earlier one's place.
    """

    def __init__(self, shootout: Shootout, over: str = "steps"):
        """``over``: what the charts begin with, steps, tokens or seconds; the page can change it."""
        answer_while_cells_run()
        place = shootout.folder.resolve()
        if (earlier := _views.get(place)) is not None:
            earlier.close()
        self.shootout, self.interval = shootout, SHORTEST
        self._ended: dict[str, Line | None] = {}  # runs that are done, by name; None for those of the search
        self._tabled = -1  # how many were when the table was made
        self.over = ipw.ToggleButtons(options=list(OVER), value=over, tooltips=[f"Over {x}" for x in OVER.values()],
                                      style=ipw.ToggleButtonsStyle(button_width="90px"))
        self.smooth = ipw.Checkbox(value=True, description="smooth the training loss", indent=False,
                                   layout=ipw.Layout(width="auto"))
        self.status, self.table = ipw.HTML(layout=ipw.Layout(margin="0 0 0 16px")), ipw.HTML()
        self._look()
        traces, layout = self._parts()
        self.figure = PanelFigure(traces, layout | {"template": "none"}, self._on_drawn, lambda changes: None)
        self._sent_at, self._shown = time.perf_counter(), self._state()
        super().__init__([ipw.HBox([self.over, self.smooth, self.status]), self.figure, self.table])
        self._say()
        self._wake, self._closed = threading.Event(), False
        for control in (self.over, self.smooth):
            control.observe(lambda change: self._wake.set(), "value")
        self._thread = threading.Thread(target=self._follow, name="moe-shootout-view", daemon=True)
        self._thread.start()
        _views[place] = self

    def close(self) -> None:
        """Stop following and take the view off the page. Closing twice is fine."""
        self._closed = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        for part in (self.over, self.smooth, self.status, self.figure, self.table):
            part.close()
        super().close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every run is done and shown; False when ``timeout`` seconds pass first, or it is closed."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self._closed and time.monotonic() < end:
            if self._all_done and self._shown == self._state():
                return True
            time.sleep(0.05)
        return False

    def __repr__(self) -> str:
        return f"ShootoutView({str(self.shootout.folder)!r}: {len(self._ended)} of {len(self._jobs)} runs done)"

    @property
    def _all_done(self) -> bool:
        return len(self._ended) == len(self._jobs)

    def _follow(self) -> None:
        while not self._closed:
            self._wake.wait(None if self._all_done else self.interval)
            self._wake.clear()
            if self._closed:
                return
            try:
                self._look()
                if self._shown != (state := self._state()):
                    self._send()
                    self._shown = state
            except Exception as error:  # a view that says its error beats one that stands still
                self.status.value = html.escape(f"{type(error).__name__}: {error}")
                self.interval = min(2 * self.interval, 60.0)

    def _look(self) -> None:
        """Read what there is; a run that is done is read once."""
        self._jobs = self.shootout.jobs()
        lines: dict[str, dict[int, Line]] = {label: {} for label in self.shootout.entries}
        for job in self._jobs:
            if job.name not in self._ended:
                line = None if job.pair else self.shootout.line(job)
                if self.shootout.finished(job) if job.pair else line is not None and (line.done or line.diverged):
                    self._ended[job.name] = line
            else:
                line = self._ended[job.name]
            if line is not None and len(line.rows):
                lines[job.label][job.seed] = line
        self._lines = lines

    def _state(self) -> tuple:
        """What decides on the picture."""
        rows = tuple(len(line.rows) for by_seed in self._lines.values() for line in by_seed.values())
        return self.over.value, self.smooth.value, len(self._ended), rows

    def _parts(self) -> tuple[list[dict], dict]:
        traces, layout = shootout_parts(self._lines, [self.over.value], None if self.smooth.value else 1,
                                        LIVE_WIDTH, LIVE_POINTS)
        # Left to size itself it would take the size of the moment when it is made, before it is in the page.
        return traces, layout | {"width": LIVE_WIDTH, "autosize": False}

    def _send(self) -> None:
        traces, layout = self._parts()
        with self.figure.guard:
            with self.figure.batch_update():
                for shown, new in zip(self.figure.data, traces, strict=True):
                    for name in ("x", "y", "mode", "hovertemplate"):
                        shown[name] = new[name]
                for name in ("xaxis", "xaxis2", "yaxis", "yaxis4"):  # of the two charts
                    self.figure.layout[name].update(layout[name])
                for shown, new in zip(self.figure.layout.annotations, layout["annotations"], strict=True):
                    shown.text = new["text"]
            self._sent_at = time.perf_counter()
            if self._all_done:
                self.figure.keep()  # what a page that is loaded anew gets
        self._say()

    def _on_drawn(self, edit_id: int) -> None:
        took = time.perf_counter() - self._sent_at
        self.interval = min(max(took / DRAWING_SHARE, SHORTEST), LONGEST)

    def _say(self) -> None:
        at = [f"{job.name} at step {self._lines[job.label][job.seed].rows.index[-1]:,}" for job in self._jobs
              if job.name not in self._ended and job.pair is None and job.seed in self._lines[job.label]]
        said = "; ".join([f"{len(self._ended)} of {len(self._jobs)} runs done", *at])
        self.status.value = said
        if len(self._ended) != self._tabled:
            self._tabled = len(self._ended)
            self.table.value = table_html(self.shootout.summary())


def table_html(frame: pd.DataFrame) -> str:
    """The table of :meth:`moe_core.shootout.Shootout.summary` for a page, the baseline named above it."""
    shown = frame.drop(columns=[name for name in ("peak MiB", "note") if frame[name].isin(["", np.nan]).all()])
    formats = {"ms/it": "{:.1f}", "tok/s": "{:,.0f}", "steps to baseline": "{:.0f}", "seconds to baseline": "{:.1f}",
               "difference": "{:+.4f}", "low": "{:+.4f}", "high": "{:+.4f}", "peak MiB": "{:.0f}"}
    formats |= {name: "{:.4f}" for name in ("loss", "loss std", "val/loss", "val/loss std")}
    columns = {name: (lambda value, form=form: "" if value != value else form.format(value))
               for name, form in formats.items() if name in shown}
    shown = shown.assign(**{"within spread": ["" if pd.isna(x) else "yes" if x else "no"
                                              for x in shown["within spread"]]})
    page = shown.to_html(index=False, border=0, formatters=columns, na_rep="")
    return (f'{STYLE}<div class="moe-shootout">differences, and steps and seconds to its last loss: against '
            f"<b>{frame.attrs['baseline']}</b>{page}</div>")
