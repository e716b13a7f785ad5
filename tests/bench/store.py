"""What a log call costs beside SQLite's own floor, and reading: ``python tests/bench/store.py``.

The floor is a bare ``INSERT`` of one blob of the same size, with its commit, in a table (id, blob) of a
file with the same settings. The floor, a second floor (the null control) and RunStore take turns, in rounds,
in one process.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from moe_core.store import RunStore

POINTS = 40
METRICS = {f"router/metric_{i}": float(i) + 0.1 for i in range(POINTS)}


class Floor:
    """Bare SQLite: one table, one blob a row, one commit a row."""

    def __init__(self, path: Path, size: int):
        self.file, self.blob = path, os.urandom(size)
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")
        self.db.execute("CREATE TABLE rows(id INTEGER PRIMARY KEY, value BLOB)")

    def log(self, step: int) -> None:
        self.db.execute("INSERT INTO rows VALUES (?, ?)", (step, self.blob))

    def bytes(self) -> int:
        self.db.close()
        return self.file.stat().st_size


class Ours:
    """RunStore with the same number of bytes a row."""

    def __init__(self, path: Path, shares: np.ndarray | None):
        self.store, self.shares = RunStore.create(path, {}), shares

    def log(self, step: int) -> None:
        self.store.log_step(1, step, time.time(), METRICS, self.shares)

    def bytes(self) -> int:
        self.store.close()
        return (self.store.path / "run.sqlite").stat().st_size


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:+6.2f} (quartiles {low:+.2f} to {high:+.2f})"


def logging(folder: Path, rounds: int, calls: int, shares: np.ndarray | None) -> None:
    """Prints what a call costs over the floor, paired by round, and the bytes a point over it."""
    size = 4 * POINTS + (0 if shares is None else shares.nbytes)
    sides = {"floor": Floor(folder / "floor", size), "null": Floor(folder / "null", size),
             "ours": Ours(folder / "ours", shares)}
    took: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        order = list(sides)[turn % 3:] + list(sides)[:turn % 3]  # each goes first equally often
        for name in order:
            log = sides[name].log
            began = time.perf_counter()
            for step in range(turn * calls + 1, (turn + 1) * calls + 1):
                log(step)
            took[name].append((time.perf_counter() - began) / calls * 1e6)
    rows, stored = rounds * calls, {name: side.bytes() for name, side in sides.items()}
    points = size // 4
    what = f"{POINTS} metrics" + ("" if shares is None else f" and {shares.size} shares")
    print(f"{what}, {rows} rows, microseconds a call (median)")
    print(f"  floor            {statistics.median(took['floor']):6.2f}, "
          f"{stored['floor'] / rows / points:.2f} bytes a point")
    for name in ("null", "ours"):
        over = [a - b for a, b in zip(took[name], took["floor"], strict=True)]
        print(f"  {name} over floor  {spread(over)}, mean {statistics.mean(over):+.2f}; "
              f"{(stored[name] - stored['floor']) / rows / points:+.2f} bytes a point")


def reading(folder: Path, rows: int) -> None:
    """Prints how long a chart waits for a run of ``rows`` steps, whose rows have three sets of names."""
    shares = np.random.default_rng(0).random((2, 10, 8), np.float32)
    with RunStore.create(folder / "read", {}) as store:
        for step in range(1, rows + 1):
            more = {"val/loss": 1.0} if step % 10 == 0 else {"train/extra": 2.0} if step % 7 == 0 else {}
            store.log_step(1, step, 0.0, METRICS | more, shares)
        db = sqlite3.connect(folder / "read" / "run.sqlite")
        point = "SELECT step, value FROM points WHERE branch = 1 AND name = 'router/metric_7'"
        for what, read in {
            "all, with shares [2, 10, 8]": lambda: store.read_steps(1),
            "all, metrics only": lambda: store.read_steps(1, shares=False),
            "the newest tenth": lambda: store.read_steps(1, since=rows - rows // 10),
            "the newest 10 steps": lambda: store.read_steps(1, since=rows - 10),
            "the newest step's number": lambda: store.last_step(1),
            "one metric through the view points": lambda: db.execute(point).fetchall(),
        }.items():
            times = []
            for _ in range(5):
                began = time.perf_counter()
                read()
                times.append((time.perf_counter() - began) * 1e3)
            print(f"  {what:36s} {statistics.median(times):8.2f} ms")
        db.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=240)
    parser.add_argument("--calls", type=int, default=50, help="a round")
    parser.add_argument("--steps", type=int, nargs="+", default=[10_000, 100_000], help="to read")
    parser.add_argument("--dir", help="whose disk to measure (default: the temporary folder)")
    args = parser.parse_args()
    for shares in (None, np.random.default_rng(0).random((2, 10, 8), np.float32)):
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            logging(Path(folder), args.rounds, args.calls, shares)
    for rows in args.steps:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            print(f"reading {rows} steps of {POINTS} metrics, three layouts")
            reading(Path(folder), rows)


if __name__ == "__main__":
    main()
