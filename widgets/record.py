"""All that a report says of one run, read from its store alone: a live run, one at rest, or an imported one.

n steps, L layers, E experts, K picks of a token.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_core import health, origin
from moe_core.config import ConfigError, RunConfig
from moe_core.effects import COLUMNS, between, effects
from moe_core.health import Finding
from moe_core.knobs import Knobs
from moe_core.provenance import DATA, META
from moe_core.rules import WINDOW
from moe_core.storage.rows import written
from moe_core.storage.schema import STEP_MAX
from moe_core.store import Branch, RunStore, Steps, StoreError
from widgets.feed import NAMES, ROUTER_NAMES
from widgets.marks import Marks
from widgets.others import other_branches
from widgets.series import Shares

LEAST = 20  # steps that two branches must have of their own to be compared
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")  # all but the spaces and ends of lines


@dataclass(frozen=True)
class Record:
    """One branch of a run, as it was when it was read. ``config`` is None for an imported run.

    ``metrics``: per layer too, index step. ``shares``: means over layers, None without experts; ``newest_n2LE``:
    demand and served of every layer in the newest ``WINDOW`` steps. ``events``: as of the store;
    ``elsewhere``: those of the other branches, each under the branch that it happened on. ``others``: the other
    branches' own rows, for grey lines. ``fresh``: whether it began with weights of its own.
    ``partings``: (other branch, last common step, last step compared, :func:`moe_core.effects.between`).
    """

    name: str
    path: Path
    raw_config: dict[str, Any]
    config: RunConfig | None
    branch: str
    branches: list[Branch]
    last_steps: dict[str, int]  # of each branch
    metrics: pd.DataFrame
    shares: Shares | None
    newest_n2LE: np.ndarray
    events: list[dict[str, Any]]
    made: dict[str, Any]
    parent: dict[str, Any] | None  # of a fork: path, branch, step
    findings: list[Finding]
    effects: pd.DataFrame
    knobs: dict[str, float] = field(default_factory=dict)
    partings: tuple[tuple[str, int, int, pd.DataFrame], ...] = ()
    elsewhere: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    others: dict[str, pd.DataFrame] = field(default_factory=dict)
    fresh: bool = True
    tokens: str | None = None  # the fingerprint of what it read

    @classmethod
    def read(cls, source, branch: str | None = None, told: bool = True) -> Record:
        """From a run (``mc.Run``, attached or not), a RunStore, or a run's directory, which is only read.

        ``branch``: a name; None is the one that the run stands on. ``told=False`` leaves out effects and partings.
        Raises StoreError.
        """
        if isinstance(source, str | os.PathLike):
            with RunStore.open(source) as store:
                return cls.read(store, branch, told)
        store = getattr(source, "store", source)
        branches = store.branches()
        at = store.branch_id(branch)
        rows, shares, newest_n2LE = _rows(store, at)
        metrics = pd.DataFrame(rows.values, columns=rows.names, index=pd.Index(rows.steps, name="step"))
        last = int(rows.steps[-1]) if len(rows.steps) else 0
        events = _whole(store.read_events(at))
        config = _config(store.config)
        knobs = {} if config is None else _knobs(config, events, last)
        path = Path(store.path)
        return cls(
            name=path.resolve().name, path=path, raw_config=store.config, config=config,
            branch=next(b.name for b in branches if b.id == at), branches=branches,
            last_steps={b.name: store.last_step(b.id) for b in branches}, metrics=metrics,
            shares=shares, newest_n2LE=newest_n2LE, events=events, made=store.get_meta(META) or {},
            parent=store.get_meta("parent"),
            findings=_findings(store, at, last, knobs, config, metrics), knobs=knobs,
            effects=effects(store, at) if told else pd.DataFrame(columns=COLUMNS),
            partings=tuple(_partings(store, at, branches)) if told else (),
            elsewhere=_elsewhere(store, branches, events), others=other_branches(store, at, NAMES + ROUTER_NAMES),
            fresh=not (path / origin.STATE).exists(), tokens=store.get_meta(DATA))

    @property
    def last_step(self) -> int:
        return int(self.metrics.index[-1]) if len(self.metrics) else 0

    @property
    def n_experts(self) -> int:
        """E; 0 for a dense model, and where an imported log does not tell."""
        return self.config.model.n_experts if self.config is not None else self.newest_n2LE.shape[-1]

    @property
    def top_k(self) -> int:
        return self.config.router.top_k if self.config is not None else 1

    @property
    def routed(self) -> bool:
        """Whether a router chooses at all."""
        return self.n_experts > self.top_k

    @property
    def asking(self) -> list[list[Finding]]:
        """The findings that are not fine, those of one rule together and its worst first, as the panel lists them."""
        return list(health.by_rule(self.findings).values())

    def counted(self) -> dict[str, int]:
        """How many rules are at each level, the worst level first; those that none is at are left out."""
        levels = [same[0].level for same in self.asking]
        return {level: levels.count(level) for level in ("alarm", "watch") if level in levels}

    @property
    def marks(self) -> Marks:
        return Marks.of(pd.DataFrame([{**event["payload"], **event} for event in self.events]))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the logged steps that have a metric; both empty where none has."""
        if name not in self.metrics:
            return np.zeros(0, np.int64), np.zeros(0)
        values = self.metrics[name].to_numpy(float)
        there = ~np.isnan(values)
        return self.metrics.index.to_numpy()[there], values[there]

    def best_validation(self) -> tuple[int, float] | None:
        """(step, lowest val/loss)."""
        steps, values = self.series("val/loss")
        return (int(steps[values.argmin()]), float(values.min())) if len(steps) else None


