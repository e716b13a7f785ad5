"""What each turn of a knob brought: every metric before and after, and whether the change stands out from the noise.

The test is an interrupted time series. Over the steps of both windows a metric is a smooth trend (a cubic: loss falls,
and bends), plus the turn (0 before it, 1 from its step on; along a ramp the part that is done), plus noise whose
neighbouring values are alike (see ``moe_core.noise``). ``difference`` is the turn's coefficient: how far the metric
lies from where the trend alone would have it. Over the metrics of one turn Holm's method holds the chance that a turn
which did nothing stands out anywhere to 5 in 100 (in simulations of such noise; see ``LEVEL`` there); ``low`` and
``high`` are at the level that it gives each metric.

What else happened at the same step, the end of a schedule or a shift in the data, is not told apart from the turn. A
change that builds up over the whole window looks like the trend's own bend, and is not claimed: two branches of
``run.ab(...)`` tell it apart, step by step on the same batches (:func:`effects_of_ab`).

n steps, M metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_core.checked import is_integer, plain
from moe_core.knobs import KNOBS
from moe_core.noise import PHI, holm, regress
from moe_core.store import RunStore

if TYPE_CHECKING:
    import pandas as pd

WINDOW = 50  # steps before a turn, and from it on
ENOUGH = 20  # values that a window must hold
DEGREE = 3  # of the trend
LONGEST = 0.97  # phi tried between two branches: a longer memory looks like a difference over such windows
COLUMNS = ["step", "knob", "from", "to", "metric", "before", "after", "difference", "low", "high", "stands_out",
           "n_effective", "said"]
# What is set rather than brought about, and what repeats another metric.
_NOT_TESTED = {spec.metric for spec in KNOBS.values()} | {"lr", "train/tokens_b", "val/ppl"}
_NOT_TESTED_GROUPS = ("lr/", "optim/")


def effects(store: RunStore, branch: int, window: int = WINDOW) -> pd.DataFrame:
    """One row for every turn of a knob on a branch's line and every metric, by step.

    Columns: step (the first that the turn acted on), knob, from, to, metric, before and after (means over the
    windows), difference, low, high, stands_out (<NA> where there are too few values), n_effective (roughly how
    many independent values would give as certain a mean as the autocorrelated ones of both windows), said (what cut a
    window short, or what was missing). A count that only grows, ``..._cum``, is read as its growth per step. Raises
    ValueError for a window of fewer than 20 steps.
    """
    if not is_integer(window := plain(window), ENOUGH):
        raise ValueError(f"window = {window!r}: must be an integer, at least {ENOUGH}")
    turns = [event for event in store.read_events(branch) if event["kind"] == "knob"]
    rows, found = store.read_steps(branch, shares=False), []
    columns = _series(rows.names, rows.values)
    at = sorted({event["step"] for event in turns})
    for k, step in enumerate(at):
        first = max(step - window, at[k - 1] if k else 0)
        last = min(step + window - 1, at[k + 1] - 1 if k + 1 < len(at) else step + window - 1)
        inside = slice(*np.searchsorted(rows.steps, (first, last + 1)))
        here = {event["payload"]["name"]: event["payload"] for event in turns if event["step"] == step}
        shape = _done(rows.steps[inside], step, here.values())
        tested = _test({name: values[inside] for name, values in columns.items()}, rows.steps[inside], step, shape)
        cut = [f"before: from step {first}, the previous turn"] * (k > 0 and first > step - window)
        cut += [f"after: up to step {last}, the next turn"] * (last < step + window - 1)
        for name, turn in here.items():
            others = [other for other in here if other != name]
            said = cut + [f"turned together with {', '.join(others)}"] * bool(others)
            was, becomes = _from_to(turn, rows, step)
            found += [{"step": step, "knob": name, "from": was, "to": becomes, **row,
                       "said": "; ".join(filter(None, [*said, row["said"]]))} for row in tested]
    return _frame(found, COLUMNS)


def effects_of_ab(ab) -> pd.DataFrame:
    """What choosing B over A brought: one row a metric of ``run.ab(...)``; see :func:`between`."""
    store = ab.run.store
    return between(store, store.branch_id(ab.branch_a), store.branch_id(ab.branch_b), ab.start, ab.start + ab.steps)


def between(store: RunStore, a: int, b: int, start: int, last: int) -> pd.DataFrame:
    """Two branches over the steps after ``start`` up to ``last``, where they saw the same batches.

    Columns: metric, a, b (means), difference (the mean of b - a, step by step, as estimated beside a straight line for
    its drift and the noise of ``moe_core.noise``: not quite that of the two means), low, high, stands_out,
    n_effective, said. Holm's method is over all metrics. Metrics that are equal on every step are left out.

    A difference that wanders by itself and means nothing stands out in at most 5 of 100 cases where its memory is
    short beside the window: in simulations of 20 to 100 steps with phi up to 0.9. A longer memory is not told from an
    effect: with 0.93 it was up to 7 in 100, with 0.96 up to 13, with 0.98 up to 27.
    """
    lines = [store.read_steps(branch, start, shares=False) for branch in (a, b)]
    steps = np.intersect1d(*(line.steps[line.steps <= last] for line in lines))
    of_a, of_b = (_series(line.names, line.values) for line in lines)
    at = [np.isin(line.steps, steps) for line in lines]
    pairs = {name: (of_a[name][at[0]], of_b[name][at[1]]) for name in of_a
             if name in of_b and not name.startswith("perf/")}
    moved = {name: y - x for name, (x, y) in pairs.items() if not np.array_equal(x, y, equal_nan=True)}

    rows, tests = [], _tests(moved, steps, design_of_pair, lambda seen: int(seen.sum()) >= ENOUGH, LONGEST)
    for name, difference in moved.items():
        x, y = pairs[name]
        row = {"metric": name, "a": _mean(x), "b": _mean(y), "difference": _mean(difference)}
        few = f"{int((~np.isnan(difference)).sum())} values, {ENOUGH} are needed"
        rows.append(row | (tests.get(name) or _untold(row["difference"], few)))
    return _frame(rows, ["metric", "a", "b", *COLUMNS[7:]])


def design_of_turn(steps_n: np.ndarray, turn: int, shape_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(design [n, 5], contrast [5]) of the trend and of a turn of which ``shape_n`` is done at each step."""
    time_n = (steps_n - turn + 0.5) / max(1, steps_n[-1] - steps_n[0])
    return (np.stack([*(time_n**power for power in range(DEGREE + 1)), shape_n], 1),
            np.eye(DEGREE + 2)[-1] * shape_n.max())


