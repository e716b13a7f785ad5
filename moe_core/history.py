"""Where a run can go back to: checkpoints on disk, kept by rule, and snapshots of this process, bounded.

A line of history is a branch with what it inherited. From the nearest state at or before a step, the
trainer is moved to exactly that step by taking the steps between again, with the knobs that they had.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_core import checkpoint, origin, provenance
from moe_core.checked import numbered
from moe_core.checkpoint import CheckpointError
from moe_core.config import ModelConfig
from moe_core.snapshots import Snapshot, Snapshots
from moe_core.storage.access import FILE
from moe_core.store import MAIN, Checkpoint, RunStore
from moe_core.trainer import StepRecord, Trainer

FOLDER = "checkpoints"
_OURS = re.compile(rf"{FOLDER}/\d+-\d{{8,}}[\w.-]*{re.escape(checkpoint.SUFFIX)}")  # a path that is made here
GPU_TOLERANCE = 1e-3  # nats, on a step's cross-entropy taken again: sums on a GPU have no fixed order

# What decides which tensors a state has, and their shapes.
_SHAPES = {"model": {f.name for f in fields(ModelConfig)} - {"qk_norm_eps", "norm_eps", "rope_theta", "dropout"},
           "router": {"balance"},
           "optim": {"optimizer", "router_optimizer"}}


class History:
    """The states that a run can return to, and the way there."""

    def __init__(self, store: RunStore, save_interval: int, keep: int):
        """``save_interval``: steps between kept checkpoints (0: none); ``keep``: how many of those a branch keeps."""
        self.store, self.save_interval, self.keep = store, save_interval, keep
        self._home = os.stat(store.path / FILE)
        self.snapshots = Snapshots()
        self._best: dict[int, tuple[int, float]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="moe-saving")
        self._writing: Future | None = None  # what save_beside() began

    # ---- saving ------------------------------------------------------------------------------------------

    def snapshot(self, branch: int, trainer: Trainer) -> Snapshot:
        """Keep a copy of the trainer's state in host memory, for every line that shows its step."""
        step = trainer.steps_done
        return self.snapshots.take(self.owner(branch, step), step, trainer.state_dict())

    def save(self, branch: int, trainer: Trainer, name: str | None = None) -> Checkpoint:
        """Write a checkpoint and drop those that no rule keeps any longer. Raises CheckpointError.

        A named one is never dropped. Its file is entered in the store after it is whole.
        """
        self.settle()
        return self._write(branch, trainer.state_dict(), name)

    def save_beside(self, branch: int, state: dict[str, Any]) -> None:
        """:meth:`save`, without a name and in a background thread, a trainer's state that nobody changes any more;
        :meth:`settle` says what became of it. Raises what :meth:`settle` does of the save before.
        """
        self.settle()

        def write() -> float:
            started = time.perf_counter()
            self._write(branch, state, None)
            return time.perf_counter() - started
        try:
            self._writing = self._writer.submit(write)
        except RuntimeError:  # an interpreter that is shutting down begins no thread
            write()

    def settle(self, wait: bool = True) -> float | None:
        """How many seconds the save that :meth:`save_beside` began took; None where there is none, or, without
        ``wait``, where it is not done yet. Raises what went wrong in it, such as a CheckpointError.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def _write(self, branch: int, state: dict[str, Any], name: str | None) -> Checkpoint:
        step, home = state["steps_done"], self.store.path / FILE
        # Its directory was removed, and a new run of that name has files of the same names.
        if home.exists() and not os.path.samestat(os.stat(home), self._home):
            raise CheckpointError(f"{self.store.path}: not saved; another run has taken its place")
        known = [c for c in self.store.checkpoints() if (c.branch, c.step, c.name) == (branch, step, name)]
        if known:
            return known[-1]  # the state after a step of a branch never changes
        label = "" if name is None else "-" + (re.sub(r"[^\w.-]+", "-", name).strip("-.")[:40] or "named")
        taken = {c.path for c in self.store.checkpoints()}
        path = next(path for stem in numbered(f"{FOLDER}/{branch}-{step:08d}{label}")
                    if (path := stem + checkpoint.SUFFIX) not in taken)
        checkpoint.save(self.store.path / path, state, {
            "run": self.store.get_meta("created"), "branch": branch, "step": step, "name": name,
            "config": self.store.config,
            "torch": torch.__version__, "saved": time.time()})
        made = self.store.add_checkpoint(branch, step, name, path)
        self._prune(branch)
        return next(c for c in self.store.checkpoints() if c.id == made)

    def _prune(self, branch: int) -> None:
        """Of a branch's unnamed checkpoints keep the last, the best by val/loss, and the newest by interval."""
        by_rule = [c for c in self.store.checkpoints() if c.branch == branch and c.name is None]
        kept = {max(by_rule, key=lambda c: c.step).id} if by_rule else set()
        kept |= {c.id for c in by_rule if c.step == self._best_of(branch)[0]}
        if self.save_interval:
            regular = sorted((c for c in by_rule if c.step % self.save_interval == 0), key=lambda c: c.step)
            kept |= {c.id for c in regular[-self.keep:]}
        for c in by_rule:
            if c.id not in kept:
                self.store.drop_checkpoint(c.id)  # first, so that no entry is ever without its file
                if _OURS.fullmatch(c.path):  # whatever file else the store of a stranger's run names
                    (self.store.path / c.path).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Mend what a crash in a save left: drafts go, and a checkpoint that is whole but not entered is entered."""
        folder, known = self.store.path / FOLDER, {c.path for c in self.store.checkpoints()}
        last = {b.id: self.store.last_step(b.id) for b in self.store.branches()} if folder.is_dir() else {}
        draft = rf"\.\d+-\d{{8}}.*{re.escape(checkpoint.SUFFIX)}\.\d+|\.tmp\w{{6}}"  # ours; safetensors' own
        for file in sorted(folder.glob("*")):
            if re.fullmatch(draft, file.name):
                file.unlink(missing_ok=True)
            elif file.suffix == checkpoint.SUFFIX and (path := f"{FOLDER}/{file.name}") not in known:
                with contextlib.suppress(CheckpointError), checkpoint.damage(file):  # not ours, or cut short: left
                    about = checkpoint.about(file)
                    ours = about.get("run") == self.store.get_meta("created")
                    if ours and about["step"] <= last.get(about["branch"], -1):
                        self.store.add_checkpoint(about["branch"], about["step"], about["name"], path)

    def is_best(self, branch: int, step: int, val_loss: float) -> bool:
        """Whether this validation of ``step`` is the lowest that the branch shows; it counts from now on."""
        best = self._best_of(branch)
        if math.isnan(val_loss) or (best[0] != step and val_loss >= best[1]):
            return False
        self._best[branch] = (step, val_loss)
        return True

    def _best_of(self, branch: int) -> tuple[int, float]:
        """(step, val/loss) of the best validation of a branch; (0, inf) before the first."""
        if branch not in self._best:
            rows = self.store.read_steps(branch, shares=False)
            losses = np.where(np.isnan(rows.column("val/loss")), np.inf, rows.column("val/loss"))
            at = int(losses.argmin()) if len(losses) else -1
            self._best[branch] = (int(rows.steps[at]), float(losses[at])) if len(losses) else (0, math.inf)
        return self._best[branch]

    # ---- going back --------------------------------------------------------------------------------------

    def states(self, branch: int, step: int, also: Sequence[Snapshot] = ()) -> list[Snapshot | Checkpoint]:
        """The saved states of the branch's line at or before ``step``, newest first, snapshots before files.

        ``also``: snapshots that somebody still holds.
        """
        upto = dict(self.store.lineage(branch))
        at_hand = [s for s in [*self.snapshots, *also, *self.store.checkpoints()]
                   if s.branch in upto and s.step <= min(step, upto[s.branch])]
        return sorted(at_hand, key=lambda s: -s.step)

    def snapshot_before(self, branch: int, step: int) -> int | None:
        """The step of the newest snapshot before ``step`` on the branch's line."""
        return next((s.step for s in self.states(branch, step - 1) if isinstance(s, Snapshot)), None)

    def restore(self, trainer: Trainer | None, states: Sequence[Snapshot | Checkpoint], build: Callable[[], Trainer],
                say: Callable[[str], None]) -> Trainer:
        """``trainer``, or a new one by ``build`` where it is None, brought to the first of ``states`` that can be read;
        a new one at the start where none can.

        ``say`` hears of every checkpoint that cannot be read. Raises CheckpointError.
        """
        fresh = trainer is None
        trainer = build() if fresh else trainer
        for found in states:
            try:
                trainer.load_state_dict(found.state if isinstance(found, Snapshot)
                                        else self._load(self.store.path / found.path, trainer.device))
                return trainer
            except CheckpointError as error:
                say(f"{error}; going back further")
        if first := (self.store.get_meta(origin.PARENT) or {}).get(origin.FIRST):
            raise CheckpointError(f"{self.store.path}: no state from step {first} on can be read, and its "
                                  "config does not lead there from the start; fork it from its parent again")
        if not fresh:
            trainer.train.close()
            trainer = build()
        return origin.begun(trainer, self.store)

    def _load(self, path: Path, device: torch.device) -> dict[str, Any]:
        there, here = checkpoint.about(path).get("config"), self.store.config
        if there is None:
            raise CheckpointError(f"{path}: not a checkpoint of a run")
        with checkpoint.damage(path):
            field = other_shape(there, here)
        if field is not None:
            part = next(part for part, names in _SHAPES.items() if field in names)
            raise CheckpointError(f"{path}: is of another run: {field} = {there[part][field]!r} there and "
                                             f"{here[part][field]!r} here")
        return checkpoint.load(path, device)

    def owner(self, branch: int, step: int) -> int:
        """The branch on this branch's line whose own row ``step`` is; the oldest for step 0."""
        starts = {b.id: b.fork_step or 0 for b in self.store.branches()}
        return next((b for b, _ in self.store.lineage(branch) if starts[b] < step), MAIN)

    def refused(self, branch: int) -> list[int]:
        """The step of every attempt that was not finite and that the branch shows."""
        return [e["step"] for e in self.store.read_events(branch) if e["kind"] == "nonfinite"]

    def retrace(self, line: int, trainer: Trainer, upto: int, go_on: Callable[[], bool] = lambda: True) -> str:
        """Take the steps of a line up to ``upto`` again, each with the knobs it had, while ``go_on()``. Where it is
        stopped half-way a snapshot keeps what was reached.

        Returns "" when every cross-entropy came out as its row has it (on a CPU: to the bit), else what did not.
        """
        rows = self.store.read_steps(line, trainer.steps_done, shares=False)
        stored = dict(zip(rows.steps.tolist(), rows.column("train/ce").tolist(), strict=True))
        close, off = 0.0 if trainer.device.type == "cpu" else GPU_TOLERANCE, ""
        for record in self._again(line, trainer, upto, validate=False):
            again = float(np.float32(record.metrics["train/ce"]))
            if not off and abs(again - stored[record.step]) > close:
                off = f"train/ce of step {record.step} is {again:.6f} and was {stored[record.step]:.6f}"
            if record.step < upto and not go_on():
                self.snapshot(line, trainer)
                break
        return off

    def replay(self, line: int, upto: int, trainer: Trainer):
        """All steps of a line again, from a fresh trainer. DataFrame, index metric: largest difference, its step."""
        import pandas as pd

        rows = self.store.read_steps(line, shares=False)
        worst: dict[str, tuple[float, int]] = {}
        for record in self._again(line, trainer, upto, validate=True):
            before = dict(zip(rows.names, rows.values[record.step - 1].tolist(), strict=True))
            for name, value in record.metrics.items():
                difference = abs(float(np.float32(value)) - before.get(name, math.nan))
                if not name.startswith("perf/") and difference >= worst.get(name, (0.0, 0))[0]:
                    worst[name] = difference, record.step
        return pd.DataFrame.from_dict(worst, orient="index", columns=["largest", "step"]).rename_axis("metric")

    def _again(self, line: int, trainer: Trainer, upto: int, validate: bool) -> Iterator[StepRecord]:
        turned, refused = turns(self.store, line), self.refused(line)
        while trainer.steps_done < upto:
            number = trainer.steps_done + 1
            trainer.skipped = sum(step <= number for step in refused)  # attempts, which are not made again
            trainer.knobs.replay((step, turn) for step, turn in turned if step <= number)
            yield trainer.step(validate)
        trainer.knobs.replay((step, turn) for step, turn in turned if step <= upto)

    def copy_line(self, line: int, path: str | os.PathLike, config: dict, trainer: Trainer, parent: dict) -> None:
        """A new run in ``path``: this line's rows and events up to the trainer's step, and its state. At the tip of
        the line, turns that wait for its next step go along.
        """
        step = trainer.steps_done
        with RunStore.create(path, config, **origin.inherited(self.store)) as child:
            child.set_meta("parent", parent | {"branch": line, "step": step})
            for key in (provenance.META, provenance.DATA):
                child.set_meta(key, self.store.get_meta(key))
            for rows in self.store.read_parts(line):
                for i in range(int(np.searchsorted(rows.steps, step, side="right"))):
                    child.log_step(MAIN, int(rows.steps[i]), float(rows.time[i]),
                                   dict(zip(rows.names, rows.values[i].tolist(), strict=True)), rows.shares[i])
            waiting = step + 1 if step == self.store.last_step(line) else step
            for event in self.store.read_events(line):
                upto = waiting if event["kind"] == "knob" else step
                if event["step"] <= upto and event["kind"] != "checkpoint":
                    child.log_event(MAIN, event["step"], event["kind"], event["payload"], asked=event["asked"])
            # By name it is never dropped: where fields were changed, no step before it can be taken again.
            History(child, self.save_interval, self.keep).save(MAIN, trainer, "fork" if "changes" in parent else None)


def other_shape(there: Mapping, here: Mapping) -> str | None:
    """The first field for which a state of one config does not fit the other; None where it fits. Both as dicts."""
    def asks(field: str, value: Any) -> Any:
        return value in ("bias", "both") if field == "balance" else value  # a tensor, or none
    return next((field for part, names in _SHAPES.items() for field, value in here.get(part, {}).items()
                 if field in names and asks(field, there[part].get(field, value)) != asks(field, value)), None)


def turns(store: RunStore, branch: int) -> list[tuple[int, dict]]:
    """(first step it acted on, what it said) of every knob turn that the branch shows, in order."""
    return [(e["step"], e["payload"]) for e in store.read_events(branch) if e["kind"] == "knob"]
