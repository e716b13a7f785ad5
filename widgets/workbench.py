"""The panel: ``Workbench(run)`` steps a run, turns its knobs and shows how its experts answer."""

from __future__ import annotations

import html
import time
import weakref
from pathlib import Path

import ipywidgets as ipw

from moe_core.face import Face
from moe_core.session import BUSY, Session
from moe_core.trainer import NonFiniteError
from widgets.branches import BranchRow
from widgets.controls import KnobControl, help_of, whole
from widgets.findings import Findings
from widgets.groups import Groups
from widgets.inside import Inside
from widgets.live import Live
from widgets.marks import KEY
from widgets.notes import Log, NoteBox, Refusal
from widgets.page import Page
from widgets.what_if import WhatIf
from widgets.write_up import write_up

COUNT_EVERY, MOVE_EVERY = 1.0, 2.0  # seconds between two looks at the step and the time left; at the knobs

CLOSED = "this run is closed; <code>mc.Run.open</code> goes on with it"
REPLACED = "A newer panel of this run took the place of this one."

_panels: weakref.WeakValueDictionary[Path, Workbench] = weakref.WeakValueDictionary()
_left: dict[Path, ipw.Widget] = {}  # what stands in the place of the panel before a run's newest


def answer_while_cells_run() -> None:
    """Let controls answer while a cell runs.

    ipykernel 7.4 sends a widget's message to the shell that last published on its comm, and not to the
    subshell that the page chose for it: the main shell, where it waits for the cell to end.
    """
    try:
        from ipykernel.comm.comm import BaseComm
    except ImportError:
        return
    if hasattr(BaseComm, "_reply_subshell_for"):
        BaseComm._reply_subshell_for = lambda self, data, default: default


