"""One experiment on disk: a trainer, its store, and the will of whoever drives it.

``Run`` is what a user holds. Everything that trains goes through its one :class:`~moe_core.session.Session`,
so that a cell's ``run.step(20)`` and a panel's buttons drive the same thing.
"""

from __future__ import annotations

import math
import os
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from moe_core import checkpoint, frames
from moe_core.ab import AB
from moe_core.config import RunConfig
from moe_core.data import Batches, load_tokens, validation_batches
from moe_core.handle import KnobHandle, KnobHandles
from moe_core.history import History
from moe_core.knobs import Knobs, check_turn
from moe_core.session import Command, Progress, Session
from moe_core.store import MAIN, RunStore, StoreError
from moe_core.trainer import NonFiniteError, StepRecord, Trainer, resolve_device

_open_runs: weakref.WeakValueDictionary[Path, Run] = weakref.WeakValueDictionary()


def free_path(path: str | os.PathLike) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist yet."""
    path, n = Path(path), 1
    while (candidate := path if n == 1 else path.with_name(f"{path.name}-{n}")).exists():
        n += 1
    return candidate


class Run:
    """An experiment in a directory. Make one with :meth:`create`, come back to one with :meth:`open`."""

    def __init__(self, store: RunStore, config: RunConfig, trainer: Trainer | None = None):
        """For :meth:`create` and :meth:`open`."""
        self.path, self.store, self.config = Path(store.path), store, config
        self._trainer = trainer
        self._knobs = trainer.knobs if trainer else Knobs(config, resolve_device(config))
        self.history = History(store, config.save_interval, config.keep_checkpoints)
        self._stand_on(store.get_meta("branch", MAIN))
        self._unsaved_s, self._save_s = 0.0, 0.0
        self.session: Session | None = None
        Session(self)  # takes its place as self.session
        _open_runs[self.path.resolve()] = self

    @classmethod
    def create(cls, path: str | os.PathLike, config: RunConfig, say: Callable[[str], None] = print) -> Run:
        """Start a new run in ``path``, which must not exist; ``say`` hears what preparing the data takes.

        Raises ConfigError, DataError or StoreError, each before anything is written to ``path``.
        """
        RunStore.refuse_existing(path)
        trainer = _build(config, Knobs(config, resolve_device(config)), say)
        return cls(RunStore.create(path, config.to_dict()), config, trainer)

    @classmethod
    def open(cls, path: str | os.PathLike) -> Run:
        """The run in ``path``; the same object as before if this process has it open already.

        Raises StoreError where ``path`` is no run, is newer than this code, or another process is writing it.
        """
        if (known := _open_runs.get(Path(path).resolve())) is not None:
            return known
        store = RunStore.open(path, write=True)
        return cls(store, RunConfig.from_dict(store.config))

    def close(self) -> None:
        """Stop training at the next step boundary, save, and let the run's directory go."""
        self.session.close()
        if self._trainer is not None and self._unsaved_s:
            self._save()
        self.store.close()
        _open_runs.pop(self.path.resolve(), None)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, step {self.current_step}, {self.session.state})"

    # ---- training ----------------------------------------------------------------------------------------

    @property
    def current_step(self) -> int:
        """Optimizer steps done; the row of the last one has this number."""
        return self._step

    @property
    def branch(self) -> str:
        return self._branch.name

    def step(self, n: int = 1) -> None:
        """Do ``n`` optimizer steps and wait for them, with a progress bar where tqdm is installed.

        An interrupt pauses at the next step boundary. Raises what training raised.
        """
        self.session.start(n)
        try:
            with _bar(n) as show:
                while not self.session.wait(0.1):
                    show(self.session.progress())
                show(self.session.progress())
        except KeyboardInterrupt:
            self.session.pause()
            self.session.wait()
            raise

    def pause(self) -> None:
        """Stop at the next step boundary, whoever started the chunk. Returns at once."""
        self.session.pause()

    def progress(self) -> Progress:
        """State, step, and how far the present chunk is."""
        return self.session.progress()

    def begin_chunk(self) -> None:
        """Make ready to train, and remember where the chunk starts. For the session's thread."""
        if self._trainer is None:
            self.resume()
        self.history.snapshot(self._branch.id, self._trainer)

    def advance(self) -> StepRecord:
        """One optimizer step, on disk when this returns. For the session's thread; users call :meth:`step`."""
        started = time.perf_counter()
        record = self._trainer.step()
        self.store.log_step(self._branch.id, record.step, time.time(), record.metrics, record.shares)
        self._step = record.step
        every, val = self.config.save_interval, record.metrics.get("val/loss", math.nan)
        self._unsaved_s += time.perf_counter() - started
        if self.history.is_best(self._branch.id, record.step, val) or (every and record.step % every == 0):
            self._save()
        return record

    def end_chunk(self) -> None:
        """Save where training rests, unless that costs much beside what it would save. For the session."""
        if self._unsaved_s > 10 * self._save_s:
            self._save()

    # ---- going back --------------------------------------------------------------------------------------

    def checkpoint(self, name: str) -> None:
        """Save the whole state under a name; it is never pruned. While training: at the next step boundary."""
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"name = {name!r}: a named checkpoint needs a name")
        self.session.post(Command("checkpoint", {"name": name}))

    def resume(self) -> None:
        """Make ready to train from the newest saved state of the current branch; training does it by itself.

        Steps beyond that state stay on their branch; they are trained again on a new one, and this says so.
        """
        trainer = self.history.restore(self._branch.id, self._step, self._build, print)
        at, last = trainer.steps_done, self._step
        if at < last:
            old = self.branch
            self._open_branch(self._branch.id, at, None)
            print(f"{self.path}: saved up to step {at}; steps {at + 1} to {last} stay on branch {old!r} and are "
                  f"trained again on {self.branch!r}")
        self._knobs.replay(self.history.turns(self._branch.id))
        self._trainer = trainer

    def rewind(self, step: int, name: str | None = None) -> None:
        """Go back to the state after ``step`` of the current line, exactly, and open a new branch there.

        The old line stays (:meth:`switch`). ``name``: of the branch; a free one is found where it is None.
        """
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= self._step:
            raise ValueError(f"step = {step!r}: must be a step of this line, 0 to {self._step}")
        if name is not None and name in set(self.branches()["name"]):
            raise ValueError(f"name = {name!r}: there is a branch of that name already")

        self._go_back(self._branch.id, step, name)

    def undo(self) -> None:
        """Back to where the last chunk started, on a new branch; at once, from a snapshot in memory."""
        step = self.history.snapshot_before(self._branch.id, self._step)
        if step is None:
            raise ValueError("undo: no chunk was trained here since this run was opened; use rewind(step)")
        self.rewind(step)

    def switch(self, branch: str) -> None:
        """Go to the end of another branch and make it the current one."""
        target = self._branch_id(branch)

        def go():
            self._reach(target, self.store.last_step(target))
            self._stand_on(target)
        self.session.move(go)
        self.session.wait()

    def fork(self, path: str | os.PathLike, step: int | None = None) -> Run:
        """The state after ``step`` (None: now) as a run of its own in ``path``, with the history up to there.

        It remembers its parent: ``child.store.get_meta("parent")``.
        """
        step = self._step if step is None else step
        if not isinstance(step, int) or not 0 <= step <= self._step:
            raise ValueError(f"step = {step!r}: must be a step of this line, 0 to {self._step}")
        RunStore.refuse_existing(path)

        def go():
            line, tip = self._branch.id, self._step
            self._reach(line, step)
            try:
                self.history.copy_line(line, path, self._trainer, str(self.path.resolve()))
            finally:
                self._reach(line, tip)
                self._knobs.replay(self.history.turns(line))
        self.session.move(go)
        self.session.wait()
        return Run.open(path)

    def ab(self, a: Mapping[str, float], b: Mapping[str, float], steps: int) -> AB:
        """Train ``steps`` steps twice from here, holding the knobs in ``a``, then in ``b``, each on its own branch.

        Both see the same batches and the same random numbers. The run is left on B; ``keep("A")`` goes on from A.
        """
        for choice in (a, b):
            for name, value in choice.items():
                check_turn(self.knobs[name].name, "hold", value)
        line, start, taken = self._branch.id, self._step, set(self.branches()["name"])
        suffix = next(s for n in range(1, len(taken) + 2)
                      if not {f"A-{(s := f'{start}' if n == 1 else f'{start}-{n}')}", f"B-{s}"} & taken)
        names = f"A-{suffix}", f"B-{suffix}"
        for name, choice in zip(names, (a, b), strict=True):
            self._go_back(line, start, name)
            for knob, value in choice.items():
                self.knobs[knob].hold(value)
            self.step(steps)
        return AB(self, start, steps, dict(a), dict(b), *names)

    def replay(self, upto: int | None = None):
        """Take the current line's steps again, in a fresh model, from the config, the seed and the events alone.

        DataFrame, index metric: ``largest`` absolute difference from the rows, and the ``step`` of it. On a CPU
        every one is 0; the run itself stays as it is.
        """
        return self.history.replay(self._branch.id, self._step if upto is None else upto, _build(
            self.config, Knobs(self.config, resolve_device(self.config)), print))

    def _go_back(self, line: int, step: int, name: str | None) -> None:
        def go():
            self._reach(line, step)
            self._open_branch(line, step, name)
        self.session.move(go)
        self.session.wait()

    def _reach(self, line: int, step: int) -> None:
        """Bring the trainer to the state after ``step`` of a branch; the one that is left stays at hand."""
        if self._trainer is not None:
            self.end_chunk()
            self.history.snapshot(self._branch.id, self._trainer)
        self._trainer = None  # until it is whole again
        trainer = self.history.restore(line, step, self._build, print)
        off = self.history.retrace(line, trainer, step)
        if off:
            self.store.log_event(self._branch.id, self._step, "alert", {
                "text": f"going back to step {step} did not repeat: {off}"})
        self._trainer = trainer

    def _open_branch(self, line: int, step: int, name: str | None) -> None:
        owner = self.history.owner(line, step)
        taken = {b.name for b in self.store.branches()}
        names = (f"from-{step}" if n == 1 else f"from-{step}-{n}" for n in range(1, len(taken) + 2))
        self._stand_on(self.store.add_branch(name or next(n for n in names if n not in taken), owner, step))
        self.store.log_event(self._branch.id, step, "branch", {
            "text": f"branch {self.branch} from step {step}"})

    def _stand_on(self, branch: int) -> None:
        self._branch = next(b for b in self.store.branches() if b.id == branch)
        self._step = self.store.last_step(branch)
        self._knobs.replay(self.history.turns(branch))
        self._unsaved_s = 0.0
        self.store.set_meta("branch", branch)

    def _save(self, name: str | None = None) -> None:
        started = time.perf_counter()
        try:
            saved = self.history.save(self._branch.id, self._trainer, name)
        except checkpoint.CheckpointError as error:
            # A full disk must not stop a night of training: the run goes on, and says so.
            self.store.log_event(self._branch.id, self._step, "alert", {"text": str(error)})
            return
        self._save_s, self._unsaved_s = time.perf_counter() - started, 0.0
        if name is not None:
            self.store.log_event(self._branch.id, self._step, "checkpoint", {"name": name, "path": saved.path})

    def _build(self) -> Trainer:
        return _build(self.config, self._knobs, print)

    # ---- will --------------------------------------------------------------------------------------------

    @property
    def knobs(self) -> KnobHandles:
        """The run's knobs by name: ``run.knobs["router_temp"].hold(1.3)``."""
        return KnobHandles((name, KnobHandle(self, knob)) for name, knob in self._knobs.items())

    def note(self, text: str, step: int | None = None) -> None:
        """Pin a note to ``step`` (default: the step that the run is at when it takes it)."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text = {text!r}: a note must say something")
        if step is not None and (not isinstance(step, int) or not 0 <= step <= self._step):
            raise ValueError(f"step = {step!r}: must be a step of this run, 0 to {self._step}")
        self.session.post(Command("note", {"text": text} if step is None else {"text": text, "at": step}))

    def apply(self, command: Command) -> None:
        """Carry out a command at a step boundary and write it down. For the session."""
        if command.kind == "checkpoint":
            if self._trainer is None:
                self.resume()
            return self._save(command.payload["name"])
        payload = dict(command.payload)
        step = payload.pop("at", self._step)
        if command.kind == "knob":
            step = self._step + 1  # the first step that it can act on
            self._knobs.turn(payload, step)
        self.store.log_event(self._branch.id, step, command.kind, payload, asked=command.asked)

    def record_error(self, error: BaseException) -> None:
        """Write down what stopped training. For the session."""
        kind = "nonfinite" if isinstance(error, NonFiniteError) else "error"
        self.store.log_event(self._branch.id, self._step + 1, kind, {
            "text": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))})

    # ---- reading -----------------------------------------------------------------------------------------

    def metrics(self, branch: str | None = None, since: int = 0, per_layer: bool = False):
        """DataFrame of every metric, index ``step``, of the steps after ``since``; NaN where a step has none."""
        return frames.metrics(self.store, self._branch_id(branch), since, per_layer)

    def experts(self, branch: str | None = None, since: int = 0):
        """DataFrame: step, layer, expert, demand, served (shares of the layer's assignments)."""
        return frames.experts(self.store, self._branch_id(branch), since)

    def events(self, branch: str | None = None):
        """DataFrame by step: step, kind, asked, applied, branch, then what each kind says (name, value, text).

        A knob's step is the first that it acted on.
        """
        return frames.events(self.store, self._branch_id(branch))

    def branches(self):
        """DataFrame: name, parent, fork_step, last_step, created, current."""
        return frames.branches(self.store, self._branch.id)

    def _branch_id(self, name: str | None) -> int:
        if name is None:
            return self._branch.id
        known = {branch.name: branch.id for branch in self.store.branches()}
        if name not in known:
            raise StoreError(f"branch = {name!r}: must be one of {', '.join(map(repr, known))}")
        return known[name]


def _build(config: RunConfig, knobs: Knobs, say: Callable[[str], None]) -> Trainer:
    tokens = load_tokens(config.data, config.model.vocab_size, say=say)
    block, batch = config.model.block_size, config.optim.batch_size
    train = Batches(tokens.train, block, batch, config.seed, pin=resolve_device(config).type == "cuda")
    return Trainer(config, knobs, train, validation_batches(tokens.val, block, batch, config.eval_iters))


class _bar:
    """tqdm over optimizer steps where it is installed, silence where it is not."""

    def __init__(self, n: int):
        try:
            from tqdm.auto import tqdm
        except ImportError:
            self._tqdm = None
        else:
            self._tqdm = tqdm(total=n, unit="step", mininterval=0.2)

    def __enter__(self) -> Callable[[Progress], None]:
        return self._show

    def _show(self, progress: Progress) -> None:
        if self._tqdm is not None:
            self._tqdm.total = progress.chunk_total
            self._tqdm.update(progress.chunk_done - self._tqdm.n)

    def __exit__(self, *exc) -> None:
        if self._tqdm is not None:
            self._tqdm.close()
