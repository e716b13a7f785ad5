"""What a health rule is made of: its view of the metrics, tests, and the levers that answer it.

E experts, K picks of a token, L layers. Shares are of a layer's assignments, so a layer that is collapsed gives
an expert 1/K of them, and a fair share is 1/E.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moe_core.knobs import KNOBS

WINDOW = 50  # logged steps that "sustained" looks at
LEVELS = ("ok", "watch", "alarm")


@dataclass(frozen=True)
class Lever:
    """A turn that answers a finding: ``run.knobs[lever.knob].hold(lever.value_to)``."""

    knob: str
    value_from: float
    value_to: float
    text: str  # "router_temp 1.30 -> 1.60"
    undo: str  # when to take it back


@dataclass(frozen=True)
class Finding:
    """What a rule says of the steps ``first`` to ``last``. ``low`` and ``high``: the healthy range of the metric."""

    level: str  # "ok": worth knowing, nothing to do; "watch"; "alarm"
    rule: str
    metric: str  # with "/layer_{l}" behind where it is of one layer
    kind: str  # "sustained", "spike" or "trend"
    first: int
    last: int
    value: float
    low: float | None
    high: float | None
    text: str
    levers: tuple[Lever, ...]
    layer: int | None = None  # None: of all layers together

    def __str__(self) -> str:
        turns = "; ".join(lever.text for lever in self.levers)
        return f"{self.level}: {self.text} [steps {self.first} to {self.last}]{turns and ' try ' + turns}"


class Shape(NamedTuple):
    """What the lines of the router guide (``moe_core.guide``) are scaled to."""

    E: int
    K: int

    def share(self, at_8: float, way: float) -> float:
        """A line that the guide draws at E = 8, as so many fair shares; but never nearer to 1/K, where one expert
        has every token, than this part of the ``way`` there from the fair share (own choice, for a few experts)."""
        return min(at_8 * 8 / self.E, 1 / self.E + way * (1 / self.K - 1 / self.E))

    def peak(self, at_8: float) -> float:
        """A line for a probability: absolute from E = 8 on, and as far from uniform to 1 where E is less."""
        return max(at_8, 1 / self.E + (at_8 - 1 / 8) / (1 - 1 / 8) * (1 - 1 / self.E))

    def entropy(self, part: float) -> float:
        return part * math.log(self.E)


Line = float | Callable[[Shape], float] | None

# What one layer has to show where the metric itself is an extreme over the layers.
OF_A_LAYER = {"router/max_frac_max": "router/max_frac_mean", "router/active_min": "router/active_mean",
              "router/collapsed": "router/max_frac_mean"}


@dataclass(frozen=True)
class View:
    """What a rule's test sees: the recent rows, of all layers together or of one."""

    columns: Mapping[str, np.ndarray]
    steps: np.ndarray
    shape: Shape
    metric: str
    layer: int | None = None

    def name(self, metric: str | None = None) -> str:
        """The column of ``metric`` (None: the rule's own), this layer's where the view is of one."""
        metric = metric or self.metric
        return metric if self.layer is None else f"{OF_A_LAYER.get(metric, metric)}/layer_{self.layer}"

    def series(self, metric: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the logged rows that have the metric; both empty where none has."""
        values = self.columns.get(self.name(metric))
        if values is None:
            return self.steps[:0], np.zeros(0)
        there = ~np.isnan(values)
        return self.steps[there], values[there]


@dataclass(frozen=True)
class Reading:
    """That a test fired: on what value, over which steps. ``words`` are further numbers for the sentence."""

    kind: str
    value: float
    first: int
    last: int
    low: float | None = None
    high: float | None = None
    metric: str | None = None  # another one than the view's
    words: Mapping[str, object] = field(default_factory=dict)


Test = Callable[[View], Reading | None]
LeverMaker = Callable[[Mapping[str, float], str], Lever | None]


@dataclass(frozen=True)
class Rule:
    """One line of the router guide. Of the rules with one ``name`` only the worst that fires is said.

    ``says`` is a format string: {value} {low} {high} {line} {uniform} {lnE} {E} {K} {n}, and the test's own words;
    ``undo`` is one too.
    """

    name: str
    metric: str
    level: str
    test: Test
    says: str
    levers: Sequence[LeverMaker] = ()
    undo: str = "once the finding has gone for 100 steps"
    layers: bool = True  # whether each layer is also read by itself


def streak(steps: np.ndarray, values: np.ndarray, low: float | None, high: float | None) -> tuple[int, float] | None:
    """(first step, mean over the last 50) where that mean is past a line, and has been since the first step's 50."""
    if len(values) < WINDOW:
        return None
    means = np.convolve(values, np.full(WINDOW, 1 / WINDOW), "valid")
    past = beyond(means, low, high)
    if not past[-1]:
        return None
    windows = len(past) if past.all() else int(np.argmin(past[::-1]))
    return int(steps[len(means) - windows]), float(means[-1])


def sustained(above: Line = None, below: Line = None, start: int = 0) -> Test:
    """The mean over the last 50 logged steps is beyond the line, at step ``start`` or later."""
    def test(view: View) -> Reading | None:
        (steps, values), low, high = view.series(), at(below, view.shape), at(above, view.shape)
        found = streak(steps, values, low, high)
        if found is None or steps[-1] < start:
            return None
        return Reading("sustained", found[1], found[0], int(steps[-1]), low, high)
    return test


def spike(above: Line = None, below: Line = None, times: int = 1, enough: int = WINDOW) -> Test:
    """At least ``times`` of the last 50 logged steps, of no fewer than ``enough``, are beyond the line."""
    def test(view: View) -> Reading | None:
        steps, values = (a[-WINDOW:] for a in view.series())
        low, high = at(below, view.shape), at(above, view.shape)
        past = beyond(values, low, high)
        if len(values) < enough or past.sum() < times:
            return None
        worst = values.min() if high is None else values.max()
        return Reading("spike", float(worst), int(steps[past][0]), int(steps[past][-1]), low, high,
                       words={"times": int(past.sum())})
    return test


def change(values: np.ndarray) -> float:
    """What a straight line through the values gains or loses; 0 where the scatter around it is as large."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(x @ values / (x @ x))
    gained = slope * (len(values) - 1)
    return gained if abs(gained) > (values - values.mean() - slope * x).std() else 0.0


# ---- levers ----------------------------------------------------------------------------------------------

def move(knob: str, by: float) -> LeverMaker:
    """The knob's value plus ``by``."""
    return _turn(knob, lambda now: round(now + by, 2), 1 if by > 0 else -1)


def scale(knob: str, by: float) -> LeverMaker:
    """The knob's value times ``by``."""
    return _turn(knob, lambda now: float(f"{now * by:.3g}"), 1 if by > 1 else -1)


def up_to(knob: str, *stops: float) -> LeverMaker:
    """The next of the stops above the knob's value; no lever where there is none."""
    return _turn(knob, lambda now: min((s for s in stops if s > now * 1.001), default=now), 1)


def down_to(knob: str, *stops: float) -> LeverMaker:
    """The next of the stops below the knob's value; no lever where there is none."""
    return _turn(knob, lambda now: max((s for s in stops if s < now * 0.999), default=now), -1)


def within(knob: str, low: float, high: float) -> LeverMaker:
    """Back into the range; no lever for a value in it."""
    return _turn(knob, lambda now: min(max(now, low), high), 0)


def _turn(knob: str, to: Callable[[float], float], sign: int) -> LeverMaker:
    def make(knobs: Mapping[str, float], undo: str) -> Lever | None:
        if knob not in knobs:
            return None
        now, spec = float(knobs[knob]), KNOBS[knob]
        then = min(max(to(now), spec.low if sign >= 0 else max(spec.low, spec.slider[0])), spec.high)
        if math.isclose(then, now, rel_tol=1e-3, abs_tol=1e-9) or (then - now) * sign < 0:
            return None
        return Lever(knob, now, then, f"{knob} {_number(now)} -> {_number(then)}", undo)
    return make


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value - round(value, 2)) < 1e-9 else f"{value:.3g}"


def at(line: Line, shape: Shape) -> float | None:
    """The line's value for E experts and K picks."""
    return float(line(shape)) if callable(line) else line


def beyond(values: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """Which values are past a line; None: there is none on that side."""
    # They were stored as float32: one on the line must not count as past it.
    past = np.zeros(len(values), bool)
    if low is not None:
        past |= values < low - 1e-6 * abs(low)
    if high is not None:
        past |= values > high + 1e-6 * abs(high)
    return past
