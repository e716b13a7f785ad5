"""What headless training shows: the legacy training scripts' lines on stdout, and one progress bar on a terminal.

The lines are made of rows that are on disk already. Those of a MoE model::

    Model params: 202,952,528 (202.95M)
    iter    400 | loss 5.8884 | lr 3.208e-04 | 33016 tok/s | r_max 0.19 act_min 8 col 0
    eval | val_loss 5.9093

and those of a dense one::

    [muon_sophia ] step 1200/6000  loss 5.6797  avg 1186.83 ms/it    55219 tok/s  gnorm 0.39/1
    [muon_sophia ]   (val) loss 9.0075  ppl 8164.1

``loss`` is ``train/loss`` of that step, ``val_loss`` cross-entropy alone; tok/s and ms/it are of the steps since the
line before. An eval line belongs to the line above it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TextIO

import numpy as np

from moe_core.config import RunConfig
from moe_core.model import count_params
from moe_core.store import RunStore


def params_line(config: RunConfig) -> str:
    n = count_params(config.model)
    return f"Model params: {n:,} ({n / 1e6:.2f}M)"


def step_line(config: RunConfig, step: int, row: Mapping[str, float], tok_s: float, total: int) -> str:
    """A step's line. ``row``: its metrics; ``tok_s``: tokens a second to show; ``total``: the last step planned."""
    if not config.model.n_experts:
        return (f"[{config.optim.optimizer:<12}] step {step:>4}/{total}  loss {row['train/loss']:.4f}  "
                f"avg {1000 * config.tokens_per_step / tok_s:.2f} ms/it {tok_s:8.0f} tok/s  "
                f"gnorm {row['grad/norm']:.2f}/{row['grad/clip']:g}")
    return (f"iter {step:6d} | loss {row['train/loss']:.4f} | lr {row['lr']:.3e} | {tok_s:.0f} tok/s | "
            f"r_max {row['router/max_frac_max']:.2f} act_min {row['router/active_min']:.0f} "
            f"col {row['router/collapsed']:.0f}")


def eval_line(config: RunConfig, row: Mapping[str, float]) -> str:
    """The line of a step's validation."""
    if not config.model.n_experts:
        return f"[{config.optim.optimizer:<12}]   (val) loss {row['val/loss']:.4f}  ppl {row['val/ppl']:.1f}"
    return f"eval | val_loss {row['val/loss']:.4f}"


class Console:
    """Shows a run while it trains, from its store; :meth:`look` every now and then, from one thread."""

    def __init__(self, store: RunStore, config: RunConfig, branch: str, step: int, total: int):
        """``branch``, ``step``: where the run is; ``total``: the step that it is trained to."""
        self._store, self._config, self._total = store, config, total
        self._name, self._branch = branch, store.branch_id(branch)
        self._shown = {b.id: store.last_step(b.id) for b in store.branches()}  # the last step of each that was shown
        self._since: list[float] = []  # tokens a second of each step since the last line
        self._bar = _bar(step, total)

    def start(self) -> None:
        self._print(params_line(self._config))

    def look(self, branch: str) -> None:
        """Show what was written since the last look. ``branch``: the run's current one."""
        if branch != self._name:
            self.say(f"now on branch {branch!r}")
            self._since, self._name, self._branch = [], branch, self._store.branch_id(branch)
            self._shown |= {b.id: b.fork_step for b in self._store.branches() if b.id not in self._shown}
        rows = self._store.read_steps(self._branch, self._shown[self._branch], shares=False)
        for step, values in zip(rows.steps.tolist(), rows.values.astype(float), strict=True):
            self._shown[self._branch] = step
            self._show(step, dict(zip(rows.names, values.tolist(), strict=True)))
        if self._bar is not None and self._bar.n != self._shown[self._branch]:
            self._bar.n = self._shown[self._branch]
            self._bar.refresh()

    def _show(self, step: int, row: Mapping[str, float]) -> None:
        self._since.append(row["perf/tok_s"])
        validated = not math.isnan(row.get("val/loss", math.nan))
        if validated or step % self._config.log_interval == 0 or step == self._total:
            tok_s = 1 / np.mean(1 / np.array(self._since))  # each step has as many tokens
            self._print(step_line(self._config, step, row, tok_s, self._total))
            self._since = []
        if validated:
            self._print(eval_line(self._config, row))

    def say(self, line: str) -> None:
        """A line beside the training's own, on stderr."""
        self._print(line, sys.stderr)

    def _print(self, line: str, where: TextIO | None = None) -> None:
        where = where or sys.stdout
        if self._bar is None:
            print(line, file=where, flush=True)
        else:
            self._bar.write(line, file=where)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _bar(step: int, total: int):
    """A bar over all steps on stderr, where that is a terminal and tqdm is installed; else None."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(initial=step, total=total, unit="step", file=sys.stderr, dynamic_ncols=True, leave=False)