class Workbench(ipw.VBox):
    """The panel of ``run``, which takes the place of an earlier panel of the same run and of its session.

    ``session`` is the :class:`~moe_core.session.Session` that its buttons drive; ``run.step()`` in a cell
    drives the same one. Everything is on disk before the panel shows it, so closing the panel loses nothing.
    Of a run that is attached to (``Run.attach``) it drives the process that trains it, and closing stops nothing.
    """

    def __new__(cls, run, *args, **kwargs):
        if not isinstance(run, Face):  # here, since a widget that was begun would have to be closed
            raise TypeError(f"run = {run!r}: must be a run, from Run.create, Run.open or Run.attach")
        return super().__new__(cls, run, *args, **kwargs)

    def __init__(self, run, chunk: int = 100):
        """``chunk``: the length that the Run button starts with, in steps."""
        answer_while_cells_run()
        place = Path(run.path).resolve()
        if (earlier := _panels.get(place)) is not None:
            earlier.close(REPLACED)
            if place in _left:
                _close(_left[place])
            _left[place] = earlier
        self.run, self.session = run, run.session if run.attached else Session(run)
        self.journal = Log()
        self.live = Live(run, tick=self._tick, news=self.journal.write_events, report=self._failed)
        self.page = Page()
        self.controls = [KnobControl(knob, self.journal, self.live.wake, help_of(name, run.config))
                         for name, knob in run.knobs.items()]
        routed = bool(run.config.model.n_experts)
        self.what_if = WhatIf(run.preview if routed and not run.attached else None)
        self.branches = BranchRow(run, self.journal, self.live.wake)
        self.branches.others.observe(lambda seen: self.live.show_others(seen.new), "value")
        self.write_up = write_up(run, self.journal)
        self.branches.widget.children += (self.write_up.button, self.write_up.says)
        self.notes = NoteBox(run, self.journal, posted=self.live.wake)
        self.findings, self.groups = Findings(run, self.journal, self.live.wake), Groups()
        self._shown, self._last_report, self._gone = self.session.progress(), "", False
        self._counted_at = self._moved_at = 0.0
        self.inside = Inside(run, self.journal) if routed else None
        sections = [self.groups.widget] + ([self.inside.widget] if routed else [])
        super().__init__([self.page, self._run_row(chunk), self._knob_table(), self.branches.widget,
                          self.notes.widget, self.findings.widget, self._charts(), *sections, self.journal.widget])
        self.add_class("moe-workbench")
        self.page.observe(lambda change: self.live.resize(change.new), "width")
        self.page.observe(lambda change: self.live.expect(), "views")
        self.page.observe(lambda change: self.live.wake(), "aim")
        self._tick()
        self.live.start()
        _panels[place] = self

    def __repr__(self) -> str:
        # What a saved notebook shows without a kernel.
        return f"Workbench({Path(self.run.path).name!r}, step {self._shown.step}, {self._shown.state})"

    def start(self, n: int) -> None:
        """Train ``n`` steps more, as the Run button does; returns at once. Wait with ``session.wait()``."""
        self.session.start(n)
        self.live.wake()

    def pause(self) -> None:
        """Stop at the next step boundary, as the Pause button does."""
        self.session.pause()
        self.live.wake()

    def close(self, instead: str = "") -> None:
        """Stop what this process trains at the next step boundary, and take the panel off the page.

        ``instead``: a sentence to leave in its place. Closing twice is fine.
        """
        if not hasattr(self, "live"):
            return  # refused before it was one; ipywidgets closes that too
        if not self.run.attached and self.run.session is self.session:
            Session(self.run)  # which closes that of the panel, and run.step() goes on with it
        self.live.close()
        if not instead or self.comm is None:
            return _close(self)
        parts, self.children = self.children, [ipw.HTML(html.escape(instead))]
        for part in parts:
            _close(part)

    # ---- parts -------------------------------------------------------------------------------------------

    def _run_row(self, chunk: int) -> ipw.Box:
        self.refused = Refusal()
        self.chunk = ipw.FloatText(value=chunk, step=1, tooltip="Length of a chunk in steps",
                                   layout=ipw.Layout(width="84px"))
        self.run_button = self._button("Run", "Train a chunk of this many steps",
                                       lambda: self.start(whole(self.chunk.value)), style="primary")
        self.step_button = self._button("Step once", "Train one step", lambda: self.start(1))
        self.pause_button = self._button("Pause", "Stop at the next step boundary", self.pause)
        self.status = ipw.HTML()
        self.status.add_class("moe-status")
        parts = [self.run_button, self.chunk, ipw.Label("steps"), self.step_button, self.pause_button,
                 self.status, self.refused.widget]
        self.layer = None
        if self.run.config.model.n_experts:
            layers = [f"layer {i}" for i in range(self.run.config.model.n_moe_layer)]
            self.layer = ipw.Dropdown(options=["mean of layers", *layers], layout=ipw.Layout(width="136px"),
                                      tooltip="Layer shown in the charts")
            self.layer.observe(lambda seen: self.live.select(seen.new - 1 if seen.new else None), "index")
            parts.append(self.layer)
        row = ipw.Box(parts)
        row.add_class("moe-run")
        return row

    def _button(self, words: str, tooltip: str, action, style: str = "") -> ipw.Button:
        button = ipw.Button(description=words, tooltip=tooltip, button_style=style)
        guarded = self.journal.guarded(action, self.refused)
        button.on_click(lambda _: guarded())
        return button

    def _knob_table(self) -> ipw.Box:
        table = ipw.VBox([*(control.widget for control in self.controls), self.what_if.widget])
        table.add_class("moe-knobs")
        return table

    def _charts(self) -> ipw.Box:
        for line in self.live.figure.select_traces({"type": "scatter"}):
            line.on_click(lambda _, points, __: self.branches.aim(round(points.xs[0])) if points.xs else None)
        charts = ipw.VBox([self.live.figure])
        charts.add_class("moe-charts")
        key = ipw.HTML(html.escape(KEY))
        key.add_class("moe-key")
        return ipw.VBox([charts, key])

    # ---- the live thread ---------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self.run.store.closed:
            return self._end()
        aim = tuple(self.page.aim)  # the row whose slider is held, and where
        self.what_if.show((self.controls[int(aim[0])].knob.name, aim[1]) if aim else None)
        progress, now = self.session.progress(), time.monotonic()
        busy = progress.state in BUSY
        # A page that changes is laid out and painted anew, at a cost like a chart's: numbers that only count on
        # wait for each other, what a person waits for does not.
        new = progress != self._shown if not busy else progress.state != self._shown.state
        if new or now - self._counted_at >= COUNT_EVERY:
            self._shown, self._counted_at = progress, now
            self._offer(progress)
            self.status.value = _status_line(progress, self._undo_step(busy))
            if not busy:
                self.branches.refresh()
        due = new or now - self._moved_at >= MOVE_EVERY
        self._moved_at = now if due else self._moved_at
        for row, control in enumerate(self.controls):
            if due or control.waits:
                control.refresh(focused=row in (self.page.focus, *aim[:1]))
        if progress.state != "moving":  # what is posted meanwhile would be written where the run arrives
            self.findings.look(progress.step, busy)
        if due:
            self.groups.refresh(self.run.store, self.findings.branch_id, progress.step)

    def _offer(self, progress) -> None:
        """Enable what can be done in this state, and put forward what should be."""
        self.pause_button.disabled = progress.state != "training"
        self.branches.offer_undo(_nonfinite(progress), self._undo_step(progress.state in BUSY))
        self.branches.offer_others(self.live.has_others)
        gone = progress.state == "gone"
        if gone != self._gone:
            self._gone = gone
            self._disable(gone)

    def _undo_step(self, busy: bool) -> int | None:
        """Where Undo goes back to, where this process knows."""
        return None if busy or self.run.attached else self.run.undo_step

    def _disable(self, off: bool) -> None:
        """Take what steers the run out of a hand's reach, or give it back."""
        rows = [control.widget for control in self.controls]
        for part in [self.run_button, self.step_button, self.chunk, *self.branches.widget.children[:-2],
                     self.notes.button, self.notes.text, *(w for row in rows for w in row.children)]:
            if hasattr(part, "disabled"):
                part.disabled = off

    def _end(self) -> None:
        """The run is closed: say so, and follow no more."""
        self._disable(True)
        self.write_up.button.disabled = self.pause_button.disabled = True
        self.status.value = f'<div class="moe-status-line"><span class="moe-error" role="alert">{CLOSED}</span></div>'
        self.add_class("moe-over")
        self.live.close()

    def _failed(self, error: Exception) -> None:
        if self.run.store.closed:
            return  # between two looks at the run; the next one says it
        said = f"the panel: {type(error).__name__}: {error}"
        if said != self._last_report:  # the thread tries again for as long as the panel is open
            self.journal.write(said, error=True)
        self._last_report = said


