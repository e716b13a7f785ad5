"""Optimizers against each other: each from the same weights, batches and seed, at peak rates of its own.

A shoot-out is a directory of ordinary runs, ``<label>-s<seed>``, and ``shootout.json``, which says what they are and
never changes. All else is read from the runs: one that was interrupted goes on where it was, and another process can
look at it meanwhile.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_core import frames
from moe_core.checked import plain, whole
from moe_core.config import OPTIMIZERS, ConfigError, RunConfig
from moe_core.run import Run
from moe_core.shootout.entries import named, one_of, planned
from moe_core.shootout.peaks import Search, rates, spell, with_rates
from moe_core.shootout.table import Line, step_lines, summary_lines, table, write_csv
from moe_core.store import RunStore, StoreError
from moe_core.trainer import NonFiniteError, resolve_device

FILE = "shootout.json"
END = "shootout"  # what a finished run's store has of where it ended, and how
LOOK = 0.2  # seconds between two looks at a run that trains


@dataclass(frozen=True)
class Job:
    """One run of a shoot-out; ``name`` is its directory in the shoot-out's."""

    name: str
    label: str
    seed: int
    pair: tuple[float, float] | None = None  # of multipliers, for a run of the search


@dataclass(frozen=True)
class Standing:
    """Where a shoot-out is: at ``step`` of the ``steps`` of run ``name``, number ``run`` of ``runs``."""

    name: str
    run: int
    runs: int
    step: int
    steps: int


