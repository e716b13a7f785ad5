"""The lines of other branches, to stand grey behind the current one: each from where it parts, few and bounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from moe_core.store import RunStore
from widgets.series import thin

MOST = 8  # branches that are shown, the newest ones
POINTS = 320  # of one metric, all branches together


def other_branches(store: RunStore, branch: int, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Branch name -> its own rows of the metrics ``names``, index step, for the newest of the other branches.

    ``branch``: id of the current one. A branch begins with the row that it parts at, so that its line starts on
    the line that it left; one that the current branch comes from begins where that left it.
    """
    lent, found = dict(store.lineage(branch)), []
    for other in reversed(store.branches()):
        if other.id == branch or len(found) == MOST:
            continue
        parts = lent.get(other.id, other.fork_step or 0)
        rows = store.read_steps(other.id, since=parts - 1, shares=False)
        if len(rows.steps) > (parts > 0):  # more than the row that is inherited
            columns = np.stack([rows.column(name) for name in names], 1)
            frame = pd.DataFrame(columns, columns=list(names), index=pd.Index(rows.steps, name="step"))
            found.append((other.name, frame))
    return dict(reversed(found))


def joined(others: Mapping[str, pd.DataFrame], metric: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """One metric of all the branches as one line with gaps: steps and values, float32, and whose point each is.

    A trace for all, since each trace of its own has a price in a page that draws.
    """
    x, y, whose = [], [], []
    gap = np.array([np.nan], np.float32)
    for name, rows in others.items():
        values = rows[metric].to_numpy(np.float32) if metric in rows else np.zeros(0, np.float32)
        there = ~np.isnan(values)
        steps, values = thin(rows.index.to_numpy()[: len(values)][there], values[there],
                             max(POINTS // len(others), 8))
        x += [steps, gap]
        y += [values, gap]
        whose += [name] * len(steps) + [""]
    if not x:
        return np.zeros(0, np.float32), np.zeros(0, np.float32), []
    return np.concatenate(x), np.concatenate(y), whose
