"""One experiment on disk: a trainer, its store, and the will of whoever drives it.

``Run`` is what a user holds. Everything that trains goes through its one :class:`~moe_core.session.Session`,
so that a cell's ``run.step(20)`` and a panel's buttons drive the same thing.
"""

from __future__ import annotations

import os
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

from moe_core.config import RunConfig
from moe_core.data import Batches, load_tokens, validation_batches
from moe_core.handle import KnobHandle, KnobHandles
from moe_core.knobs import Knobs
from moe_core.session import Command, Progress, Session
from moe_core.store import RunStore, StoreError
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
        self._branch = store.branches()[0]
        self._step = store.last_step(self._branch.id)
        for event in store.read_events(self._branch.id):
            if event["kind"] == "knob":
                self._turn(event["payload"], event["step"])
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
        """Stop training at the next step boundary and let the run's directory go."""
        self.session.close()
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

    def advance(self) -> StepRecord:
        """One optimizer step, on disk when this returns. For the session's thread; users call :meth:`step`."""
        if self._trainer is None:
            if self._step:
                raise StoreError(
                    f"{self.path}: holds {self._step} steps but no weights to go on from; it can be read, not trained")
            self._trainer = _build(self.config, self._knobs, print)
        record = self._trainer.step()
        self.store.log_step(self._branch.id, record.step, time.time(), record.metrics, record.shares)
        self._step = record.step
        return record

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
        payload = dict(command.payload)
        step = payload.pop("at", self._step)
        if command.kind == "knob":
            step = self._step + 1  # the first step that it can act on
            self._turn(payload, step)
        self.store.log_event(self._branch.id, step, command.kind, payload, asked=command.asked)

    def _turn(self, payload: dict, step: int) -> None:
        self._knobs[payload["name"]].turn(payload["mode"], payload.get("value"), payload.get("over"), step)

    def record_error(self, error: BaseException) -> None:
        """Write down what stopped training. For the session."""
        kind = "nonfinite" if isinstance(error, NonFiniteError) else "error"
        self.store.log_event(self._branch.id, self._step + 1, kind, {
            "text": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))})

    # ---- reading -----------------------------------------------------------------------------------------

    def metrics(self, branch: str | None = None, since: int = 0, per_layer: bool = False):
        """DataFrame of every metric, index ``step``, of the steps after ``since``; NaN where a step has none."""
        import pandas as pd

        steps = self.store.read_steps(self._branch_id(branch), since)
        frame = pd.DataFrame(steps.values, columns=steps.names, index=pd.Index(steps.steps, name="step"))
        return frame if per_layer else frame[[name for name in frame if "/layer_" not in name]]

    def experts(self, branch: str | None = None, since: int = 0):
        """DataFrame: step, layer, expert, demand, served (shares of the layer's assignments)."""
        import numpy as np
        import pandas as pd

        steps = self.store.read_steps(self._branch_id(branch), since)
        n, _, n_layer, n_experts = steps.shares.shape
        demand, served = (steps.shares[:, kind].reshape(-1) for kind in (0, 1))
        return pd.DataFrame({
            "step": np.repeat(steps.steps, n_layer * n_experts),
            "layer": np.tile(np.repeat(np.arange(n_layer), n_experts), n),
            "expert": np.tile(np.arange(n_experts), n * n_layer),
            "demand": demand, "served": served})

    def events(self, branch: str | None = None):
        """DataFrame, oldest first: step, kind, asked, applied, branch, then what each kind says (name, value, text).

        A knob's step is the first that it acted on.
        """
        import pandas as pd

        rows = [{**event, **event.pop("payload")} for event in self.store.read_events(self._branch_id(branch))]
        frame = pd.DataFrame(rows, columns=list(dict.fromkeys(
            ["step", "kind", "asked", "applied", "branch", "name", "mode", "value", "over", "text"]
            + [key for row in rows for key in row])))
        for column in ("asked", "applied"):
            frame[column] = pd.to_datetime(frame[column], unit="s", utc=True)
        return frame

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