class Shootout:
    """Make one with :meth:`create`, come back to one with :meth:`open`; then :meth:`train` and :meth:`summary`."""

    def __init__(self, folder: Path, entries: dict[str, RunConfig], seeds: tuple[int, ...], search: Search | None):
        """For :meth:`create` and :meth:`open`."""
        self.folder, self.entries, self.search = folder, entries, search
        self.seeds = tuple(RunConfig(seed=seed).seed for seed in seeds)  # refuses what is no seed

    @classmethod
    def create(cls, folder: str | os.PathLike, models: RunConfig | Mapping[str, RunConfig],
               optimizers: Sequence[str] | None = None, seeds: int | Sequence[int] = 1, steps: int | None = None,
               peaks: Mapping[str, Mapping[str, object]] | None = None, tune: Search | None = None) -> Shootout:
        """A new shoot-out in ``folder``, which must not exist.

        ``models``: a config, or several by label; ``optimizers``: each of them on each of the models (None: each
        model with the optimizer that it names). ``seeds``: which, or how many, counted from the config's. ``steps``:
        of every run, to which the schedule of rates is stretched (None: ``max_iters``). ``peaks``: label or optimizer
        -> fields to change. ``tune``: a search for peaks around these comes first. Raises ConfigError, or StoreError
        where ``folder`` is taken.
        """
        made = planned(models, optimizers, steps, peaks or {})
        first = next(iter(made.values()))
        if isinstance(n := plain(seeds), int):
            seeds = range(first.seed, first.seed + whole("seeds", n, ConfigError))
        seeds = tuple(map(plain, seeds))
        if not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(f"seeds = {list(seeds)}: must be different integers, at least one")
        if tune is not None and tune.seed is None:
            tune = dataclasses.replace(tune, seed=max(seeds) + 1)
        self = cls(Path(folder), made, seeds, tune)
        self._write()
        return self

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Shootout:
        """The shoot-out in ``folder``. Raises StoreError where there is none."""
        try:
            said = json.loads((Path(folder) / FILE).read_text("utf-8"))
            entries = {named(label): RunConfig.from_dict(config) for label, config in said["entries"].items()}
            return cls(Path(folder), entries, tuple(said["seeds"]), said["search"] and Search(**said["search"]))
        except FileNotFoundError:
            raise StoreError(f"{folder}: is not a shoot-out, there is no {FILE} in it") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{folder}: {FILE} cannot be read: {error}") from error

    def _write(self) -> None:
        if os.path.lexists(self.folder):
            open_it = "open that shoot-out, or " if (self.folder / FILE).is_file() else ""
            raise StoreError(f"{self.folder}: exists already; {open_it}choose another directory")
        text = json.dumps({"entries": {label: config.to_dict() for label, config in self.entries.items()},
                           "seeds": self.seeds, "search": self.search and dataclasses.asdict(self.search)}, indent=1)
        try:
            self.folder.mkdir(parents=True)
            draft = self.folder / f".{FILE}"
            draft.write_text(text, "utf-8")
            draft.replace(self.folder / FILE)
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be made: {error.strerror}") from error

    def __repr__(self) -> str:
        jobs = self.jobs()
        return (f"Shootout({str(self.folder)!r}: {', '.join(self.entries)}; seeds {', '.join(map(str, self.seeds))}; "
                f"{self.steps} steps; {sum(map(self.finished, jobs))} of {len(jobs)} runs done)")

    # ---- what it is made of ------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps of each run; those of the search are shorter."""
        return next(iter(self.entries.values())).optim.max_iters

    def jobs(self) -> list[Job]:
        """Every run in the order of training: the search, then all entries of the first seed, then of the next.

        Entries take turns, so that whatever else the machine does falls on all of them.
        """
        return ([job for label in self.entries for job in self.trials(label)]
                + [Job(f"{label}-s{seed}", label, seed) for seed in self.seeds for label in self.entries])

    def trials(self, label: str) -> list[Job]:
        """The runs of an entry's search; none where nothing is searched."""
        return [Job(f"search/{label}-x{spell(a)}-x{spell(b)}", label, self.search.seed, (a, b))
                for a, b in self.search.pairs] if self.search else []

    def config(self, job: Job) -> RunConfig:
        """What a run is made of. Raises StoreError for one whose entry's search is not done or found nothing."""
        entry = self.entries[job.label]
        if job.pair:
            return self.search.trial(entry, job.pair)
        return with_rates(entry, **self.peaks(job.label)).replace(seed=job.seed)

    def peaks(self, label: str) -> dict[str, float]:
        """The peak rates that an entry's runs have, by field: its own, or what its search found. Raises as above."""
        trials = self.trials(label)
        if not trials:
            return {name: value for name, value in rates(self.entries[label]).items()
                    if getattr(self.entries[label].optim, name) is not None}
        return rates(self.search.trial(self.entries[label], self._best(label)))

    def _best(self, label: str) -> tuple[float, float]:
        """The multipliers that an entry's search found. Raises as :meth:`peaks`."""
        found, pair = min((self.score(job), job.pair) for job in self.trials(label))
        if found == math.inf:
            raise StoreError(f"{self.folder}: {label}: every run of its search diverged; give lower peaks")
        return pair

    # ---- training ----------------------------------------------------------------------------------------

    def train(self, progress: Callable[[Standing], None] | None = None,
              say: Callable[[str], None] = lambda line: None) -> bool:
        """Train what is not trained yet; True when all is. Called again after an interruption, it goes on.

        ``progress`` hears several times a second where it is; ``say`` hears the legacy scripts' console lines, and what
        preparing the data takes. A run that turns non-finite ends there, and the next one begins. One that somebody
        else pauses ends the call: False.
        """
        jobs = self.jobs()
        for number, job in enumerate(jobs, 1):
            if self.finished(job):
                continue
            config = self.config(job)

            def tell(step: int, number=number, job=job, steps=config.optim.max_iters) -> None:
                if progress is not None:
                    progress(Standing(job.name, number, len(jobs), step, steps))
            if not self._train(job, config, tell, say):
                return False
        return True

    def _train(self, job: Job, config: RunConfig, tell: Callable[[int], None], say: Callable[[str], None]) -> bool:
        path, steps, before = self.folder / job.name, config.optim.max_iters, 0
        cuda = resolve_device(config).type == "cuda"
        if cuda:
            gc.collect()  # the trainer before this one
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        run = Run.open(path) if path.exists() else Run.create(path, config, say)
        try:
            shown = run.current_step
            while run.current_step < steps:  # it may have had to go back to what was saved
                run.session.start(steps - run.current_step)
                resting = False
                while not resting:
                    resting = run.session.wait(LOOK)
                    shown = self._say_steps(run, job, shown, say, all_of_it=resting)
                    tell(run.current_step)
                if run.session.state == "paused":
                    say(f"{job.name}: paused at step {run.current_step} of {steps}; train again to go on")
                    return False
            peak = torch.cuda.max_memory_allocated() - before if cuda else None
            _finish(run, peak_memory_b=peak)
        except NonFiniteError as error:
            say(f"{job.name}: {error}")
            _finish(run, diverged=str(error))
        except KeyboardInterrupt:
            run.pause()
            raise
        finally:
            run.close()
        if job.pair:
            _drop_states(path)
        return True

    def _say_steps(self, run: Run, job: Job, shown: int, say: Callable[[str], None], all_of_it: bool) -> int:
        step, every = run.current_step, run.config.log_interval
        if step <= shown or not (all_of_it or step - shown >= every):
            return shown
        if job.pair is None:
            for line in step_lines(job.name if len(self.seeds) > 1 else job.label, run.metrics(), shown, run.config):
                say(line)
        elif step == run.config.optim.max_iters:
            say(f"{job.name}   val/loss {run.metrics()['val/loss'].iloc[-1]:.4f}")
        return step

    # ---- reading -----------------------------------------------------------------------------------------

    def finished(self, job: Job) -> bool:
        """Whether a run has all its steps, or ended because it turned non-finite."""
        if not (self.folder / job.name).exists():
            return False
        with RunStore.open(self.folder / job.name) as store:
            return store.get_meta(END) is not None

    def line(self, job: Job) -> Line | None:
        """What a run has left so far, of the branch that the shoot-out trained; None before there is anything."""
        if not (self.folder / job.name).exists():
            return None
        with RunStore.open(self.folder / job.name) as store:
            end = store.get_meta(END)
            branch = end["branch"] if end else store.branch_id()
            rows = frames.metrics(store, branch, 0, per_layer=False)
        if end is None and not len(rows):
            return None
        return Line.of(rows.loc[: end["step"]] if end else rows, self.entries[job.label], end)

    def lines(self) -> dict[str, dict[int, Line]]:
        """Label -> seed -> what that run has left so far; without those that have not begun."""
        found: dict[str, dict[int, Line]] = {label: {} for label in self.entries}
        for job in self.jobs():
            if job.pair is None and (line := self.line(job)) is not None:
                found[job.label][job.seed] = line
        return found

    def score(self, job: Job) -> float:
        """The last ``val/loss`` of a run of the search; inf where it diverged. Raises StoreError before it is done."""
        line = self.line(job)
        if line is None or not (line.done or line.diverged):
            raise StoreError(f"{self.folder}: {job.label}: the search for its peak rates is not done; train first")
        return line.val_loss if line.done and math.isfinite(line.val_loss) else math.inf

    def search_table(self):
        """DataFrame of the search's runs: optimizer, rates, steps, seed, val/loss, chosen, edge.

        ``edge``: the choice lies at the edge of what was searched, and the best may lie beyond.
        """
        import pandas as pd

        rows = []
        for label, entry in self.entries.items():
            trials = self.trials(label)
            scores = [self.score(job) if self.finished(job) else math.nan for job in trials]
            done = trials and not any(map(math.isnan, scores)) and min(scores) < math.inf
            best = trials[scores.index(min(scores))] if done else None
            rows += [{"optimizer": label, "rates": _spoken(rates(self.search.trial(entry, job.pair))),
                      "steps": self.search.steps, "seed": job.seed, "val/loss": score, "chosen": job is best,
                      "edge": job is best and self.search.at_edge(job.pair)}
                     for job, score in zip(trials, scores, strict=True)]
        return pd.DataFrame(rows, columns=["optimizer", "rates", "steps", "seed", "val/loss", "chosen", "edge"])

    def baseline(self, label: str | None = None) -> str:
        """The entry that the others are compared with: ``label``, else the first with AdamW, else the first."""
        if label is not None:
            return one_of("baseline", label, self.entries)
        adamw = (name for name, config in self.entries.items() if config.optim.optimizer == "adamw")
        return next(adamw, next(iter(self.entries)))

    def summary(self, baseline: str | None = None):
        """DataFrame, one row an entry (see :func:`moe_core.shootout.table.table`)."""
        peaks = {}
        for label in self.entries:
            try:
                edge = self.search is not None and self.search.at_edge(self._best(label))
                peaks[label] = _spoken(self.peaks(label)) + (" (at the edge of the search)" if edge else "")
            except StoreError:
                peaks[label] = ""
        return table(self.lines(), self.baseline(baseline), peaks)

    def to_csv(self, path: str | os.PathLike, baseline: str | None = None) -> None:
        """Write :meth:`summary` as CSV, whole or not at all; optimizer, ms/it, tok/s and loss come first."""
        write_csv(self.summary(baseline), path)


