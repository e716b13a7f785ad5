"""Runs as text: a folder of them in a table, one of them in full. Read from their stores, whoever is writing them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from moe_core import commands, origin
from moe_core.attach import Attached
from moe_core.run import Run
from moe_core.storage import access
from moe_core.storage.rows import Steps
from moe_core.store import RunStore, StoreError

DEPTH = 4  # folders below the one that is listed in which runs are looked for
EVENTS = 12  # newest, that `moe show` prints
IMPORTED = "imported"  # in the config of a run that was made of an old log
SHOWN = ("train/loss", "train/ce", "val/loss", "val/loss_with_aux", "lr", "grad/norm", "perf/tok_s",
         "router/max_frac_max", "router/max_frac_mean", "router/active_min", "router/entropy_mean",
         "router/top1_p_mean", "router/drop_frac_mean", "router/collapsed")


def runs_in(folder: Path) -> Iterator[Path]:
    """The runs in a folder and below it, by name; a run's own folders are not searched. Raises StoreError."""
    if not folder.is_dir():
        raise StoreError(f"{folder}: there is no such directory")
    for path, names, files in os.walk(folder):
        if access.FILE in files:
            names.clear()
            yield Path(path)
        if len(Path(path).relative_to(folder).parts) >= DEPTH:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))


def table(folder: Path) -> list[str]:
    """A line for each run: path, step, last train/ce, last val/loss, state, branches."""
    rows = [("run", "step", "train/ce", "val/loss", "state", "branches")]
    for path in runs_in(folder):
        try:
            with RunStore.open(path) as store:
                rows.append((str(path), *_row(store)))
        except StoreError as error:
            rows.append((str(path), "", "", "", str(error).removeprefix(f"{path}: "), ""))
    if len(rows) == 1:
        return [f"{folder}: no runs here"]
    width = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join([row[0].ljust(width[0]), *(row[i].rjust(width[i]) for i in (1, 2, 3)), row[4].ljust(width[4]),
                       row[5]]).rstrip() for row in rows]


def _row(store: RunStore) -> tuple[str, ...]:
    branch = store.branch_id()
    planned = store.config.get("optim", {}).get("max_iters")
    rows = _tail(store, branch)
    return (f"{store.last_step(branch)}{'' if planned is None else f'/{planned}'}", _newest(rows, "train/ce"),
            _newest(rows, "val/loss"), state(store), str(len(store.branches())))


def _tail(store: RunStore, branch: int) -> Steps:
    """The newest rows, with the last validation among them."""
    every = store.config.get("eval_interval")
    since = 0 if every is None else max(0, store.last_step(branch) - max(every, 1))
    return store.read_steps(branch, since, shares=False)


def _newest(rows, name: str) -> str:
    values = [value for value in rows.column(name).tolist() if not math.isnan(value)]
    return f"{values[-1]:.5g}" if values else "-"


def state(store: RunStore) -> str:
    """What the process that has the run open does with it; "closed" where none has."""
    if IMPORTED in store.config:
        return "imported"
    if access.writer(Path(store.path)) is None:
        return "closed"
    return (store.get_meta("progress") or {}).get("state", "open")


def describe(path: Path) -> Iterator[str]:
    """All that ``moe show`` prints of a run, line by line. Raises StoreError."""
    with RunStore.open(path) as store:
        trained = None if IMPORTED in store.config else Run.attach(path)
        branches = store.branches()
        current = next(b for b in branches if b.id == store.branch_id())
        step = store.last_step(current.id)
        yield (f"{path}: step {step}{'' if trained is None else f' of {trained.config.optim.max_iters}'} on branch "
               f"{current.name!r}, {state(store)}")
        if parent := store.get_meta("parent"):
            yield f"{origin.words(parent)} {parent['path']}{origin.at_step(parent)}"
        if trained is not None:
            yield f"command: {commands.spell(trained.config)}"
        rows = _tail(store, current.id)
        if len(rows):
            yield "metrics, the newest:"
            yield from (f"  {name:<24}{_newest(rows, name)}" for name in SHOWN if name in rows.names)
        if trained is not None:
            yield "knobs:"
            yield from (f"  {knob!r}" for knob in trained.knobs.values())
        yield "branches:"
        names = {b.id: b.name for b in branches}
        for b in branches:
            from_where = "" if b.parent is None else f", from {names[b.parent]!r} at step {b.fork_step}"
            yield f"  {b.name}: step {store.last_step(b.id)}{from_where}{' (current)' if b.id == current.id else ''}"
        if saved := store.checkpoints():
            yield "checkpoints:"
            for c in saved:
                yield f"  {names[c.branch]} step {c.step}{'' if c.name is None else f', {_plain(c.name)!r}'}: {c.path}"
        if trained is not None:
            yield from _health(trained)
            trained.close()
        if events := store.read_events(current.id)[-EVENTS:]:
            yield "events, the newest:"
        for event in events:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["applied"]))
            said = ", ".join(f"{value}" if key == "text" else f"{key} {value}"
                             for key, value in event["payload"].items() if key != "traceback")
            yield f"  {when}  step {event['step']:>6}  {event['kind']}: {_plain(said)}"


def _plain(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


def _health(run: Attached) -> Iterator[str]:
    try:
        findings = run.health()
    except ImportError as error:
        yield f"health: needs {error.name}, which is not installed"
        return
    yield "health:" if findings else "health: nothing to say"
    yield from (f"  {finding}" for finding in findings)