def design_of_pair(steps_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(design [n, 2], contrast [2]) of the mean of a difference that drifts along a straight line."""
    time_n = steps_n - steps_n.mean()
    return np.stack([np.ones(len(time_n)), time_n / max(np.abs(time_n).max(), 1)], 1), np.array([1.0, 0.0])


def _test(columns: Mapping[str, np.ndarray], steps: np.ndarray, turn: int, shape_n: np.ndarray) -> list[dict]:
    """A row for each metric of two windows that meet at step ``turn``."""
    after = steps >= turn

    def design(kept_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return design_of_turn(kept_n, turn, shape_n[np.isin(steps, kept_n)])

    def enough(seen: np.ndarray) -> bool:
        return min(int((seen & after).sum()), int((seen & ~after).sum())) >= ENOUGH

    tests, rows = (_tests(columns, steps, design, enough) if len(steps) else {}), []
    for name, values in columns.items():
        row = {"metric": name, "before": _mean(values[~after]), "after": _mean(values[after])}
        seen = [int((~np.isnan(values[side])).sum()) for side in (~after, after)]
        if sum(seen):
            few = f"{seen[0]} values before and {seen[1]} after: too few to tell, each needs {ENOUGH}"
            rows.append(row | (tests.get(name) or _untold(math.nan, few)))
    return rows


def _tests(columns: Mapping[str, np.ndarray], steps: np.ndarray, design: Callable, enough: Callable,
           longest: float = PHI[-1]) -> dict[str, dict]:
    """The regression of every metric that has enough values, one family under Holm's method."""
    groups: dict[bytes, list[str]] = {}  # metrics that are there on the same steps are fitted together
    said, twins, first = {}, {}, {}
    for name, values in columns.items():
        seen = ~np.isnan(values)
        if not enough(seen):
            continue
        if np.ptp(values[seen]) == 0:
            said[name] = _told(0.0, 0.0, 0.0, False, float(seen.sum()), "constant")
        elif (same := first.setdefault(values.tobytes(), name)) != name:
            twins[name] = same  # one question asked twice is one test
        else:
            groups.setdefault(seen.tobytes(), []).append(name)
    estimates = []
    for mask, names in groups.items():
        seen = np.frombuffer(mask, bool)
        values_nM = np.stack([columns[name][seen] for name in names], 1)
        estimates.append((names, regress(steps[seen], values_nM, *design(steps[seen]), longest)))
    if estimates:
        stands_out, held_to = holm(np.concatenate([estimate.p_M for _, estimate in estimates]))
        done = 0
        for names, estimate in estimates:
            part = slice(done, done := done + len(names))
            low, high = estimate.interval(held_to[part])
            for i, name in enumerate(names):
                said[name] = _told(estimate.value_M[i], low[i], high[i], stands_out[part][i],
                                   estimate.n_effective_M[i], "")
    return said | {name: said[same] for name, same in twins.items()}


def _told(difference, low, high, stands_out, n_effective, said) -> dict:
    return {"difference": float(difference), "low": float(low), "high": float(high), "stands_out": bool(stands_out),
            "n_effective": float(n_effective), "said": said}


def _untold(difference: float, said: str) -> dict:
    return {"difference": difference, "low": math.nan, "high": math.nan, "stands_out": None,
            "n_effective": math.nan, "said": said}


def _series(names: Sequence[str], values: np.ndarray) -> dict[str, np.ndarray]:
    """What is tested, by name: float64, counts as their growth a step."""
    columns = {}
    for i, name in enumerate(names):
        if name in _NOT_TESTED or name.startswith(_NOT_TESTED_GROUPS) or "/layer_" in name:
            continue
        column = values[:, i].astype(np.float64)
        if name.endswith("_cum"):
            column = np.diff(column, prepend=np.nan)
        columns[name] = column
    return columns


def _done(steps: np.ndarray, turn: int, payloads) -> np.ndarray:
    """The part of the turn that is done at each step: 0 before it; of several at once, the quickest."""
    over = min((p.get("over") or 1) if p["mode"] == "ramp" else 1 for p in payloads)
    return np.clip((steps - turn + 1) / over, 0.0, 1.0)


def _from_to(turn: Mapping, rows, step: int) -> tuple[float, float]:
    """The knob's value on the last step before the turn, and the one that the turn asks for."""
    metric = KNOBS[turn["name"]].metric if turn["name"] in KNOBS else None
    if metric not in rows.names:
        return math.nan, turn.get("value", math.nan)
    values = rows.column(metric)
    before, there = values[rows.steps < step], values[rows.steps >= step]
    back = float(there[0]) if len(there) else math.nan  # a schedule says for itself what it goes back to
    return (float(before[-1]) if len(before) else math.nan), turn.get("value", back)


def _mean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def _frame(rows: list[dict], columns: list[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=columns).astype({"stands_out": "boolean"})
