"""One experiment on disk: a trainer, its store, and the will of whoever drives it.

``Run`` is what a user holds. Everything that trains goes through its one :class:`~moe_core.session.Session`,
so that a cell's ``run.step(20)`` and a panel's buttons drive the same thing.
"""

from __future__ import annotations

import os
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

from moe_core import frames, health
from moe_core.config import RunConfig
from moe_core.handle import KnobHandle, KnobHandles
from moe_core.history import History
from moe_core.knobs import Knobs
from moe_core.preview import Preview, preview
from moe_core.session import Command, Progress, Session
from moe_core.store import MAIN, RunStore, StoreError
from moe_core.timeline import Timeline, build_trainer
from moe_core.trainer import NonFiniteError, Trainer, resolve_device

_open_runs: weakref.WeakValueDictionary[Path, Run] = weakref.WeakValueDictionary()


def free_path(path: str | os.PathLike) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist yet."""
    path, n = Path(path), 1
    while (candidate := path if n == 1 else path.with_name(f"{path.name}-{n}")).exists():
        n += 1
    return candidate


class Run(Timeline):
    """An experiment in a directory. Make one with :meth:`create`, come back to one with :meth:`open`."""

    def __init__(self, store: RunStore, config: RunConfig, trainer: Trainer | None = None):
        """For :meth:`create` and :meth:`open`."""
        self.path, self.store, self.config = Path(store.path), store, config
        self._trainer = trainer
        self._knobs = trainer.knobs if trainer else Knobs(config, resolve_device(config))
        self.history = History(store, config.save_interval, config.keep_checkpoints)
        self._save_s = 0.0
        self._stand_on(store.get_meta("branch", MAIN))
        self.session: Session | None = None
        Session(self)  # takes its place as self.session
        _open_runs[self.path.resolve()] = self

    @classmethod
    def create(cls, path: str | os.PathLike, config: RunConfig, say: Callable[[str], None] = print) -> Run:
        """Start a new run in ``path``, which must not exist; ``say`` hears what preparing the data takes.

        Raises ConfigError, DataError or StoreError, each before anything is written to ``path``.
        """
        RunStore.refuse_existing(path)
        trainer = build_trainer(config, Knobs(config, resolve_device(config)), say)
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

    def health(self) -> list[health.Finding]:
        """What the router guide's rules say of the newest steps, worst first (see ``moe_core.health``)."""
        return health.read(self.store, self._branch.id, self._step,
                           {name: knob.value for name, knob in self.knobs.items()}, self.config)

    def preview(self, **values: float) -> Preview:
        """What the routers would do with the last batch at these knob values: ``run.preview(router_temp=1.6)``.

        Nothing is trained and no random number of the run is used; it may be asked while the run trains. Knobs
        that are not named keep the values that the batch had. Raises KnobError, or RuntimeError before a first step.
        """
        return preview(self._trainer, self.config, values)

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
