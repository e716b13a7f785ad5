"""From a run's rows to lines short enough to draw, without losing what happened in between.

n steps, L layers, E experts. A layer selection is a layer's index, or None for the mean over layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_core.store import RunStore

POINTS = 1000  # most points of one drawn line


def thin(x: np.ndarray, y: np.ndarray, limit: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``limit`` (>= 8) points of a line, float32: each bucket's smallest and largest, and the last.

    A bucket is a power of two of neighbouring points counted from the line's start, so a line that grows
    keeps the points it showed until their number doubles, and a spike of one step is drawn at its step and
    height. NaN counts as absent: it never hides a number.
    """
    x, y = np.asarray(x), np.asarray(y, np.float32)
    n = len(x)
    if n <= limit:
        return x.astype(np.float32), y
    width = 2
    while 2 * -(-n // width) + 1 > limit:
        width *= 2
    buckets = np.pad(y, (0, -n % width), constant_values=np.nan).reshape(-1, width)
    first, low, high = np.arange(len(buckets)) * width, buckets.argmin(1), buckets.argmax(1)
    gaps = np.flatnonzero(np.isnan(buckets.ravel()[first + low]))  # a NaN is what both find, where there is one
    absent = np.isnan(buckets[gaps])
    low[gaps] = np.where(absent, np.inf, buckets[gaps]).argmin(1)
    high[gaps] = np.where(absent, -np.inf, buckets[gaps]).argmax(1)
    kept = np.unique(np.concatenate([first + low, first + high, [n - 1]]))
    return x[kept].astype(np.float32), y[kept]


def within(steps: np.ndarray, window: tuple[float, float] | None) -> slice:
    """Where ``steps``, sorted, lie in a window of the step axis, and one on either side, so that lines reach it."""
    if window is None:
        return slice(None)
    first, last = np.searchsorted(steps, window[0]), np.searchsorted(steps, window[1], side="right")
    return slice(max(int(first) - 1, 0), int(last) + 1)


@dataclass(frozen=True)
class Shares:
    """Every expert's share of the assignments: over steps for one layer selection, at the end in all layers.

    ``steps_n`` int64; ``demand_nE`` and ``served_nE`` float32, each expert's steps beside each other, as lines are
    drawn; ``now_2LE`` float32, demand and served of the last step.
    """

    steps_n: np.ndarray
    demand_nE: np.ndarray
    served_nE: np.ndarray
    now_2LE: np.ndarray

    @classmethod
    def of(cls, steps_n: np.ndarray, shares_n2LE: np.ndarray, layer: int | None = None) -> Shares:
        """From the arrays that a store reads: shares float32 [n, 2, L, E], demand and served."""
        chosen_n2E = shares_n2LE.mean(2) if layer is None else shares_n2LE[:, :, layer]
        now_2LE = shares_n2LE[-1].copy() if len(steps_n) else np.full(shares_n2LE.shape[1:], np.nan, np.float32)
        return cls(np.asarray(steps_n), *(np.asfortranarray(chosen_n2E[:, k]) for k in (0, 1)), now_2LE)

    @classmethod
    def read(cls, store: RunStore, branch: int, layer: int | None = None) -> Shares:
        """From a run's store, all rows that a branch (an id) shows."""
        first, *others = (cls.of(part.steps, part.shares, layer) for part in store.read_parts(branch))
        return first.extended(*others)

    @classmethod
    def from_frame(cls, experts: pd.DataFrame, layer: int | None = None) -> Shares:
        """From the long frame of ``run.experts()``: columns step, layer, expert, demand, served.

        Raises ValueError where a step lacks a layer or an expert.
        """
        ordered = experts.sort_values(["step", "layer", "expert"], kind="stable")
        steps, layers, width = (ordered[name].unique() for name in ("step", "layer", "expert"))
        if len(ordered) != len(steps) * len(layers) * len(width):
            raise ValueError(f"experts: {len(ordered)} rows for {len(steps)} steps, {len(layers)} layers and "
                             f"{len(width)} experts; every step must have every expert of every layer once")
        values = ordered[["demand", "served"]].to_numpy(np.float32)
        values_n2LE = values.reshape(len(steps), len(layers), len(width), 2).transpose(0, 3, 1, 2)
        return cls.of(steps, values_n2LE, layer)

    @property
    def n_experts(self) -> int:
        return self.now_2LE.shape[-1]

    def cut(self, part: slice) -> Shares:
        """Some of these steps; what is at the last of all stays."""
        return Shares(self.steps_n[part], self.demand_nE[part], self.served_nE[part], self.now_2LE)

    def extended(self, *newer: Shares) -> Shares:
        """These steps, then ``newer`` ones of the same layer selection."""
        parts = (self, *newer)
        steps_n = np.concatenate([part.steps_n for part in parts])

        def joined(name: str) -> np.ndarray:
            out_En = np.empty((self.n_experts, len(steps_n)), np.float32)
            return np.concatenate([getattr(part, name) for part in parts], out=out_En.T)
        return Shares(steps_n, joined("demand_nE"), joined("served_nE"), parts[-1].now_2LE)
