"""What the router's health rules say, in the panel: a short list, worst first, each with the turn that answers it.

Findings are read by the panel's own thread from the run's store. Where this process trains, their coming and going
is posted to the session, which writes it down in order with all else.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from dataclasses import dataclass

import ipywidgets as ipw
import pandas as pd

from moe_core import health
from moe_core.health import Finding, Lever
from moe_core.rules import LEVELS, WINDOW
from moe_core.session import Command
from widgets.findings_view import FindingsView
from widgets.marks import KNOB_TITLES
from widgets.notes import Log
from widgets.spark import spark

EVERY, PROMPTLY = 3.0, 1.0  # seconds between two readings while it trains; where an alarm is to pause it
SHARE = 0.01  # of the time may go into readings
LASTS = 25  # steps that a finding must be away before it counts as gone


@dataclass
class Standing:
    """A rule's finding that was written down: at what level, at which step it was last that bad, and its words."""

    level: str
    step: int
    text: str


class Findings:
    """The list of findings, its Apply buttons, and the wish to pause when an alarm comes.

    :meth:`look` is for the panel's thread; a click only posts a command.
    """

    def __init__(self, run, log: Log, acted: Callable[[], None] = lambda: None):
        """``acted`` is called after each click on Apply."""
        self._run, self._log, self._acted = run, log, acted
        self.view = FindingsView()
        self.pause = ipw.Checkbox(description="Pause on alarm", indent=False,
                                  tooltip="Pause training when an alarm appears that was not there")
        self.widget = ipw.Box([self.view, self.pause, self.view.said])
        self.widget.add_class("moe-findings-bar")
        click = log.guarded(self._click)
        self.view.on_msg(lambda _, content, __: click(content))
        self.branch_id = None  # of the branch that was read last
        self._branch, self._step, self._next, self._asked = None, -1, 0.0, False
        self._turns: list[tuple] = []  # how the knobs were set when the rules were read
        self._standing: dict[str, Standing] = {}
        self._coming: set[tuple[str, str]] = set()  # (rule, level) seen once
        self._last: dict[str, dict] = {}  # rule -> its row as it was last there
        self._levers: dict[str, tuple[Finding, Lever]] = {}  # what is offered, by its key
        self._earlier = self._levers  # what was offered before, which a page may still show
        self._answered: dict[str, int] = {}  # knob -> the step from which an answer holds
        self._said = ""

    def look(self, step: int, busy: bool) -> None:
        """Read the rules again if there are new rows and it is time. What a rule raises is shown in the log, once."""
        now, branch = time.monotonic(), self._run.branch
        turns = [(knob.mode, knob.target) for knob in self._run.knobs.values()]  # what Apply offers depends on them
        if branch == self._branch and not self._asked and (
                (step == self._step and turns == self._turns) or (busy and now < self._next)):
            return
        if branch != self._branch:
            self._stand_on(branch)
        self._asked, self._step, self._turns = False, step, turns
        try:
            rows = health.recent(self._run.store, self.branch_id, step)
            found = self._read(rows)
        except ValueError as error:
            rows, found = None, []
            if str(error) != self._said:
                self._log.write(str(error), error=True)
            self._said = str(error)
        if rows is not None:
            self._follow(found, step)
            self._show(found, rows, step)
        self._next = now + max(PROMPTLY if self.pause.value else EVERY, (time.monotonic() - now) / SHARE)

    def _read(self, rows: pd.DataFrame) -> list[Finding]:
        config, knobs = self._run.config, {name: knob.value for name, knob in self._run.knobs.items()}
        return health.findings(rows, knobs, config.model.n_experts, config.router.top_k)

    def _stand_on(self, branch: str) -> None:
        """Take up what this line's events say is there, so that nothing is said twice."""
        self._branch = branch
        self.branch_id = self._run.store.branch_id(branch)
        self._standing, self._last = {}, {}
        self._coming, self._answered = set(), {}
        for event in self._run.store.read_events(self.branch_id):
            said = event["payload"]
            if event["kind"] == "finding":
                self._standing.pop(said["rule"], None)
                if said["state"] == "here":
                    self._standing[said["rule"]] = Standing(said["level"], event["step"], said["text"])

    # ---- coming and going --------------------------------------------------------------------------------

    def _follow(self, found: list[Finding], step: int) -> None:
        """Write down what has come, grown worse, eased or gone; pause where an alarm is new and that was asked for.

        A watch counts when it is read twice; an alarm counts at once; less counts when it has lasted a while.
        """
        worst = {f.rule: f for f in reversed(found) if f.level != "ok"}  # worst first, so the first of a rule wins
        coming, alarms = set(), []
        for rule in worst.keys() | self._standing.keys():
            now, before = worst.get(rule), self._standing.get(rule)
            level, was = (_rank(now and now.level), _rank(before and before.level))
            if level > was:
                if now.level != "alarm" and (rule, now.level) not in self._coming:
                    coming.add((rule, now.level))
                    continue
                self._standing[rule] = Standing(now.level, step, now.text)
                if now.level == "alarm":
                    alarms.append(now)
                self._say(now.level, rule, "here", now.text, now)
            elif level == was:
                before.step, before.text = step, now.text
            elif step - before.step >= LASTS:
                if now is None:
                    del self._standing[rule]
                    self._say(before.level, rule, "gone", before.text)
                else:
                    self._standing[rule] = Standing(now.level, step, now.text)
                    self._say(now.level, rule, "here", now.text, now)
        self._coming = coming
        if alarms and self.pause.value and self._run.progress().state == "training":
            self._run.session.pause()
            self._log.write(f"paused on alarm: {alarms[0].text}", error=True)

    def _say(self, level: str, rule: str, state: str, text: str, finding: Finding | None = None) -> None:
        if self._run.attached:
            return  # whoever trains it writes its events
        numbers = {} if finding is None else {
            "metric": finding.metric, "value": finding.value, "first": finding.first, "last": finding.last}
        self._run.session.post(Command("finding", {
            "level": level, "rule": rule, "state": state, "text": text, **numbers}))

    # ---- the list ----------------------------------------------------------------------------------------

    def _show(self, found: list[Finding], rows: pd.DataFrame, step: int) -> None:
        self._earlier, self._levers = self._levers, {}
        shown = {rule: self._row(same, rows, step) for rule, same in health.by_rule(found).items()}
        for rule, row in self._last.items():
            if rule not in shown and rule in self._standing:
                shown[rule] = row | {"past": True, "levers": ""}
        self._last = shown
        order = sorted(shown.values(), key=lambda row: (row["past"], -_rank(row["level"])))
        self.view.say(_summary(order, [f for f in found if f.level == "ok"], len(rows) >= WINDOW,
                               bool(self._run.config.model.n_experts)), order)

    def _row(self, same: list[Finding], rows: pd.DataFrame, step: int) -> dict:
        """``same``: the findings of one rule, worst first."""
        worst, others = same[0], same[1:]
        also = ""
        if others:
            also = " · also " + ", ".join(
                f"{'all layers' if f.layer is None else f'layer {f.layer}'} ({_number(f.value)})" for f in others)
        undo = worst.levers[0].undo if worst.levers else ""
        small = f"{worst.metric} · steps {worst.first:,} to {worst.last:,}{also}"
        line = ""
        if worst.metric in rows:
            values = rows[worst.metric].to_numpy()
            line = spark(rows.index.to_numpy(), values, worst.low, worst.high, worst.first,
                         f"{worst.metric}, now {_number(float(values[-1]))}, healthy {_range(worst.low, worst.high)}")
        says = (f"<b>{worst.level}</b> {html.escape(worst.text)}<small>{html.escape(small)}</small>"
                + (f"<small>Undo: {html.escape(undo)}.</small>" if undo else ""))
        return {"rule": worst.rule, "level": worst.level, "past": False, "says": says, "line": line,
                "levers": "".join(self._lever(worst, lever, step) for lever in worst.levers)}

    def _lever(self, finding: Finding, lever: Lever, step: int) -> str:
        title, turn = KNOB_TITLES.get(lever.knob, lever.knob), lever.text.removeprefix(lever.knob).strip()
        if lever.knob not in self._run.knobs:
            return f"<span>{html.escape(lever.text)}</span>"
        since = self._answered.get(lever.knob)
        if since is not None and step - since < WINDOW:
            # The rule still looks at steps before it; to turn further now would answer the same finding twice.
            return (f'<button disabled title="the rules look at {WINDOW} steps; offered again after step '
                    f'{since + WINDOW:,}">✓ {html.escape(title)}, from step {since:,}</button>')
        key = f"{finding.rule}|{finding.layer}|{lever.text}"
        self._levers[key] = finding, lever
        return (f'<button data-lever="{html.escape(key)}" title="{html.escape(f"hold {lever.text}")}">'
                f"<b>Apply</b> {html.escape(title)} {html.escape(turn.replace('->', '→'))}</button>")

    def _click(self, content: dict) -> None:
        key = content["lever"]
        if key not in self._levers and key not in self._earlier:
            raise ValueError("Apply: the finding has changed since; nothing was turned")
        finding, lever = self._levers.get(key) or self._earlier[key]
        health.answer(self._run, finding, lever)
        self._answered[lever.knob] = self._run.current_step + 1
        self._asked = True
        self._acted()


def _summary(rows: list[dict], remarks: list[Finding], enough: bool, routed: bool) -> str:
    present = [row["level"] for row in rows if not row["past"]]
    counts = [(level, words, present.count(level)) for level, words in (("alarm", "alarm"), ("watch", "to watch"))]
    said = "".join(f'<span class="moe-{level}"><b>{n} {words}{"s" * (level == "alarm" and n > 1)}</b></span>'
                   for level, words, n in counts if n)
    if not said and enough:
        said = f"<span><b>{'Router' if routed else 'Training'} healthy</b></span>"
    return said + "".join(f"<i>{html.escape(finding.text)}</i> " for finding in remarks[:1])


def _rank(level: str | None) -> int:
    return -1 if level is None else LEVELS.index(level)


def _range(low: float | None, high: float | None) -> str:
    ends = [f"{words} {_number(end)}" for words, end in (("from", low), ("to", high)) if end is not None]
    return " ".join(ends) or "unknown"


def _number(value: float) -> str:
    return f"{value:.3g}"
