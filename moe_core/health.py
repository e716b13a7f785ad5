"""From stored metrics to findings: the router guide as rules, each with the levers that answer it.

A rule is data and a small test; add one to ``RULES`` and it is read from then on::

    from moe_core.health import RULES, Rule, sustained
    RULES.append(Rule("high loss", "train/ce", "watch", sustained(above=6.0), "train/ce is {value:.2f}"))
    run.health()

"Sustained" is the mean over the last 50 logged steps, and no fewer than 50; a "spike" is single steps beyond
a line that this mean keeps; a "trend" is a fitted line's change that stands out of the scatter around it.
They are guardrails, to be read with the loss and the throughput, not laws.

E experts, K picks of a token, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moe_core.config import RunConfig
from moe_core.guide import BANDS, RULES, healthy_band
from moe_core.rules import LEVELS, WINDOW, Finding, Lever, Reading, Rule, Shape, View, spike, sustained
from moe_core.store import RunStore

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BANDS", "RULES", "Finding", "Lever", "Reading", "Rule", "Shape", "View", "answer", "by_rule", "findings",
           "healthy_band", "recent", "spike", "sustained"]

RECENT = 4 * WINDOW  # logged steps that a reading looks at


def findings(metrics: pd.DataFrame, knobs: Mapping[str, float], n_experts: int, top_k: int = 1,
             rules: Sequence[Rule] | None = None) -> list[Finding]:
    """What the rules (None: ``RULES``) say of the newest of the ``metrics``, worst first.

    ``metrics``: as of ``run.metrics(per_layer=True)``, index step; a metric that is absent is not judged.
    ``knobs``: present values by name, for the levers. Where a minority of the layers breaks a rule each is said
    by itself and by its number; where most do it is said once, of all.
    """
    if not len(metrics):
        return []
    columns = {name: metrics[name].to_numpy(float) for name in metrics}
    steps, shape = metrics.index.to_numpy(), Shape(n_experts, top_k)
    layers = sorted({int(name.rpartition("_")[2]) for name in columns if "/layer_" in name})
    rules, heard = RULES if rules is None else rules, []
    for name in dict.fromkeys(rule.name for rule in rules):
        same = [rule for rule in rules if rule.name == name]
        if same[0].metric.startswith("router/") and n_experts <= top_k:
            continue  # dense, or every expert takes every token: nothing is chosen
        whole = _worst(same, columns, steps, shape, None, knobs)
        of_layers = [_worst([r for r in same if r.layers], columns, steps, shape, layer, knobs) for layer in layers]
        heard += _told(whole, [f for f in of_layers if f is not None and f.level != "ok"], len(layers))
    return sorted(heard, key=lambda f: -LEVELS.index(f.level))  # stable: the order of the rules within a level


def by_rule(found: Sequence[Finding]) -> dict[str, list[Finding]]:
    """The findings that are not "ok", by the name of their rule; both in the order of ``found``, worst first."""
    groups: dict[str, list[Finding]] = {}
    for finding in found:
        if finding.level != "ok":
            groups.setdefault(finding.rule, []).append(finding)
    return groups


def _told(whole: Finding | None, of_layers: list[Finding], n_layers: int) -> list[Finding]:
    """A finding of all layers, or of the few that it is about."""
    if whole is None or (whole.level == "ok" and of_layers):
        return of_layers
    worse = [f for f in of_layers if LEVELS.index(f.level) > LEVELS.index(whole.level)]
    as_bad = [f for f in of_layers if f.level == whole.level and f.kind == whole.kind]
    if as_bad and 2 * (len(as_bad) + len(worse)) <= n_layers:
        return of_layers
    if as_bad and len(as_bad) < n_layers:
        named = ", ".join(str(f.layer) for f in as_bad)
        whole = replace(whole, text=f"{whole.text} (layers {named})")
    return [whole, *worse]


def _worst(rules: Sequence[Rule], columns: Mapping[str, np.ndarray], steps: np.ndarray, shape: Shape,
           layer: int | None, knobs: Mapping[str, float]) -> Finding | None:
    for rule in sorted(rules, key=lambda r: -LEVELS.index(r.level)):
        view = View(columns, steps, shape, rule.metric, layer)
        try:
            reading = rule.test(view)
            if reading is not None:
                return _finding(rule, view, reading, knobs)
        except Exception as error:
            raise ValueError(f"rule {rule.name!r} ({rule.level}): {type(error).__name__}: {error}") from error
    return None


def _finding(rule: Rule, view: View, reading: Reading, knobs: Mapping[str, float]) -> Finding:
    shape, metric = view.shape, reading.metric or view.name()
    line = reading.low if reading.high is None else reading.high
    words = {"value": reading.value, "low": reading.low, "high": reading.high, "line": line, "last": reading.last,
             "E": shape.E, "K": shape.K, "n": min(WINDOW, len(view.steps))}
    if shape.E:
        words |= {"uniform": 1 / shape.E, "lnE": math.log(shape.E), "spikes": shape.share(0.4, 0.6),
                  "peak": shape.peak(0.6), "sharp": shape.entropy(0.2)}
    words |= reading.words
    own_band = reading.low is not None and reading.high is not None  # the test knows the range better
    low, high = (None if own_band else healthy_band(metric, *shape)) or (reading.low, reading.high)
    levers = (make(knobs, rule.undo.format(**words)) for make in rule.levers)
    where = "" if view.layer is None else f"layer {view.layer}: "
    said = rule.says.format(**words)
    if view.layer is not None:
        said = said.replace(" of the worst layer", "")
    return Finding(rule.level, rule.name, metric, reading.kind, reading.first, reading.last, reading.value, low, high,
                   where + said, tuple(lever for lever in levers if lever is not None), view.layer)


def recent(store: RunStore, branch: int, last_step: int) -> pd.DataFrame:
    """The newest rows of a branch, index step: every metric, and each expert's served share in each layer."""
    import pandas as pd

    rows = store.read_steps(branch, max(0, last_step - RECENT))
    if len(rows.steps) < RECENT < last_step:  # logged more rarely than every step
        rows = store.read_steps(branch)
    n, _, L, E = rows.shares.shape
    names = [f"router/frac_srv_e{e}/layer_{layer}" for layer in range(L) for e in range(E)]
    table = np.concatenate([rows.values, rows.shares[:, 1].reshape(n, L * E)], 1)[-RECENT:]
    return pd.DataFrame(table, columns=[*rows.names, *names], index=pd.Index(rows.steps[-RECENT:], name="step"))


def read(store: RunStore, branch: int, last_step: int, knobs: Mapping[str, float], config: RunConfig) -> list[Finding]:
    """:func:`findings` of the :func:`recent` rows."""
    return findings(recent(store, branch, last_step), knobs, config.model.n_experts, config.router.top_k)


def answer(run, finding: Finding, lever: Lever | None = None) -> None:
    """Turn what a finding offers, all of it or one ``lever``: each knob is held, and its event names the finding.

    This is what the panel's Apply does. ``run``: a :class:`~moe_core.Run`, or one that is attached to.
    """
    for turn in finding.levers if lever is None else (lever,):
        run.knobs[turn.knob].hold(turn.value_to, finding=finding.rule, why=finding.text)