def _rows(store: RunStore, branch: int) -> tuple[Steps, Shares | None, np.ndarray]:
    """A branch's rows without shares, their shares, and the newest ones of every layer; more may be coming in."""
    shares = Shares.read(store, branch) if store.read_steps(branch, limit=1).shares.shape[-1] else None
    rows = store.read_steps(branch, shares=False, limit=STEP_MAX if shares is None else len(shares.steps_n))
    since = int(rows.steps[-WINDOW - 1]) if len(rows) > WINDOW else 0
    return rows, shares, store.read_steps(branch, since, limit=WINDOW).shares


def _whole(said):
    """The same, without half characters and control characters: JSON can hold what no file of text can."""
    if isinstance(said, str):
        return _CONTROL.sub("", written(said))
    if isinstance(said, dict):
        return {key: _whole(value) for key, value in said.items()}
    return [_whole(one) for one in said] if isinstance(said, list) else said


def _elsewhere(store: RunStore, branches: list[Branch], told: list[dict]) -> dict[str, list[dict]]:
    """Branch name -> the events that happened on it and are not ``told`` yet; without the branches that have none."""
    known, found = {event["id"] for event in told}, {}
    for branch in branches:
        for event in store.read_events(branch.id):
            if event["id"] not in known and event["branch"] == branch.name:
                found.setdefault(branch.name, []).append(_whole(event))
    return found


def _config(raw: dict) -> RunConfig | None:
    """None where a run was not made from a config, but imported."""
    if "imported" in raw:
        return None
    try:
        return RunConfig.from_dict(raw)
    except ConfigError as error:
        raise StoreError(f"the run's config is of another version: {error}") from error


def _knobs(config: RunConfig, events: list[dict], last: int) -> dict[str, float]:
    """Each knob's value for the next step."""
    knobs = Knobs(config)
    knobs.replay((event["step"], event["payload"]) for event in events if event["kind"] == "knob")
    return {name: knob.at(last + 1) for name, knob in knobs.items()}


def _findings(store, branch, last, knobs, config, metrics) -> list[Finding]:
    if config is not None:
        return health.read(store, branch, last, knobs, config)
    return health.findings(metrics.tail(health.RECENT), knobs, 0)


def _partings(store: RunStore, current: int, branches: list[Branch]):
    """What every other branch has to say of the steps after it and the current one part."""
    mine, last = dict(store.lineage(current)), store.last_step(current)
    for other in branches:
        if other.id == current:
            continue
        theirs = dict(store.lineage(other.id))
        # Up to where both show the same steps: on each branch that both come from, the shorter loan of the two.
        common = max((min(mine[b], theirs[b]) for b in mine if b in theirs), default=0)
        upto = min(last, store.last_step(other.id))
        common = min(common, upto)
        if upto - common >= LEAST:
            yield other.name, common, upto, between(store, current, other.id, common, upto)
