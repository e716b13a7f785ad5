"""What the live charts show of a run, read from its store step by step: nothing is asked of who trains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from moe_core.store import Steps
from widgets.charts import bias_names
from widgets.marks import Marks
from widgets.others import other_branches
from widgets.series import Shares

NAMES = ("train/loss", "train/ce", "val/loss", "grad/norm", "grad/clipped_cum")
ROUTER_NAMES = ("router/aux_mean", "router/entropy_mean", "router/top1_p_mean", "router/max_frac_mean",
                "router/max_frac_max", "router/drop_frac_mean")


class Feed:
    """Metrics, shares and marks of a run's current branch, kept up to date by :meth:`refresh`.

    For one thread. ``metrics``: DataFrame float32, index step; ``shares``: :class:`Shares` of the layer
    selection, None for a dense model; ``marks``: :class:`Marks`; ``others``: the rows of other branches, which
    stand still while the run is on this one. ``news(events)`` hears of each event once.
    """

    def __init__(self, run, news: Callable[[list[dict]], None] = lambda events: None):
        self._run, self._news, self._told = run, news, 0
        self._n_experts = run.config.model.n_experts
        self.select(None)

    def select(self, layer: int | None) -> None:
        """Show another layer, None for the mean of all, from the next refresh on."""
        self.layer, self._biases = layer, []
        names = NAMES + (ROUTER_NAMES if self._n_experts else ())
        if layer is not None and self._n_experts:
            names += tuple(f"{name}/layer_{layer}" for name in ROUTER_NAMES if name.endswith("_mean"))
        model, router = self._run.config.model, self._run.config.router
        names += ("train/mtp",) if model.n_mtp else ()
        if self._n_experts and router.uses_bias:
            names += ("router/bias_max",)
            self._biases = bias_names(self._n_experts, model.n_moe_layer, layer)
        self._names, self._branch = names, None

    def refresh(self) -> bool:
        """Read what the store has more than at the last call; whether anything came."""
        run = self._run
        changed = self._branch != run.branch
        if changed:
            self._reset(run.branch)
        newer = [self._shown(part) for part in
                 run.store.read_parts(self._branch_id, self.last_step, shares=bool(self._n_experts)) if len(part)]
        if newer:
            rows, shares = zip(*newer, strict=True)
            self.last_step, changed = int(rows[-1].index[-1]), True
            self.metrics = pd.concat([self.metrics, *rows] if len(self.metrics) else rows)
            if self.shares is not None:
                self.shares = self.shares.extended(*shares)
        newest = run.store.read_events(self._branch_id, after=self._last_event)
        if newest:
            self._last_event, changed = max(event["id"] for event in newest), True
            self.marks = Marks.of(run.events())
            self._news([event for event in newest if event["id"] > self._told])
            self._told = max(self._told, self._last_event)
        return changed

    def _shown(self, part: Steps) -> tuple[pd.DataFrame, Shares | None]:
        """What the charts show of these steps."""
        columns, names = np.stack([part.column(name) for name in self._names]), [*self._names]
        if self._biases:  # their mean over layers here: a line is drawn of each expert, not of each layer too
            biases_ELn = np.stack([part.column(name) for name in self._biases]).reshape(self._n_experts, -1, len(part))
            columns = np.concatenate([columns, biases_ELn.mean(1)])
            of = "mean" if self.layer is None else f"layer_{self.layer}"
            names += [f"router/bias_e{expert}/{of}" for expert in range(self._n_experts)]
        shares = None if self.shares is None else Shares.of(part.steps, part.shares, self.layer)
        return pd.DataFrame(columns.T, columns=names, index=pd.Index(part.steps, name="step")), shares

    def _reset(self, branch: str) -> None:
        self._branch_id = self._run.store.branch_id(branch)
        self._branch, self.last_step, self._last_event = branch, 0, 0
        self.metrics = pd.DataFrame(columns=self._names, index=pd.Index([], name="step", dtype=np.int64),
                                    dtype=np.float32)
        drawn = [name for name in self._names if not name.startswith("router/bias_")]
        self.others = other_branches(self._run.store, self._branch_id, drawn)
        model, self.marks = self._run.config.model, Marks()
        nothing = np.zeros((0, 2, model.n_moe_layer, model.n_experts), np.float32)
        self.shares = Shares.of(np.zeros(0, np.int64), nothing, self.layer) if self._n_experts else None
