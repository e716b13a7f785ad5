"""Gates: what a run must show to be accepted, written as a line and answered from its metrics.

::

    val/loss < 4.0 by 1400                       reached at some logged step up to 1400
    router/entropy_mean in 1.94..2.06 at 2000    at step 2000 (the newest value up to it; the step is said)
    router/frac_srv_e* in 0.115..0.135 from 1400 at every logged step from 1400 on, for every expert
    router/top1_p_mean in 0.15 +- 0.01           now: the newest value

Relations are ``<  <=  >  >=  ==  in``; ``*`` stands for any characters of a metric's name, and every metric that it
means must hold.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}
PASSED, FAILED, NOT_REACHED = "passed", "failed", "not reached"
FORM = "METRIC < NUMBER or METRIC in LOW..HIGH, optionally followed by: by STEP, at STEP or from STEP"
_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_LINE = re.compile(
    rf"(?P<metric>\S+?)\s*(?:(?P<relation><=|>=|==|<|>)\s*(?P<value>{_NUMBER})"
    rf"|\s(?:in)\s+(?:(?P<low>{_NUMBER})\s*\.\.\s*(?P<high>{_NUMBER})|(?P<middle>{_NUMBER})\s*\+-\s*(?P<off>{_NUMBER})))"
    r"(?:\s+(?P<when>by|at|from)\s+(?:step\s+)?(?P<step>\d+))?")


class GateError(ValueError):
    """A line that is no gate: what it says, and the form that one has."""


@dataclass(frozen=True)
class Gate:
    """One condition. ``when``: "by", "at", "from", or "now" with ``step`` 0."""

    text: str
    metric: str
    relation: str  # of RELATIONS, or "in"
    low: float  # the number of a relation; of "in" the lower end, which is inside
    high: float
    when: str
    step: int

    def holds(self, values: np.ndarray) -> np.ndarray:
        """Which values meet it; both ends of a range are in it."""
        # Metrics are stored as float32: one that was logged as the line's own number lies on the line.
        near = 1e-6 * np.maximum(abs(self.low), abs(self.high))
        if self.relation == "in":
            return (values >= self.low - near) & (values <= self.high + near)
        if self.relation == "==":
            return np.abs(values - self.low) <= near
        slack = {"<": -near, ">": near, "<=": near, ">=": -near}[self.relation]
        return RELATIONS[self.relation](values, self.low + slack)

    def miss(self, values: np.ndarray) -> np.ndarray:
        """How far beyond the line each value is; less is better."""
        if self.relation in ("<", "<="):
            return values - self.high
        if self.relation in (">", ">="):
            return self.low - values
        return np.maximum(self.low - values, values - self.high)


@dataclass(frozen=True)
class Answer:
    """How a gate stands: ``value`` of ``metric`` at step ``at`` decided it (NaN: nothing logged)."""

    gate: Gate
    state: str  # PASSED, FAILED or NOT_REACHED
    value: float
    metric: str
    at: int
    says: str


def parse(line: str) -> Gate:
    """A gate from its line. Raises GateError."""
    found = _LINE.fullmatch(line.strip()) if isinstance(line, str) else None
    if found is None:
        raise GateError(f"gate {line!r}: must be {FORM}")
    said = {name: float(value) for name, value in found.groupdict().items()
            if value is not None and name in ("value", "low", "high", "middle", "off")}
    if "value" in said:
        low = high = said["value"]
    else:
        low = said["low"] if "low" in said else said["middle"] - said["off"]
        high = said["high"] if "high" in said else said["middle"] + said["off"]
    if low > high:
        raise GateError(f"gate {line!r}: the range {low:g}..{high:g} is empty; the smaller number comes first")
    return Gate(line.strip(), found["metric"], found["relation"] or "in", low, high, found["when"] or "now",
                int(found["step"] or 0))


def check(gates: Sequence[str | Gate], metrics: pd.DataFrame) -> list[Answer]:
    """How each gate stands on ``metrics``, a frame as of ``run.metrics(per_layer=True)``. Raises GateError."""
    if isinstance(gates, str):
        gates = [gates]
    return [_answer(gate if isinstance(gate, Gate) else parse(gate), metrics) for gate in gates]


def refuse_unknown(gates: Sequence[Gate], metrics: pd.DataFrame) -> None:
    """Raise GateError for a gate on a metric that the run of ``metrics`` does not log; before its first step, none."""
    for gate in gates if len(metrics) else ():
        if not _meant(gate, metrics):
            raise GateError(f"gate {gate.text!r}: {_no_such(gate, metrics)}")


def _meant(gate: Gate, metrics: pd.DataFrame) -> list[str]:
    return [name for name in metrics if fnmatch.fnmatchcase(name, gate.metric)
            and ("/layer_" in gate.metric or "/layer_" not in name)]


def _no_such(gate: Gate, metrics: pd.DataFrame) -> str:
    close = difflib.get_close_matches(gate.metric, list(metrics), n=1)
    return "the run has no such metric" + (f"; did you mean {close[0]}?" if close else "")


def _answer(gate: Gate, metrics: pd.DataFrame) -> Answer:
    if not (names := _meant(gate, metrics)):
        return Answer(gate, NOT_REACHED, math.nan, gate.metric, 0, _no_such(gate, metrics))
    last = int(metrics.index[-1]) if len(metrics) else 0
    answers = [_of_metric(gate, name, *_logged(metrics, name), last) for name in names]
    for state in (FAILED, NOT_REACHED, PASSED):  # the worst decides, and of those the one farthest off
        those = [answer for answer in answers if answer.state == state]
        if those:
            worst = max(those, key=lambda a: -math.inf if math.isnan(a.value) else gate.miss(np.array(a.value)))
            if len(names) == 1:
                return worst
            count = f"{len(those)} of {len(names)}" if state != PASSED else f"all {len(names)}"
            return Answer(gate, state, worst.value, worst.metric, worst.at, f"{worst.metric}: {worst.says} ({count})")
    raise AssertionError("a metric has a state")


def _of_metric(gate: Gate, name: str, steps: np.ndarray, values: np.ndarray, last: int) -> Answer:
    def answer(state: str, k: int | None, says: str) -> Answer:
        return Answer(gate, state, math.nan if k is None else float(values[k]), name, 0 if k is None else int(steps[k]),
                      says)

    def at(k: int) -> str:
        return f"{values[k]:.4g} at step {steps[k]}"

    good = gate.holds(values)
    if gate.when == "now":
        if not len(steps):
            return answer(NOT_REACHED, None, "nothing is logged")
        return answer(PASSED if good[-1] else FAILED, len(steps) - 1, at(-1))
    if gate.when == "from":
        part = np.flatnonzero(steps >= gate.step)
        if not len(part):
            return answer(NOT_REACHED, None, f"nothing is logged from step {gate.step} on; the run is at {last}")
        k = part[np.argmax(gate.miss(values[part]))]
        bad = int((~good[part]).sum())
        if bad:
            return answer(FAILED, k, f"{at(k)}; {bad} of {len(part)} logged steps are outside")
        return answer(PASSED, k, f"nearest to the line {at(k)}; {len(part)} logged steps, "
                                 f"{values[part].min():.4g} to {values[part].max():.4g}")
    part = np.flatnonzero(steps <= gate.step)
    if gate.when == "at":
        if last < gate.step:
            so_far = f", {at(-1)}" if len(steps) else ""
            return answer(NOT_REACHED, len(steps) - 1 if len(steps) else None, f"the run is at step {last}{so_far}")
        if not len(part):
            return answer(NOT_REACHED, None, f"nothing is logged up to step {gate.step}")
        return answer(PASSED if good[part[-1]] else FAILED, part[-1], at(part[-1]))
    if good[part].any():
        k = part[np.argmax(good[part])]
        return answer(PASSED, k, f"first {at(k)}")
    k = part[np.argmin(gate.miss(values[part]))] if len(part) else None
    best = "nothing is logged" if k is None else f"nearest {at(k)}"
    if last < gate.step:
        return answer(NOT_REACHED, k, f"{best}; the run is at step {last}")
    return answer(FAILED if len(part) else NOT_REACHED, k, best)


def _logged(metrics: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have the metric."""
    values = metrics[name].to_numpy(float)
    there = ~np.isnan(values)
    return metrics.index.to_numpy()[there], values[there]
