"""The console lines of the legacy training scripts: text in, drafts of runs out, and a tally of what was passed over.

Two forms are known: that of the MoE script, and that of the dense script (several optimizers in one log). A number
counts only where it is seen to be whole: what divides it from the next field stands behind it, or it ends the line with
all the digits that the form prints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from moe_core.config import OPTIMIZERS

# No part of a pattern can match what its neighbour can, and a step has 12 digits at most, as in a store: a line of any
# length is read in time that grows with its length.
_NUM = r"[-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|inf)"
_END = r"(?=[\s|]|$)"


def _named(word: str, digits: str, following: str = r"(?!)") -> str:
    """A pattern of ``word number``: a number with what follows it in the form, or one of all its digits."""
    return rf"\b{word}\s+(?:({_NUM})(?=\s*{following})|({digits}|nan|inf){_END})"


# What a line says -> the metric that it becomes. The one group of a pattern that matches is the number.
_ITER_FIELDS = {
    "train/loss": _named("loss", r"\d+\.\d{4}", r"\|\s*lr\b"),  # the script prints what it minimised
    "lr": _named("lr", r"\d\.\d{3}e[-+]\d\d"),
    "perf/tok_s": rf"\|\s+({_NUM})\s*tok/s{_END}",
    "router/max_frac_max": _named("r_max", r"\d\.\d\d", "act_min"),
    "router/active_min": r"\bact_min\s+(\d+)(?=\s+col)",
    "router/collapsed": rf"\bcol\s+([01]){_END}",
}
_EVAL_FIELDS = {"val/loss_with_aux": _named("val_loss", r"\d+\.\d{4}")}
_STEP_FIELDS = {
    "train/loss": _named("loss", r"\d+\.\d{4}", r"avg\b"),
    "perf/ms_it": rf"\bavg\s+({_NUM})\s*ms/it{_END}",
    "perf/tok_s": rf"(?<=ms/it)\s+({_NUM})\s*tok/s{_END}",
    "grad/norm": rf"\bgnorm\s+({_NUM})/(?:{_NUM})?",  # what stands behind the slash is not taken
}
_VAL_FIELDS = {"val/loss": _named("loss", r"\d+\.\d{4}", r"ppl\b"), "val/ppl": _named("ppl", r"\d+\.\d")}

_START = re.compile(  # of a line of the MoE form, its eval line, or one of the dense form
    r"(?<![A-Za-z_])iter\s+(?:(?P<iter>\d{1,12})\s*\||(?P<cut>\d*)$)"
    r"|(?<![A-Za-z_])(?P<eval>eval)\s*\|"
    rf"|\[\s*(?P<opt>{'|'.join(OPTIMIZERS)})\s*\]\s+"
    r"(?:step\s+(?P<step>\d{1,12})/(?:(?P<total>\d{1,12})(?=\s))?|(?P<val>\(val\)))")
_PARAMS = re.compile(r"Model params:\s*(\d[\d,]{0,20})\s*\(")
_SUMMARY = re.compile(rf"^(\S+)\s+{_NUM}\s*ms/it\s+{_NUM}\s*tok/s\s+loss\s+{_NUM}\s*$")
_TORN = re.compile(r"\|\s*lr\s|tok/s\s*\||\br_max\s|\bact_min\s")
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_BAR = re.compile(r"\d%\s*\||\b\d+(?:\.\d+)?\s*(?:it/s|s/it|[kM]?B/s)\b")


BEFORE = "before step 1, the first that a run can have, kept as events"


class LogError(ValueError):
    """A log that cannot be imported: one line with its path and why."""


@dataclass
class Tally:
    """How many lines of each kind were passed over, with the first few of each."""

    counts: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, text: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        kept = self.samples.setdefault(kind, [])
        text = " ".join(text.split())[:160]
        if len(kept) < 5 and text not in kept:
            kept.append(text)


@dataclass
class Stretch:
    """Rows whose steps rise, in one go; up to step ``fork`` its line shows what stretch ``parent`` shows."""

    parent: int | None
    fork: int
    rows: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def last(self) -> int:
        return max(self.rows, default=self.fork)


class Draft:
    """A run as its log tells it."""

    def __init__(self, name: str, form: str):
        self.name, self.form = name, form
        self.stretches = [Stretch(None, 0)]
        self.events: list[tuple[int, int, dict]] = []  # stretch, step, what is said
        self.times: dict[int, float] = {}  # of steps, seconds since 1970, where the log has them
        self.planned = math.inf  # steps

    @property
    def now(self) -> Stretch:
        return self.stretches[-1]

    def row(self, step: int, values: dict[str, float]) -> bool:
        """Enter the row of a step; False where it only repeats the one before it.

        A step that is not beyond the last one is taken again after a resume: a new stretch begins behind the
        newest earlier step that the line shows.
        """
        last = self.now.last
        if step <= last:
            before = self.now.rows.get(step, {})
            if step == last and all(before.get(name) == value for name, value in values.items()):
                return False
            if step == last and not before.keys() & values.keys():  # a validation was placed there
                before.update(values)
                return True
            fork = max((s for s in self._shown() if s < step), default=0)
            self.stretches.append(Stretch(len(self.stretches) - 1, fork))
        self.now.rows[step] = dict(values)
        return True

    def say(self, text: str, step: int | None = None, values: Mapping[str, float] | None = None) -> None:
        """Keep as an event what has no place in a row; ``step`` None: the last one."""
        self.events.append((len(self.stretches) - 1, self.now.last if step is None else step,
                            {**(values or {}), "text": text}))

    def _shown(self) -> Iterator[int]:
        upto, at = math.inf, len(self.stretches) - 1
        while at is not None:
            stretch = self.stretches[at]
            yield from (step for step in stretch.rows if step <= upto)
            upto, at = min(upto, stretch.fork), stretch.parent


class Console:
    """Reads console logs line by line, the parts of one training in their order."""

    def __init__(self, tally: Tally, val_every: int | Mapping[str, int] | None, shift: int):
        self.tally, self.val_every, self.shift = tally, val_every, shift
        self.drafts: dict[str, Draft] = {}
        self.known = 0  # lines that held a value
        self.params: set[int] = set()
        self._iter: tuple[int, dict] | None = None  # (step, its row), for the eval line behind it
        self._summary = False
        self._waiting: dict[str, list[dict[str, float]]] = {}  # validations whose step is not settled yet
        self._last_val: dict[str, int] = {}

    def read(self, text: str) -> None:
        self._iter, self._summary = None, False
        for line in text.replace("\r\n", "\n").split("\n"):
            for part in _ANSI.sub("", line).split("\r"):
                if part.strip():
                    self._part(part)

    def close(self) -> None:
        """Settle what waited for a later line."""
        for name, draft in self.drafts.items():
            self._settle(draft, name, draft.planned)

    def _part(self, part: str) -> None:
        starts = list(_START.finditer(part))
        before = part[: starts[0].start()] if starts else part
        if before.strip():
            self._other(before, alone=not starts)
        for start, after in zip_longest(starts, starts[1:]):
            rest = part[start.end(): after.start() if after else None]
            whole = part[start.start(): after.start() if after else None]
            if start["eval"]:
                self._eval(rest, whole)
            elif start["opt"]:
                self._dense(start, rest, whole)
            else:
                self._moe(start, rest, whole)

    def _moe(self, start: re.Match, rest: str, whole: str) -> None:
        self._iter = None  # an eval line behind one that cannot be read belongs to none
        if start["iter"] is None:
            return self.tally.add("read in part, or cut short", whole)
        step, values = int(start["iter"]) + self.shift, self._fields(_ITER_FIELDS, rest, whole)
        if values:
            draft = self.drafts.setdefault("moe", Draft("moe", "MoE console log"))
            self._enter(draft, step, values, whole)
            self._iter = step, draft.now.rows.get(step, {})

    def _eval(self, rest: str, whole: str) -> None:
        values = self._fields(_EVAL_FIELDS, rest, whole)
        if self._iter is None:
            return self.tally.add("eval line without the iter line it belongs to", whole)
        step, row = self._iter
        if step < 1:
            self._enter(self.drafts["moe"], step, values, whole)
        elif row.keys() & values.keys():
            self.tally.add("repeated", whole)
        else:
            row |= values

    def _dense(self, start: re.Match, rest: str, whole: str) -> None:
        name = start["opt"]
        draft = self.drafts.setdefault(name, Draft(name, "dense console log"))
        if start["val"]:
            # Counted where it is cut short too: the ones after it are placed by their number.
            self._waiting.setdefault(name, []).append(self._fields(_VAL_FIELDS, rest, whole))
            return
        step, values = int(start["step"]) + self.shift, self._fields(_STEP_FIELDS, rest, whole)
        self._settle(draft, name, step if step > draft.now.last else draft.planned)
        if start["total"]:
            draft.planned = int(start["total"]) + self.shift
        stretches, every = len(draft.stretches), self._every(name)
        if values:
            self._enter(draft, step, values, whole)
        if every and len(draft.stretches) > stretches:
            self._last_val[name] = max(draft.now.fork - self.shift, 0) // every * every

    def _enter(self, draft: Draft, step: int, values: dict[str, float], whole: str) -> None:
        for name in [name for name, value in values.items() if math.isnan(value)]:
            del values[name]
            draft.say(f"the log says {name} nan at step {step}", max(step, 0))
        if step < 1:
            self.tally.add(BEFORE, whole)
            draft.say(" ".join(whole.split()), 0, values)
        elif not draft.row(step, values):
            self.tally.add("repeated", whole)

    # ---- validations of the dense form -------------------------------------------------------------------

    def _every(self, name: str) -> int | None:
        return self.val_every.get(name) if isinstance(self.val_every, Mapping) else self.val_every

    def _settle(self, draft: Draft, name: str, following: float) -> None:
        """Place the validations seen since the last step line, which lie between it and step ``following``."""
        every = self._every(name)
        low, high = max(draft.now.last - self.shift, 1), following - self.shift
        for values in self._waiting.pop(name, []):
            step = None
            if every:
                step = self._last_val.get(name, 0) + every  # the next by count
                if not low <= step <= high:  # then one was lost; still certain where no other multiple is possible
                    step = max(-(-low // every) * every, step)
                    step = step if step <= high < step + every else None
            if step is not None:
                self._last_val[name] = step
                draft.now.rows.setdefault(step + self.shift, {}).update(values)
            elif values:
                said = ", ".join(f"{metric} {value:g}" for metric, value in values.items())
                why = f"no multiple of {every} is sure to be its own" if every else "val_every is not given"
                self.tally.add(f"validations without a step ({why}), kept as events", f"[{name}] {said}")
                draft.say(f"{said}; the log gives no step", None, values)

    # ---- the rest ----------------------------------------------------------------------------------------

    def _fields(self, patterns: dict[str, str], rest: str, whole: str) -> dict[str, float]:
        values: dict[str, float] = {}
        left = rest
        for name, pattern in patterns.items():
            found = re.search(pattern, rest)
            if found:
                values[name] = float(next(group for group in found.groups() if group is not None))
                left = left.replace(found[0], " ", 1)
        if left.replace("|", " ").strip() or not values:
            self.tally.add("read in part, or cut short", whole)
        self.known += bool(values)
        return values

    def _other(self, text: str, alone: bool) -> None:
        if _TORN.search(text):  # an eval line behind a torn iter line belongs to none that can be read
            self._iter = None
        params, summary = _PARAMS.search(text), _SUMMARY.match(text)
        if params:
            self.params.add(int(params[1].replace(",", "")))
        elif text.lstrip().startswith("=== Summary"):
            self._summary = True
        elif self._summary and summary and summary[1] in self.drafts:
            self.drafts[summary[1]].say(f"summary: {' '.join(text.split())}")
        elif _BAR.search(text):
            self.tally.add("progress bars", text)
        else:
            self.tally.add("other" if alone else "other text in front of a line", text)
