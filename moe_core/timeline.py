"""A run's way through its steps: chunk by chunk, saved as it goes, and back to any of them on a new branch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping

from moe_core import origin, provenance
from moe_core.ab import AB, check_choices
from moe_core.checked import numbered, plain
from moe_core.checkpoint import CheckpointError
from moe_core.config import ConfigError, RunConfig
from moe_core.data import fingerprint, open_data
from moe_core.history import other_shape, turns
from moe_core.knobs import Knobs
from moe_core.snapshots import copied
from moe_core.storage import access
from moe_core.trainer import StepRecord, Trainer, resolve_device


def build_trainer(config: RunConfig, knobs: Knobs, say: Callable[[str], None]) -> Trainer:
    """A trainer at its first step; ``say`` hears what it takes. Raises ConfigError, DataError."""
    data = open_data(config, pin=resolve_device(config).type == "cuda", say=say)
    trainer = Trainer(config, knobs, data.train, data.validation)
    if trainer.compiles:
        say("compile: the first step makes the model's code, which takes a minute or two where it was not made before")
    return trainer


class Timeline:
    """The part of a :class:`~moe_core.Run` that moves its trainer. It expects what ``Run.__init__`` sets."""

    # ---- chunk by chunk, for the session's thread --------------------------------------------------------

    def begin_chunk(self, go_on: Callable[[], bool]) -> bool:
        """Get ready to train, and remember where the chunk starts; False where ``go_on()`` ended that half-way. For
        the session's thread.
        """
        provenance.same_threads(self.store, resolve_device(self.config), print)
        if self._trainer is None and not self.resume(go_on):
            return False
        self._trainer.skipped = len(self.history.refused(self._branch.id))  # whatever way led to this state
        self.history.snapshot(self._branch.id, self._trainer)
        return True

    @property
    def under_way(self) -> bool:
        """Whether the device is at a step that :meth:`advance` has not returned yet."""
        return self._trainer is not None and self._trainer.under_way

    def advance(self, more: bool = False) -> StepRecord:
        """One optimizer step, on disk when this returns. For the session's thread; users call :meth:`step`.

        ``more``: another follows at once, and may be under way by then.
        """
        started = time.perf_counter()
        # Kept until their rows are on disk: where a full disk refuses one, its step is applied already, and the
        # next call writes it before anything else happens.
        if not self._unwritten:
            self._unwritten.append(self._train_one(more and not self._saves_at(self._step + 1)))
        record = self._unwritten[0]
        try:
            self._settle(wait=False)
            self.store.log_step(self._branch.id, record.step, time.time(), record.metrics, record.shares)
            self._step = self._unwritten.pop(0).step
            for text in record.alerts:
                self.store.log_event(self._branch.id, record.step, "alert", {"text": text})
        except BaseException:
            if self.under_way:
                self._unwritten.append(self._train_one())
            raise
        self._unsaved_s += time.perf_counter() - started
        val, due = record.metrics.get("val/loss", math.nan), self._saves_at(record.step)
        if due or not math.isnan(val):
            self._settle()  # the save under way drops what is not the best, as of its own step
        if self.history.is_best(self._branch.id, record.step, val) or due:
            self._save_beside(copied(self._trainer.state_dict()))
        return record

    def _saves_at(self, step: int) -> bool:
        return bool(self.config.save_interval) and step % self.config.save_interval == 0

    def _train_one(self, more: bool = False) -> StepRecord:
        try:
            return self._trainer.step(more=more)
        except BaseException:
            if not self._trainer.whole:
                self._trainer = None  # the next chunk goes on from the newest saved state
            raise

    def end_chunk(self) -> None:
        """Save where training rests, unless that costs much beside what it would save. For the session."""
        self._settle()
        if self._unsaved_s > 10 * self._save_s:
            self._save()

    # ---- back, for whoever holds the run --------------------------------------------------------------------

    def resume(self, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Get ready to train from the newest saved state of the current branch; training does this by itself.

        Rows, events and turns of steps beyond that state stay as they are; the steps are trained again, each with the
        knobs that it had. This is printed, and so is any step that does not come out as before. Returns False where
        ``go_on()``, asked after each step, ended it; what was reached by then is kept for the next time.
        """
        started = time.perf_counter()
        off = self._reach(self._branch.id, self._step, go_on)
        self._knobs.replay(turns(self.store, self._branch.id))  # those too that wait for the next step
        self._tell_off(off)
        self._unsaved_s = time.perf_counter() - started
        return self._trainer is not None

    def rewind(self, step: int, name: str | None = None, wait: bool = True) -> None:
        """Go back to the state after ``step`` of the current line, exactly, and open a new branch there.

        The old line stays (:meth:`switch`). ``name``: of the branch; None picks a free one.
        ``wait`` False returns while the session is still moving there.
        """
        step = self._check_reachable(step)
        self._check_name(name)
        if name is not None and name in set(self.branches()["name"]):
            raise ValueError(f"name = {name!r}: there is a branch of that name already")
        self._go_back(self._branch.id, step, name, wait)

    @property
    def undo_step(self) -> int | None:
        """The step that :meth:`undo` goes back to; None where no chunk was trained here since the run was opened."""
        return self.history.snapshot_before(self._branch.id, self._step)

    def undo(self, wait: bool = True) -> None:
        """Back to where the last chunk started, on a new branch; at once, from a snapshot in memory."""
        step = self.undo_step
        if step is None:
            raise ValueError("undo: no chunk was trained here since this run was opened; use rewind(step)")
        self.rewind(step, wait=wait)

    def switch(self, branch: str, wait: bool = True) -> None:
        """Go to the end of another branch and make it the current one."""
        target = self._other_branch(branch)

        def go():
            off = self._reach(target, self.store.last_step(target))
            self._stand_on(target)
            self._tell_off(off)
        self._move(go, wait)

    def fork(self, path: str | os.PathLike, step: int | None = None, **changes):
        """The state after ``step`` (None: now) as a run of its own in ``path``, with the history up to there.

        ``changes``: fields of its config to change, such as a smaller ``batch_size`` where the present one no longer
        fits the device. What decides the state's shape, the data or their order cannot be changed, and a fork with
        changes cannot go back to before ``step``. It remembers its parent:
        ``child.store.get_meta("parent")``. Raises ConfigError.
        """
        step = self._check_reachable(self._step if step is None else step)
        changes = {name: plain(value) for name, value in changes.items()}
        config = self.config.replace(**changes)
        if ((config.data, config.seed) != (self.config.data, self.config.seed)
                or other_shape(self.config.to_dict(), config.to_dict()) is not None):
            raise ConfigError(f"{', '.join(changes)}: a fork goes on with its parent's weights, optimizer and data; "
                              "only other fields can be changed")
        first = step if changes else self._first
        parent = {"path": str(self.path.resolve())} | ({"changes": changes} if changes else {}) | (
            {origin.FIRST: first} if first else {})
        access.refuse_existing(path)

        def go():
            line, tip = self._branch.id, self._step
            self._reach(line, step)
            try:
                self.history.copy_line(line, path, config.to_dict(), self._trainer, parent)
            finally:
                self._reach(line, tip)
                self._knobs.replay(turns(self.store, line))
        self._move(go)
        return self.open(path)

    def ab(self, a: Mapping[str, float], b: Mapping[str, float], steps: int) -> AB:
        """Train ``steps`` steps twice from here, holding the knobs in ``a``, then in ``b``, each on its own branch.

        Both see the same batches and the same random numbers. The run is left on B; ``keep("A")`` goes on from A.
        """
        steps = check_choices(self.knobs, a, b, steps)
        line, start = self._branch.id, self._step
        names = self._free_name(f"A-{start}"), self._free_name(f"B-{start}")
        for name, choice in zip(names, (a, b), strict=True):
            self._go_back(line, start, name)
            for knob, value in choice.items():
                self.knobs[knob].hold(value)
            self.step(steps)
        return AB(self, start, steps, dict(a), dict(b), *names)

    def replay(self, upto: int | None = None):
        """Take the current line's steps again, in a fresh model, from the config, the seed and the events alone (and
        the weights that the run began with, where it was given some).

        DataFrame, index metric: ``largest`` absolute difference from the rows, and the ``step`` of it. On a CPU
        every one is 0; the run itself stays as it is. Raises ValueError for a fork with changes.
        """
        if self._first:
            raise ValueError(f"replay: the steps up to {self._first} were taken by this run's parent with another "
                             f"config; replay that: {self._parent['path']}")
        upto = self._check_step(self._step if upto is None else upto, "upto")
        provenance.same_threads(self.store, resolve_device(self.config), print)
        fresh = origin.begun(build_trainer(self.config, Knobs(self.config, resolve_device(self.config)), print),
                             self.store)
        try:
            return self.history.replay(self._branch.id, upto, fresh)
        finally:
            fresh.train.close()

    def _move(self, go: Callable[[], None], wait: bool = True) -> None:
        self.session.move(go)
        if wait:
            self.session.wait()

    def _go_back(self, line: int, step: int, name: str | None, wait: bool = True) -> None:
        def go():
            off = self._reach(line, step)
            trainer, self._trainer = self._trainer, None  # of no line: where a full disk refuses it one, it is not left
            self._open_branch(line, step, name)
            self._trainer = trainer
            self._tell_off(off)
        self._move(go, wait)

    @property
    def _parent(self) -> dict:
        return self.store.get_meta(origin.PARENT) or {}

    @property
    def _first(self) -> int:
        """The first step whose state this run's config leads to, or goes on from; 0 but for a fork with changes."""
        return self._parent.get(origin.FIRST, 0)

    def _check_reachable(self, step: int) -> int:
        step = self._check_step(step)
        if step < self._first:
            raise ValueError(f"step = {step}: must be at least {self._first}; what this fork changed was otherwise "
                             f"before, so go back in its parent: {self._parent['path']}")
        return step

    def _reach(self, line: int, step: int, go_on: Callable[[], bool] = lambda: True) -> str:
        """Bring the trainer to the state after ``step`` of a branch; the one that is left stays at hand.

        Returns what :meth:`History.retrace` says. There is no trainer where ``go_on`` stopped that.
        """
        self._settle()
        trainer, at_hand = self._trainer, tuple(self.history.snapshots)  # of which some may have to go for the next
        left = None if trainer is None else self.history.snapshot(self._branch.id, trainer)
        if trainer is None:
            provenance.same_data(self.store, self._branch.id, self._step, fingerprint(self.config, print), print)
        self._trainer, self._unwritten = None, []  # until it is whole again; a row that was refused is made again
        provenance.same_threads(self.store, resolve_device(self.config), print)
        trainer = self.history.restore(trainer, self.history.states(line, step, at_hand),
                                       lambda: build_trainer(self.config, self._knobs, print), print)
        if left is not None and self._unsaved_s > self._save_s:
            self._save_beside(left.state)  # or to come back would mean to take those steps again
        if (at := trainer.steps_done) < step:
            print(f"{self.path}: saved up to step {at}; what follows up to step {step} is trained again")
        off = self.history.retrace(line, trainer, step, go_on)
        if trainer.steps_done == step:
            self._trainer = trainer
        else:
            trainer.train.close()
        return off

    def _tell_off(self, off: str) -> None:
        if off:
            text = f"steps trained again did not repeat: {off}"
            self.store.log_event(self._branch.id, self._step, "alert", {"text": text})
            print(f"{self.path}: {text}")

    def _open_branch(self, line: int, step: int, name: str | None) -> None:
        name = name or self._free_name(f"from-{step}")
        self._stand_on(self.store.add_branch(name, self.history.owner(line, step), step))
        self.store.log_event(self._branch.id, step, "branch", {"text": f"branch {name} from step {step}"})

    def _free_name(self, wanted: str) -> str:
        taken = {b.name for b in self.store.branches()}
        return next(name for name in numbered(wanted) if name not in taken)

    def _stand_on(self, branch: int) -> None:
        self._branch = next(b for b in self.store.branches() if b.id == branch)
        self._step = self.store.last_step(branch)
        self._knobs.replay(turns(self.store, branch))
        self._unsaved_s, self._unwritten = 0.0, []
        self.store.set_meta("branch", branch)

    def _save(self, name: str | None = None) -> None:
        self._settle()
        started = time.perf_counter()
        try:
            saved = self.history.save(self._branch.id, self._trainer, name)
        except CheckpointError as error:
            if name is not None:
                raise  # to whoever asked for it
            return self._not_saved(error)
        self._save_s, self._unsaved_s = time.perf_counter() - started, 0.0
        if name is not None:
            self.store.log_event(self._branch.id, self._step, "checkpoint", {"name": name, "path": saved.path})

    def _save_beside(self, state: dict) -> None:
        self.history.save_beside(self._branch.id, state)
        self._beside_s, self._unsaved_s = self._unsaved_s, 0.0

    def _settle(self, wait: bool = True) -> None:
        try:
            self._save_s = self.history.settle(wait) or self._save_s
        except CheckpointError as error:
            self._unsaved_s += self._beside_s
            self._not_saved(error)

    def _not_saved(self, error: CheckpointError) -> None:
        # A full disk must not stop a night of training: the run goes on, and says so.
        self.store.log_event(self._branch.id, self._step, "alert", {"text": str(error)})
