"""The row that takes a run back: undo a chunk, rewind to a step or a checkpoint, change or show branches, save."""

from __future__ import annotations

import threading
from collections.abc import Callable

import ipywidgets as ipw

from widgets.controls import whole
from widgets.notes import Log, Refusal

NONE = ("checkpoints", -1)  # no choice; a value of None would show nothing at all


class BranchRow:
    """Undo, Rewind, the branch picker and Save. Nothing is overwritten: going back opens a new branch.

    A handler only asks: the session's thread does the moving, and its state says so. :meth:`refresh` brings
    the row up to date with the run, whoever moved it.
    """

    def __init__(self, run, log: Log, asked: Callable[[], None] = lambda: None):
        """``asked`` is called after each wish."""
        self._run, self._log, self._asked, self.refused = run, log, asked, Refusal()
        self.undo = self._button("Undo chunk", "Back to where the last chunk started, on a new branch",
                                 lambda: run.undo(wait=False))
        self.step = ipw.FloatText(value=0, step=1, tooltip="Step to rewind to; a click on a line sets it",
                                  layout=ipw.Layout(width="84px"))
        self.saved = ipw.Dropdown(options=[NONE], tooltip="Checkpoint to rewind to",
                                  layout=ipw.Layout(width="150px"))
        self.rewind = self._button("Rewind to step", "Back to this step exactly, on a new branch",
                                   lambda: run.rewind(whole(self.step.value), wait=False))
        self.branch = ipw.Dropdown(options=[run.branch], tooltip="Branch: choose one to go on from its end",
                                   layout=ipw.Layout(width="136px"))
        self.save = self._button("Save", "Save a named checkpoint of this step; it is never pruned",
                                 lambda: run.checkpoint(f"step {run.current_step}"))
        self.others = ipw.Checkbox(value=True, description="other branches", indent=False,
                                   tooltip="Thin grey lines of the other branches behind the current one's",
                                   layout=ipw.Layout(width="auto", display="none"))
        self.saved.observe(lambda seen: self._choose(seen.new), "value")
        self._refreshing = None  # the thread that brings the row up to date
        self.branch.observe(lambda seen: self._switch(seen.new), "value")
        self.widget = ipw.Box([self.undo, self.rewind, self.step, self.saved, ipw.Label("branch"), self.branch,
                               self.others, self.save, self.refused.widget])
        self.widget.add_class("moe-branches")
        self.refresh()

    def refresh(self) -> None:
        """Show what the run says. Any thread."""
        run = self._run
        names = tuple(branch.name for branch in run.store.branches())
        if self.branch.options != names or self.branch.value != run.branch:
            self._refreshing = threading.get_ident()
            try:
                with self.branch.hold_sync():
                    self.branch.options = names  # which chooses the first of them, and that is nobody's wish
                    self.branch.value = run.branch
            finally:
                self._refreshing = None
        saved = [NONE] + [
            (f"step {c.step:,}" + (f" · {c.name}" if c.name not in (None, "", f"step {c.step}") else ""), c.step)
            for c in reversed(self._reachable())]
        if list(self.saved.options) != saved:
            with self.saved.hold_sync():
                self.saved.options = saved
                self.saved.value = NONE[1]

    def offer_undo(self, wanted: bool, step: int | None) -> None:
        """Put Undo forward, or back in line. ``step``: what it goes back to, None where that is not known."""
        self.undo.button_style = "warning" if wanted else ""
        where = "where the last chunk started" if step is None else f"step {step:,}, where the last chunk started"
        self.undo.tooltip = f"Back to {where}, on a new branch"

    def offer_others(self, there: bool) -> None:
        """Offer to leave out the other branches' lines, where there are any."""
        self.others.layout.display = None if there else "none"

    def aim(self, step: int) -> None:
        """Take a step that was pointed at on a chart."""
        self.step.value = step

    def _reachable(self) -> list:
        run = self._run
        upto = dict(run.store.lineage(run.store.branch_id(run.branch)))
        return [c for c in run.store.checkpoints() if c.step <= upto.get(c.branch, -1)]

    def _choose(self, step: int) -> None:
        if step != NONE[1]:
            self.aim(step)

    def _switch(self, name: str | None) -> None:
        if name in (None, self._run.branch) or self._refreshing == threading.get_ident():
            return
        self._log.guarded(lambda: self._run.switch(name, wait=False), self.refused)()
        self._asked()

    def _button(self, words: str, tooltip: str, action: Callable[[], None]) -> ipw.Button:
        button, guarded = ipw.Button(description=words, tooltip=tooltip), self._log.guarded(action, self.refused)

        def click(_):
            guarded()
            self._asked()
        button.on_click(click)
        return button
