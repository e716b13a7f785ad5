"""What a shoot-out says: its table, the spread over seeds, and the legacy scripts' console lines."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_core.config import RunConfig

TAIL = 0.05  # of a run's steps, the last ones, whose mean cross-entropy is its loss: one batch says little
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the last is a little wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
COLUMNS = ("optimizer", "ms/it", "tok/s", "loss", "loss std", "val/loss", "val/loss std", "seeds", "difference", "low",
           "high", "within spread", "steps to baseline", "seconds to baseline", "peak MiB", "steps", "peaks", "note")


@dataclass(frozen=True)
class Line:
    """One run: ``rows`` (index step) has ``run.metrics()`` and, cumulative, ``tokens`` and ``seconds``.

    The seconds are those of its steps, without validation, saving and pauses.
    """

    rows: object
    done: bool
    diverged: str | None = None
    peak_memory_b: int | None = None

    @classmethod
    def of(cls, rows, config: RunConfig, end: Mapping | None) -> Line:
        """``end``: what the run's store has of its end, None while it trains."""
        if not len(rows):  # one that turned non-finite in its first step
            rows = rows.reindex(columns=["train/ce", "val/loss", "perf/tok_s"]).astype(float)
        took = config.tokens_per_step / rows["perf/tok_s"]
        rows = rows.assign(tokens=rows.index * float(config.tokens_per_step), seconds=took.cumsum())
        end = end or {}
        return cls(rows, bool(end) and "diverged" not in end, end.get("diverged"), end.get("peak_memory_b"))

    @property
    def loss(self) -> float:
        """Mean ``train/ce`` of the last 5 % of the steps."""
        return float(self.rows["train/ce"].iloc[-max(round(TAIL * len(self.rows)), 1):].mean())

    @property
    def val_loss(self) -> float:
        """The last ``val/loss``; NaN where none was measured."""
        seen = self.rows["val/loss"].dropna()
        return float(seen.iloc[-1]) if len(seen) else math.nan

    @property
    def ms(self) -> float:
        """Mean milliseconds of a step; the first, which may compile, is left out."""
        took = self.rows["seconds"].diff()[1:] if len(self.rows) > 1 else self.rows["seconds"]
        return 1e3 * float(took.mean())

    def reached(self, target: float) -> tuple[float, float]:
        """(step, seconds) at which ``val/loss`` first came down to ``target``; NaN if it never did.

        Between two validations it is taken as a straight line.
        """
        val = self.rows["val/loss"].dropna()
        below = np.flatnonzero(val.to_numpy() <= target)
        if not len(below):
            return math.nan, math.nan
        at = below[0]
        step = float(val.index[at])
        if at:
            (s0, s1), (v0, v1) = val.index[at - 1 : at + 1], val.iloc[at - 1 : at + 1]
            step = s0 + (s1 - s0) * (v0 - target) / (v0 - v1)
        return step, float(np.interp(step, self.rows.index, self.rows["seconds"]))


