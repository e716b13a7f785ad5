"""A run's store as pandas frames: what ``run.metrics()`` and its like return."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_core.checked import is_integer, plain
from moe_core.store import RunStore, Steps

_SAID = ["step", "kind", "asked", "applied", "branch", "name", "mode", "value", "over", "text"]


def metrics(store: RunStore, branch: int, since: int, per_layer: bool):
    """One row a step after ``since``, index ``step``; NaN where a step has no such metric."""
    import pandas as pd

    rows = store.read_steps(branch, _after(since), shares=False)
    frame = pd.DataFrame(rows.values, columns=rows.names, index=pd.Index(rows.steps, name="step"))
    return frame if per_layer else frame[[name for name in frame if "/layer_" not in name]]


def experts(store: RunStore, branch: int, since: int):
    """One row for every step, layer and expert: step, layer, expert, demand, served."""
    return experts_of(list(store.read_parts(branch, _after(since))))


def experts_of(parts: Sequence[Steps]):
    """:func:`experts` of these rows, one part after the other."""
    import pandas as pd

    n_layer, n_experts = parts[-1].shares.shape[2:]
    steps = np.concatenate([part.steps for part in parts])
    demand, served = (np.concatenate([part.shares[:, k].reshape(-1) for part in parts]) for k in (0, 1))
    return pd.DataFrame({
        "step": np.repeat(steps, n_layer * n_experts),
        "layer": np.tile(np.repeat(np.arange(n_layer), n_experts), len(steps)),
        "expert": np.tile(np.arange(n_experts), len(steps) * n_layer),
        "demand": demand, "served": served}, copy=False)  # of a long run a copy may be more than there is memory for


def _after(since: int) -> int:
    if not is_integer(since := plain(since), 0):
        raise ValueError(f"since = {since!r}: must be a step, 0 or later")
    return since


def events(store: RunStore, branch: int):
    """One row an event, by step: step, kind, asked, applied (UTC), branch, and what each kind says."""
    import pandas as pd

    # What an event says comes first, so that no payload can overwrite its step, kind or branch.
    rows = [{**event.pop("payload"), **event} for event in store.read_events(branch)]
    said = dict.fromkeys(_SAID + [key for row in rows for key in row])
    frame = pd.DataFrame(rows, columns=[key for key in said if key != "id"])
    for column in ("asked", "applied"):
        frame[column] = pd.to_datetime(frame[column].astype(float), unit="s", utc=True)
    return frame


def branches(store: RunStore, current: int):
    """One row a branch: name, parent, fork_step, last_step, created (UTC), current."""
    import pandas as pd

    known = store.branches()
    names = {b.id: b.name for b in known}
    return pd.DataFrame({
        "name": [b.name for b in known],
        "parent": [names.get(b.parent) for b in known],
        "fork_step": pd.array([b.fork_step for b in known], dtype="Int64"),
        "last_step": [store.last_step(b.id) for b in known],
        "created": pd.to_datetime([b.created for b in known], unit="s", utc=True),
        "current": [b.id == current for b in known]})
