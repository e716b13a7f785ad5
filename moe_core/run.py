"""One experiment on disk: a trainer, its store, and the will of whoever drives it.

``Run`` is what a user holds. Everything that trains goes through its one :class:`~moe_core.session.Session`,
so that a cell's ``run.step(20)`` and a panel's buttons drive the same thing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_core import finetune, origin, provenance
from moe_core.attach import Attached
from moe_core.checked import numbered
from moe_core.config import RunConfig
from moe_core.data import fingerprint
from moe_core.face import Face
from moe_core.history import History
from moe_core.knobs import Knobs, check_turn
from moe_core.porter import Porter
from moe_core.preview import Preview, preview
from moe_core.session import Command, Session
from moe_core.storage import access
from moe_core.store import RunStore, StoreError
from moe_core.timeline import Timeline, build_trainer
from moe_core.trainer import MemoryLimitError, NonFiniteError, Trainer, resolve_device

_open_runs: weakref.WeakValueDictionary[Path, Run] = weakref.WeakValueDictionary()


def free_path(path: str | os.PathLike) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist yet."""
    path = Path(path)
    return next(free for name in numbered(path.name) if not (free := path.with_name(name)).exists())


def _own(store: RunStore) -> RunStore:
    """``store``, unless an old log was imported into it: then closed, with a StoreError."""
    if store.get_meta("imported") is None:
        return store
    store.close()
    raise StoreError(f"{store.path}: is an imported log, read-only, with nothing to train; read it with RunStore.open")


@contextlib.contextmanager
def _closed_on_error(store: RunStore) -> Iterator[None]:
    """A run that did not come about lets its directory go."""
    try:
        yield
    except BaseException:
        store.close()
        raise


@atexit.register
def _close_all() -> None:
    """A notebook's end saves what was trained since the last save, so that nothing is trained again."""
    for run in list(_open_runs.values()):
        try:
            run.close()
        except Exception as error:  # nobody is left to catch it, and the next run is to be saved too
            print(f"{run.path}: was not closed as it should be: {error}")


if hasattr(os, "register_at_fork"):  # the run stays with the process that opened it
    os.register_at_fork(after_in_child=_open_runs.clear)


def _known(source):
    """The open run that a path is of, whose weights are newer than its files; else ``source`` itself."""
    return _open_runs.get(Path(source).resolve(), source) if isinstance(source, str | os.PathLike) else source