def interval(differences: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean of differences, by Student's t; infinite for fewer than two."""
    n = len(differences)
    if n < 2:
        return -math.inf, math.inf
    half = T975[min(n - 1, len(T975)) - 1] * statistics.stdev(differences) / math.sqrt(n)
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def table(lines: Mapping[str, Mapping[int, Line]], baseline: str, peaks: Mapping[str, str]):
    """DataFrame, one row an entry, in :data:`COLUMNS`; ``.attrs["baseline"]`` is the one that others are compared with.

    ``ms/it``, ``tok/s``, ``loss`` and ``val/loss`` are means over the seeds that ran to the end, ``... std`` their
    standard deviations. ``difference``: of ``val/loss`` to the baseline, seed by seed, which share batches and, in
    models of one shape, initial weights; ``low`` and ``high`` are its 95 % interval, and ``within spread`` says that
    it has 0 in it (NA for fewer than two seeds). ``steps`` and ``seconds to baseline``: until ``val/loss`` was down at
    the baseline's last of the same seed, NaN where a seed never was. ``peak MiB``: the most memory that torch had
    allocated on the GPU, above what was there before; NaN on a CPU, where a process has one peak for all its runs.
    """
    import pandas as pd

    base = {seed: line for seed, line in lines[baseline].items() if line.done}
    rows = []
    for label, by_seed in lines.items():
        done = {seed: line for seed, line in by_seed.items() if line.done}
        shared = [seed for seed in done if seed in base]
        apart = [done[seed].val_loss - base[seed].val_loss for seed in shared]
        low, high = interval(apart)
        reached = [done[seed].reached(base[seed].val_loss) for seed in shared]
        ms = _mean([line.ms for line in done.values()])
        per_step = _mean([float(line.rows["tokens"].iloc[0]) for line in done.values()])  # of one step, the first
        other = label != baseline
        rows.append({
            "optimizer": label, "ms/it": ms, "tok/s": 1e3 * per_step / ms,
            "loss": _mean([line.loss for line in done.values()]), "loss std": _std([x.loss for x in done.values()]),
            "val/loss": _mean([line.val_loss for line in done.values()]),
            "val/loss std": _std([line.val_loss for line in done.values()]), "seeds": len(done),
            "difference": _mean(apart) if other else math.nan,
            "low": low if other and len(apart) > 1 else math.nan,
            "high": high if other and len(apart) > 1 else math.nan,
            "within spread": low <= 0 <= high if other and len(apart) > 1 else pd.NA,
            "steps to baseline": _mean([step for step, _ in reached]),
            "seconds to baseline": _mean([seconds for _, seconds in reached]),
            "peak MiB": max((x.peak_memory_b / 2**20 for x in done.values() if x.peak_memory_b), default=math.nan),
            "steps": max((int(line.rows.index[-1]) for line in done.values()), default=0), "peaks": peaks[label],
            "note": _note(by_seed, done)})
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({"within spread": "boolean"})
    frame.attrs["baseline"] = baseline
    return frame


def _note(by_seed: Mapping[int, Line], done: Mapping[int, Line]) -> str:
    diverged = [f"seed {seed} diverged" for seed, line in by_seed.items() if line.diverged]
    going = [f"seed {seed} at step {line.rows.index[-1] if len(line.rows) else 0}" for seed, line in by_seed.items()
             if not line.diverged and seed not in done]
    return ", ".join(diverged + going)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def write_csv(frame, path: str | os.PathLike) -> None:
    """The table as CSV, whole or not at all."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        frame.to_csv(draft, index=False, float_format="%.6g")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


# ---- the legacy scripts' console --------------------------------------------------------------------------


def step_lines(name: str, rows, since: int, config: RunConfig) -> list[str]:
    """The legacy scripts' lines of the steps after ``since``: one every ``log_interval``, and one for each validation.

    ``rows``: ``run.metrics()`` from the first step on, which the average is taken over.
    """
    lines, steps, label = [], config.optim.max_iters, f"[{name:<12}]"
    average = (1e3 * config.tokens_per_step / rows["perf/tok_s"]).expanding().mean()
    for step, row in rows.loc[since + 1 :].iterrows():
        if step % config.log_interval == 0 or step == steps:
            ms = average[step]
            lines.append(f"{label} step {step:>4}/{steps}  loss {row['train/ce']:.4f}  avg {ms:.2f} ms/it "
                         f"{1e3 * config.tokens_per_step / ms:>8.0f} tok/s  "
                         f"gnorm {row['grad/norm']:.2f}/{config.optim.grad_clip:g}")
        if row.get("val/loss", math.nan) == row.get("val/loss", math.nan):
            lines.append(f"{label}   (val) loss {row['val/loss']:.4f}  ppl {row['val/ppl']:.1f}")
    return lines


def summary_lines(frame, gpu: bool) -> list[str]:
    """The legacy scripts' summary of a :func:`table`, then what ours adds to it."""
    baseline, width = frame.attrs["baseline"], max(12, *map(len, frame["optimizer"]))
    lines = [f"=== Summary ({'GPU' if gpu else 'CPU'}) ==="]
    for row in frame.to_dict("records"):
        lines.append(f"{row['optimizer']:<{width}} {row['ms/it']:>7.2f} ms/it {row['tok/s']:>11.0f} tok/s   "
                     f"loss {row['loss']:.4f}")
    lines.append(f"=== Against {baseline}, by validation loss ===")
    for row in frame.to_dict("records"):
        said = f"{row['optimizer']:<{width}} val {row['val/loss']:.4f}"
        if row["seeds"] > 1:
            said += f" ± {row['val/loss std']:.4f} over {row['seeds']} seeds"
        if row["optimizer"] != baseline and row["seeds"]:
            said += f"   {row['difference']:+.4f}"
            if row["low"] == row["low"]:
                said += f" [{row['low']:+.4f}, {row['high']:+.4f}]"
                said += " within the spread" if row["within spread"] else " beyond the spread"
            steps = row["steps to baseline"]
            said += (f"   there in {steps:.0f} steps, {row['seconds to baseline']:.1f} s" if steps == steps
                     else "   never there")
        if row["peak MiB"] == row["peak MiB"]:
            said += f"   peak {row['peak MiB']:.0f} MiB"
        lines.append(f"{said}   ({row['peaks']})" + (f"   {row['note']}" if row["note"] else ""))
    return lines