def _nonfinite(progress) -> bool:
    """Whether training paused because a step was not finite: the run is whole, and may go on or back."""
    return progress.state == "paused" and (progress.error or "").startswith(NonFiniteError.__name__)


def _status_line(progress, undo: int | None) -> str:
    """``undo``: the step that Undo goes back to."""
    parts = [f'<span class="moe-state moe-state-{progress.state}" role="status">{progress.state}</span>',
             f"<span>step <b>{progress.step:,}</b></span>"]
    if progress.chunk_total:
        done = f"{progress.chunk_done:,} of {progress.chunk_total:,} steps"
        parts.append(f'<span class="moe-muted">{done}</span>')
    if progress.seconds_left is not None:
        parts.append(f'<span class="moe-muted">{_duration(progress.seconds_left)} left</span>')
    if progress.tok_s is not None:
        parts.append(f'<span class="moe-muted">{progress.tok_s:,.0f} tokens/s</span>')
    if _nonfinite(progress):
        said = html.escape(progress.error.partition(": ")[2])
        back = "" if undo is None else f" <b>Undo chunk</b> goes back to step {undo:,}; the knobs can be turned first."
        parts.append(f'<span class="moe-error" role="alert">{said}.{back}</span>')
    elif progress.error:
        parts.append(f'<span class="moe-error" role="alert">{html.escape(progress.error)}</span>')
    if progress.state == "gone":
        parts.append('<span class="moe-error" role="alert">no process trains this run; <code>mc.Run.open</code> goes '
                     "on with it here</span>")
    bar = (f'<progress max="{max(progress.chunk_total, 1)}" value="{progress.chunk_done}" '
           'aria-label="Steps of this chunk"></progress>')
    return f'<div class="moe-status-line">{"".join(parts)}</div>{bar}'


def _duration(seconds: float) -> str:
    whole = max(round(seconds), 0)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _close(panel: ipw.Widget) -> None:
    for part in _parts(panel):
        for widget in (getattr(part, "style", None), part.layout, part):
            if isinstance(widget, ipw.Widget):
                ipw.Widget.close(widget)


def _parts(widget: ipw.Widget) -> list[ipw.Widget]:
    """A widget and all that is in it, what is inside first."""
    return [part for child in getattr(widget, "children", ()) for part in _parts(child)] + [widget]