def shootout_from(config: RunConfig, folder: str | os.PathLike, seeds: int | Sequence[int] = 1,
                  steps: int | None = None, say: Callable[[str], None] = print, tune: Search | None = None,
                  progress: Callable[[Standing], None] | None = None) -> Shootout:
    """What ``moe shootout`` does: train ``config.opt_list`` (empty: all) in ``folder``, or go on with what is there.

    ``say`` hears the legacy scripts' console lines, their summary and ours; the table goes to ``config.csv``. Raises
    ConfigError where ``folder`` holds a shoot-out of something else.
    """
    optimizers = [name for name in config.opt_list.split(",") if name] or list(OPTIMIZERS)
    if (Path(folder) / FILE).is_file():
        made = Shootout.open(folder)
        wanted = tuple(range(config.seed, config.seed + seeds) if isinstance(seeds, int) else seeds)
        if (made.entries, made.seeds, made.search is None) != (
                planned(config, optimizers, steps, {}), wanted, tune is None):
            raise ConfigError(f"folder = {str(folder)!r}: holds a shoot-out of something else, {made!r}; repeat the "
                              "command that began it, or choose another folder")
    else:
        made = Shootout.create(folder, config, optimizers, seeds, steps, tune=tune)
    if made.train(progress, say):
        for line in summary_lines(made.summary(), resolve_device(config).type == "cuda"):
            say(line)
        if config.csv:
            made.to_csv(config.csv)
            say(f"table written to {config.csv}")
    return made


def _finish(run: Run, **end) -> None:
    """Write down where the shoot-out's own line of a run ends, whatever is done with the run later."""
    run.store.set_meta(END, {"branch": run.store.branch_id(), "step": run.current_step, **end})


def _drop_states(path: Path) -> None:
    """Leave a finished run of the search its rows alone: nobody goes on from it, and a state is three times a model."""
    with RunStore.open(path, write=True) as store:
        for saved in store.checkpoints():
            store.drop_checkpoint(saved.id)
            (path / saved.path).unlink(missing_ok=True)


def _spoken(peaks: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in peaks.items())
