"""Old logs as runs to compare with: ``import_log("train.log", "runs/baseline")``, or ``moe import`` in a shell.

What the log does not hold is absent (NaN), and nothing is guessed:

- Step numbers are those of the log. A store has no row before step 1, so a line of step 0 becomes an event; where
  a log counts its first step as 0, ``shift=1`` makes it step 1.
- MoE form: ``loss`` is what was minimised, ``train/loss``. ``val_loss`` has the auxiliary losses in it there, so it
  is ``val/loss_with_aux`` and never ``val/loss``, which is cross-entropy alone. ``r_max``, ``act_min``, ``col`` are
  ``router/max_frac_max``, ``router/active_min``, ``router/collapsed``, the first of the last micro-batch alone.
- Dense form: one run for each optimizer. There is nothing but cross-entropy in its losses: ``train/loss``,
  ``val/loss``. ``avg`` is ``perf/ms_it``, the first number of ``gnorm`` is ``grad/norm``. A val line has no step;
  with ``val_every`` the n-th of an optimizer is that of step n * val_every, if the lines around it allow that step
  (one that was lost is seen by that), else it is kept as an event.
- W&B: metrics keep their names. ``rename={"val/loss": "val/loss_with_aux"}`` where a script logged that.
- Where the steps of a log fall back, a resumed training took them again: they open a branch, and what was there
  stays. The last branch is the current one.
- A row's time is 1970 where the log has none (a W&B column ``_timestamp`` is one).

Such a run has no config but ``{"imported": ...}``: :meth:`RunStore.open` and :mod:`moe_core.frames` read it, reports
and charts take it as a baseline, and ``Run.open`` refuses it, for there is nothing to train.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_core.checked import numbered
from moe_core.config import OPTIMIZERS
from moe_core.old_forms import Console, Draft, LogError, Tally
from moe_core.old_wandb import is_wandb, read_wandb
from moe_core.storage import access
from moe_core.store import MAIN, RunStore, as_store_error

__all__ = ["Imported", "LogError", "import_log"]


@dataclass(frozen=True)
class Imported:
    """What an import made, and what it passed over."""

    runs: dict[str, Path]  # by the name in the log; "moe" for the MoE form
    rows: int
    values: int
    passed_over: dict[str, tuple[int, tuple[str, ...]]]  # what: how many, and the first few
    branches: dict[str, tuple[str, ...]]  # of each run whose log starts again

    def __str__(self) -> str:
        lines = [f"{path}: {name}" for name, path in self.runs.items()]
        lines.append(f"{self.rows:,} rows, {self.values:,} values")
        lines += [f"{name} starts again in the log: the later lines are on branch {', '.join(made)}"
                  for name, made in self.branches.items()]
        for what, (count, samples) in self.passed_over.items():
            lines.append(f"passed over: {count:,} {what}, such as {samples[0]!r}")
        return "\n".join(lines)


def import_log(log: str | os.PathLike | Sequence[str | os.PathLike], run_path: str | os.PathLike,
               val_every: int | Mapping[str, int] | None = None, rename: Mapping[str, str] | None = None,
               shift: int = 0) -> Imported:
    """Make read-only runs of old logs: console text of the MoE or the dense script, or W&B CSV exports.

    ``log``: a file, or the files of one training in their order (of one W&B project: in any). Where they tell of
    one run it is made at ``run_path``, else ``run_path`` becomes a folder with a run for each. ``val_every``: steps
    between validations in the dense form, for all optimizers or by name. ``rename``: metrics, old name to new.
    ``shift``: is added to every step of the log. What all this does to the values is said at the top of
    :mod:`moe_core.old_logs`.

    Raises LogError where a log cannot be read or holds no known line, StoreError where ``run_path`` exists; then
    nothing is written.
    """
    logs = [Path(log)] if isinstance(log, str | os.PathLike) else [Path(one) for one in log]
    _check(logs, val_every, shift)
    access.refuse_existing(run_path)
    tally, drafts = Tally(), {}
    console = Console(tally, val_every, shift)
    for path in logs:
        text = _text(path)
        try:
            if is_wandb(text):
                read_wandb(text, drafts, tally, shift)
            else:
                known = console.known
                console.read(text)
                if console.known == known:
                    raise LogError(_unknown(path, text))
        except csv.Error as error:
            raise LogError(f"{path}: is not a whole CSV: {error}") from error
    console.close()
    about = {"params": min(console.params)} if len(console.params) == 1 else {}
    whole = {name: (draft, {}) for name, draft in drafts.items()}
    whole |= {f"{name} (console)" if name in drafts else name: (draft, about) for name, draft in console.drafts.items()}
    whole = {name: found for name, found in whole.items() if _size(found[0])}
    if not whole:
        raise LogError(f"{', '.join(map(str, logs))}: no value that has a step")
    metrics = {name for draft, _ in whole.values() for stretch in draft.stretches for row in stretch.rows.values()
               for name in row}
    for old in rename or ():
        if old not in metrics:
            raise LogError(f"rename = {rename!r}: the log has no {old!r}, it has {', '.join(sorted(metrics))}")
    return _write(Path(run_path), logs, whole, dict(rename or {}), tally)


def _check(logs: list[Path], val_every, shift: int) -> None:
    if not logs:
        raise LogError("log = []: must name at least one file")
    every = val_every.values() if isinstance(val_every, Mapping) else [val_every]
    for one in every:
        if one is not None and (not isinstance(one, int) or isinstance(one, bool) or one < 1):
            raise LogError(f"val_every = {val_every!r}: must be an integer, at least 1, or None")
    for name in val_every if isinstance(val_every, Mapping) else ():
        if name not in OPTIMIZERS:
            raise LogError(f"val_every = {val_every!r}: {name!r} must be one of {', '.join(OPTIMIZERS)}")
    if not isinstance(shift, int) or isinstance(shift, bool):
        raise LogError(f"shift = {shift!r}: must be an integer")


def _text(path: Path) -> str:
    """A log's text; a shell of Windows writes UTF-16, which its first bytes tell."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LogError(f"{path}: cannot be read: {error.strerror or error}") from error
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if wide else "utf-8-sig", errors="replace")