class Run(Timeline, Face):
    """An experiment in a directory. Make one with :meth:`create`, come back to one with :meth:`open`.

    :meth:`attach` shows and steers one that another process trains.
    """

    attached = False

    def __init__(self, store: RunStore, config: RunConfig, trainer: Trainer | None = None):
        """For :meth:`create` and :meth:`open`."""
        self.path, self.store, self.config = Path(store.path), store, config
        self._trainer = trainer
        self._knobs = trainer.knobs if trainer else Knobs(config, resolve_device(config))
        self.history = History(store, config.save_interval, config.keep_checkpoints)
        self.history.tidy()
        self._save_s = 0.0  # seconds that the last save took
        self._beside_s = 0.0  # seconds of training in what is being saved beside it
        self._stand_on(store.branch_id())
        self.session: Session | None = None
        Session(self)  # takes its place as self.session
        self._porter = Porter(self)
        self._mirrors = None
        if config.mirrors:
            from moe_core.mirrors import Mirrors

            self._mirrors = Mirrors(self)
        _open_runs[self.path.resolve()] = self

    @classmethod
    def create(cls, path: str | os.PathLike, config: RunConfig, say: Callable[[str], None] = print, *,
               init_from=None, keep_optimizer: bool = False, upcycle_from=None,
               upcycle_noise: float = finetune.NOISE, init_from_hf: str | os.PathLike | None = None) -> Run:
        """Start a new run in ``path``, which must not exist; ``say`` hears what preparing the data takes.

        Its weights are fresh, or taken from one other place; then schedules and step counter still begin anew, the run
        remembers its parent (``store.get_meta("parent")``), and the tokenizer comes along if the config names none.

        ``init_from``: a run (as it is now), its directory, or the file of a checkpoint; with ``keep_optimizer`` its
        optimizer's state too. ``upcycle_from``: the same of a dense model, whose MLP becomes every expert,
        each weight with noise of ``upcycle_noise`` times the root mean square of its matrix, from the config's seed
        (:mod:`moe_core.finetune` says what that computes). ``init_from_hf``: a folder of ``transformers``.

        Raises ConfigError (a mismatch names its field), DataError, CheckpointError or StoreError, each before
        anything is written to ``path``.
        """
        access.refuse_existing(path)
        config, begins = finetune.prepare(config, say, init_from=_known(init_from), keep_optimizer=keep_optimizer,
                                          upcycle_from=_known(upcycle_from), upcycle_noise=upcycle_noise,
                                          init_from_hf=init_from_hf)
        trainer = build_trainer(config, Knobs(config, resolve_device(config)), say)
        if begins is not None:
            begins.begin(trainer)
        store = RunStore.create(path, config.to_dict(), **origin.creation(begins, config.data.tokenizer))
        with _closed_on_error(store):
            run = cls(store, config, trainer)
            store.set_meta(provenance.META, provenance.gather(trainer.device))
            store.set_meta(provenance.DATA, fingerprint(config, say))
        return run

    @classmethod
    def open(cls, path: str | os.PathLike) -> Run:
        """The run in ``path``; the same object as before if this process has it open already.

        Raises StoreError where ``path`` is not a run, is newer than this code, or is being written by another process.
        """
        if (known := _open_runs.get(Path(path).resolve())) is not None:
            if not known.session.closed:
                return known
            known.close()  # this was interrupted
        store = _own(RunStore.open(path, write=True))
        with _closed_on_error(store):
            config = RunConfig.from_dict(store.config)
            origin.restore_tokenizer(store, config.data.tokenizer)
            return cls(store, config)

    @classmethod
    def attach(cls, path: str | os.PathLike) -> Attached | Run:
        """The run in ``path`` while another process trains it: live, and steered from here through its inbox.

        The run itself where this process has it open. Raises StoreError where ``path`` is no run.
        """
        return _open_runs.get(Path(path).resolve()) or Attached(_own(RunStore.open(path)))

    def close(self) -> None:
        """Stop training at the next step boundary, save, and let the run's directory go."""
        self._porter.close()
        self.session.close()
        self._settle()
        if self._trainer is not None and self._unsaved_s:
            self._save()
        if self._trainer is not None:
            self._trainer.train.close()
        if self._mirrors is not None:
            self._mirrors.close()
        self.store.close()
        _open_runs.pop(self.path.resolve(), None)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, step {self.current_step}, {self.session.state})"

    def apply(self, command: Command) -> None:
        """Carry out a command at a step boundary and write it down. For the session."""
        if command.kind == "checkpoint":
            if self._trainer is None:
                raise RuntimeError("training was paused on its way back to the last step; start it to go on")
            return self._save(command.payload["name"])
        if command.kind == "look":  # somebody reads the state between two steps: nothing to write down
            return command.payload["look"](self._trainer)
        if command.kind not in ("knob", "note", "finding"):
            raise ValueError(f"{command.kind!r}: unknown command; there are knob, note, finding, checkpoint and look")
        payload = dict(command.payload)
        step = payload.pop("at", self._step)
        if command.kind == "knob":
            knob = self._knobs[payload["name"]]  # refuses a name that is none
            check_turn(knob.spec.name, payload["mode"], payload.get("value"), payload.get("over"))
            # The first step that it can act on: one whose row is not on disk yet has been taken.
            step = self._step + len(self._unwritten) + 1
            self._knobs.turn(payload, step)
        self.store.log_event(self._branch.id, step, command.kind, payload, asked=command.asked)

    def needs_state(self, command: Command) -> bool:
        """Whether a command has to wait until the state to train on is at hand. For the session."""
        return command.kind == "checkpoint" and self._trainer is None

    def refuse(self, command: Command, error: Exception) -> None:
        """Write down that a command could not be carried out. For the session."""
        self.store.log_event(self._branch.id, self._step, "alert", {"text": f"{command.kind}: {error}"})

    def record_error(self, error: BaseException) -> None:
        """Record what stopped training. For the session."""
        kind, where = "memory" if isinstance(error, MemoryLimitError) else "error", {}
        if isinstance(error, NonFiniteError):
            kind, where = "nonfinite", {"term": error.term, "where": error.where}
        self.store.log_event(self._branch.id, self._step + 1, kind, where | {
            "text": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))})

    def preview(self, **values: float) -> Preview:
        """What the routers would do with the last batch at these knob values: ``run.preview(router_temp=1.6)``.

        Nothing is trained and no random number of the run is used; it may be asked while the run trains. Knobs
        that are not named keep the values that the batch had. Raises KnobError for a knob that the run lacks or a
        value out of its range, RuntimeError where no step was trained since the run was opened or moved.
        """
        return preview(self._trainer, self.config, values)
