"""Rows of a run's file and what they mean: packing a step's numbers, decoding many steps at once.

L layers, E experts, n rows.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_core.storage.schema import STEP_MAX


@dataclass(frozen=True)
class Branch:
    """A line of a run's history; up to ``fork_step`` it is that of ``parent``, an id. ``main`` has none."""

    id: int
    name: str
    parent: int | None
    fork_step: int | None
    created: float  # seconds since 1970


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of a branch after ``step``; ``name`` None: saved by rule, not by a person. ``path``: in the run."""

    id: int
    branch: int
    step: int
    name: str | None
    path: str
    created: float


@dataclass(frozen=True, eq=False)
class Steps:
    """n steps, oldest first.

    ``names`` has every metric of these rows, so two reads may differ in it. NaN stands where a row has no
    such metric, or no shares; L = E = 0 while no step of the run has any.
    """

    steps: np.ndarray  # int64 [n]
    time: np.ndarray  # float64 [n], seconds since 1970
    names: list[str]
    values: np.ndarray  # float32 [n, len(names)]
    shares: np.ndarray  # float32 [n, 2, L, E]: demand, served

    def __len__(self) -> int:
        return len(self.steps)

    def column(self, name: str) -> np.ndarray:
        """float32 [n] of one metric; all NaN where none of these rows has it."""
        if name not in self._places:
            return np.full(len(self), np.nan, np.float32)
        return self.values[:, self._places[name]]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


def pack_metrics(floats: struct.Struct, metrics: Mapping[str, float]) -> bytes:
    """The values as little-endian float32, in order. Raises TypeError naming what is no number."""
    try:
        return floats.pack(*metrics.values())
    except (struct.error, OverflowError, TypeError):
        for name, value in metrics.items():
            try:
                float(value)
            except (TypeError, ValueError):
                raise TypeError(f"{name} = {value!r}: must be a number") from None
        # Only a finite number beyond float32 is left to refuse; it is kept as the infinity it rounds to.
        with np.errstate(over="ignore"):
            return np.array([float(value) for value in metrics.values()]).astype("<f4").tobytes()


def decode(rows: Sequence[tuple], layouts: Mapping[int, tuple[str, int, int]], shares: bool) -> Steps:
    """Rows (id, time, layout, metrics, and shares if so) as arrays; ``layouts``: id -> (names as JSON, L, E).

    One join of blobs and one scatter for each layout, no loop over rows: a run of 10k steps is read while
    somebody waits for a chart.
    """
    # column by column: zip(*rows) would make an iterator for each row and take eight times as long
    ids, time, layout, metrics, *rest = ([row[column] for row in rows] for column in range(4 + shares))
    layout_n = np.array(layout, np.int64)
    used = {number: np.flatnonzero(layout_n == number) for number in np.unique(layout_n).tolist()}
    columns: dict[str, int] = {}
    for number in used:
        for name in json.loads(layouts[number][0]):
            columns.setdefault(name, len(columns))
    values = np.full((len(rows), len(columns)), np.nan, np.float32)
    for number, at in used.items():
        where = [columns[name] for name in json.loads(layouts[number][0])]
        values[np.ix_(at, where)] = _floats(metrics, at).reshape(len(at), len(where))

    # All rows that have shares have the same L and E.
    shape = max((layout[1:] for layout in layouts.values()), default=(0, 0)) if shares else (0, 0)
    load = np.full((len(rows), 2, *shape), np.nan, np.float32)
    for number, at in used.items():
        if load.size and layouts[number][1:] == shape:
            load[at] = _floats(rest[0], at).reshape(len(at), 2, *shape)
    return Steps(np.array(ids, np.int64) & STEP_MAX, np.array(time, np.float64), list(columns), values, load)


def _floats(blobs: Sequence[bytes], at: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"".join([blobs[row] for row in at.tolist()]), "<f4")


def to_json(value: Any) -> str:
    """JSON for every reader: NaN and infinities, which it lacks, become text that float() takes back, and half a
    character, which no text file can hold, a question mark."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except ValueError:
        text = json.dumps(_finite(value), allow_nan=False, ensure_ascii=False)
    return written(text)


def written(text: str) -> str:
    """Text as a file can hold it, half a character as a question mark."""
    return text.encode(errors="replace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