def _unknown(path: Path, text: str) -> str:
    if path.suffix.lower() == ".csv":
        titles = ", ".join(text.lstrip().split("\n", 1)[0].split(",")[:4])
        return f"{path}: has no column Step, as W&B exports a chart whose x axis is the step; it begins with {titles!r}"
    return (f"{path}: no line of a known form ('iter 400 | loss ...', '[adamw] step 300/1500 loss ...', or a W&B CSV "
            f"with a column Step)")


def _size(draft: Draft) -> int:
    return sum(len(row) for stretch in draft.stretches for row in stretch.rows.values())


def _write(run_path: Path, logs: list[Path], whole: dict[str, tuple[Draft, dict]], rename: dict[str, str],
           tally: Tally) -> Imported:
    """All runs beside their place, moved there whole."""
    single = len(whole) == 1
    drafts_path = run_path.with_name(f".{run_path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    runs, rows, values, branches = {}, 0, 0, {}
    with as_store_error(run_path):
        try:
            for name, (draft, about) in whole.items():
                folder = _folder(name, {path.name for path in runs.values()})
                runs[name] = run_path if single else run_path / folder
                config = {"imported": {"form": draft.form, "run": name, "log": ", ".join(map(str, logs)), **about}}
                with RunStore.create(drafts_path if single else drafts_path / folder, config) as store:
                    _fill(store, draft, rename)
                    store.set_meta("imported", {"time": time.time(), "passed_over": tally.counts})
                    if len(draft.stretches) > 1:
                        branches[name] = tuple(branch.name for branch in store.branches() if branch.id != MAIN)
                rows += sum(bool(row) for stretch in draft.stretches for row in stretch.rows.values())
                values += _size(draft)
            access.refuse_existing(run_path)  # made by another meanwhile
            drafts_path.rename(run_path)
        finally:
            shutil.rmtree(drafts_path, ignore_errors=True)
    passed = {what: (count, tuple(tally.samples[what])) for what, count in tally.counts.items()}
    return Imported(runs, rows, values, passed, branches)


def _fill(store: RunStore, draft: Draft, rename: dict[str, str]) -> None:
    """Write a draft's rows and events; the last branch becomes the current one."""
    ids: list[int] = []
    for stretch in draft.stretches:
        if stretch.parent is None:
            ids.append(MAIN)
        else:
            taken = {branch.name for branch in store.branches()}
            name = next(name for name in numbered(f"from-{stretch.fork}") if name not in taken)
            ids.append(store.add_branch(name, ids[stretch.parent], stretch.fork))
        for step in sorted(stretch.rows):
            row = {rename.get(name, name): value for name, value in stretch.rows[step].items()}
            if len(row) < len(stretch.rows[step]):
                raise LogError(f"rename = {rename!r}: step {step} has a metric of that name already")
            if row:
                store.log_step(ids[-1], step, draft.times.get(step, 0.0), row)
    for at, step, payload in draft.events:
        store.log_event(ids[at], step, "imported", payload)
    store.set_meta("branch", ids[-1])


def _folder(name: str, taken: set[str]) -> str:
    plain = re.sub(r"[^\w.+-]+", "-", name).strip("-.")[:80] or "run"
    return next(name for name in numbered(plain) if name not in taken)
