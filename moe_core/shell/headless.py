"""Training without a notebook: which run a command means, and driving it until it is done or asked to stop.

The run directory is the one that a notebook would make; another process may watch and steer it meanwhile
(``Run.attach``).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from moe_core import checkpoint, commands
from moe_core.attach import Attached
from moe_core.run import Run, free_path
from moe_core.session import BUSY
from moe_core.shell.console import Console
from moe_core.storage import access
from moe_core.store import RunStore, StoreError
from moe_core.trainer import resolve_device

LOOK = 0.1  # seconds between two looks at a run that trains
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# What may differ where a command goes on with a run: none of it changes what is computed.
_FREE = {"max_iters", "checkpoint_dir", "resume", "auto_resume", "log_interval", "csv", "opt_list", "mirrors",
         "wandb_project", "wandb_run_name", "vocab_size"}


def near(path: str | os.PathLike) -> str:
    """A run's path as one says it here: from this directory where it lies below."""
    with contextlib.suppress(OSError, ValueError):  # a directory that is gone, or another one
        return str(Path(path).relative_to(Path.cwd()))
    return str(path)


def typed(path: str | os.PathLike) -> str:
    """:func:`near`, as a shell takes it."""
    return subprocess.list2cmdline([near(path)]) if os.name == "nt" else shlex.quote(near(path))


class TrainingError(RuntimeError):
    """What stopped training, in one line, with how to go on."""


def printable(line: str) -> str:
    """A line without what would steer a terminal: a stranger's run may have any name in it."""
    return "".join(char for char in line if char.isprintable())


def tell(line: str) -> None:
    """A line beside the training's own, on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def held(path: str | Path) -> Iterator[Run | Attached]:
    """The run in ``path`` to steer: opened here, or attached where another process has it. Raises StoreError."""
    RunStore.open(path).close()  # says what is wrong with it
    run = Run.open(path) if access.writer(Path(path)) is None else Run.attach(path)
    try:
        yield run
    finally:
        run.close()


def train(line: commands.Line) -> int:
    """``moe train``: the run that a command line means, made or gone on with, and trained. Returns the exit code."""
    config = line.config
    if config.resume is not None or (config.auto_resume and _holds_run(config.checkpoint_dir)):
        run = _return(config.resume or config.checkpoint_dir)
        _say_ignored(run, line)
        total = line.given.get("max_iters", run.config.optim.max_iters)
    else:
        resolve_device(config)  # refuses before anything is fetched
        if line.dialect != commands.OWN:
            tell(f"read as a command line of {line.dialect}; 'moe show RUN' prints it as one of moe train")
        wanted = Path(config.checkpoint_dir or default_place(line.preset or Path(line.dialect).stem))
        place = free_path(wanted)
        if place != wanted:
            tell(f"{wanted}: exists already and is left as it is; this run goes to {place}")
        run = Run.create(place, config, tell)
        total = config.optim.max_iters
    return drive(run, total)


def resume(path: str, steps: int | None) -> int:
    """``moe resume``: go on with the run in ``path`` for ``steps`` steps, or to its planned end."""
    if _holds_run(path) and access.writer(Path(path)) is not None:
        return _resume_elsewhere(path, steps)
    run = _return(path)
    return drive(run, run.config.optim.max_iters, steps)


def _resume_elsewhere(path: str, steps: int | None) -> int:
    with contextlib.closing(Run.attach(path)) as run:
        now, left = run.progress(), run.config.optim.max_iters - run.current_step
        if now.state in BUSY and steps is None:
            tell(f"{path}: is training already, step {now.step}")
            return 0
        if steps is None and left < 1:
            raise StoreError(f"{path}: is at step {now.step}, its planned end; use --steps N to train N more")
        run.session.start(steps or left)
        print(f"{path}: the process that has it open trains {steps or left} more steps from step {run.current_step}")
    return 0


def default_place(name: str) -> Path:
    """Where a run goes that nobody gave a place."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M')}"


def _holds_run(path: str | None) -> bool:
    return path is not None and (Path(path) / access.FILE).is_file()


def _return(path: str) -> Run:
    """The run in ``path``, or the one whose checkpoint it is, at that state. Raises StoreError."""
    file = Path(path)
    if not file.is_file():
        return Run.open(path)
    folder = next((above for above in file.absolute().parents if _holds_run(str(above))), None)
    if folder is None:
        raise StoreError(f"{path}: not a checkpoint of a run; --resume takes a run's directory, or one of the "
                         f"*{checkpoint.SUFFIX} files in its checkpoints folder")
    about = checkpoint.about(file)
    with RunStore.open(folder) as store:
        if about.get("run") != store.get_meta("created"):
            raise StoreError(f"{path}: is a checkpoint of another run than {near(folder)}, in whose directory it lies")
    run = Run.open(folder)
    name = next(b.name for b in run.store.branches() if b.id == about["branch"])
    if name != run.branch:
        run.switch(name)
    if about["step"] < run.current_step:
        run.rewind(about["step"])
    return run


def _say_ignored(run: Run, line: commands.Line) -> None:
    """Say what the command asks for that a run, once begun, does not change."""
    for field, value in line.given.items():
        has = run.config.flat()[field]
        if field not in _FREE and value != has:
            tell(f"{near(run.path)}: {field} stays {has!r}, as when the run was created; {value!r} is ignored")


def drive(run: Run, total: int, steps: int | None = None) -> int:
    """Train ``run`` to step ``total``, or ``steps`` more, showing it; returns 0, or 128 and the number of the signal.

    SIGINT, SIGTERM and SIGHUP pause at the next step boundary; the state is saved. A second one stops at once. Where
    another process paused the run, this waits until one of them goes on. Raises TrainingError.
    """
    caught: list[int] = []
    with _closing(run):
        if run._trainer is None:
            run.resume()  # now: what a crash left unsaved is trained again, and is none of the steps that follow
        total = total if steps is None else run.current_step + steps
        if run.current_step >= total:
            tell(f"{near(run.path)}: is at step {run.current_step}, its planned end; train N more steps with: "
                 f"moe resume {typed(run.path)} --steps N")
            return 0
        console = Console(run.store, run.config, run.branch, run.current_step, total)
        tell(f"{near(run.path)}: training to step {total}; Ctrl-C pauses and saves")
        console.start()
        with contextlib.closing(console), _signals(caught):
            run.session.start(total - run.current_step)
            _watch(run, total, console, caught)
        step = run.current_step
    if caught:
        tell(f"{near(run.path)}: paused at step {step} of {total} and saved; continue with: "
             f"moe resume {typed(run.path)}"
             + ("" if total == run.config.optim.max_iters else f" --steps {total - step}"))
        return 128 + int(caught[0])
    tell(f"{near(run.path)}: done, step {step}")
    return 0


@contextlib.contextmanager
def _closing(run: Run) -> Iterator[None]:
    """Closes it in the end; where that fails too, on a full disk, say, it hides nothing of what went wrong before."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(StoreError, checkpoint.CheckpointError):
            run.close()
        raise
    run.close()


def _watch(run: Run, total: int, console: Console, caught: list[int]) -> None:
    waiting = False
    while True:
        try:
            rests = run.session.wait(LOOK)
        except Exception as error:
            console.look(run.branch)
            raise TrainingError(
                f"{near(run.path)}: stopped at step {run.current_step}: {type(error).__name__}: {error}; "
                f"continue with: moe resume {typed(run.path)}, or go back with: "
                f"moe rewind {typed(run.path)} STEP") from error
        console.look(run.branch)
        if caught:
            run.session.pause()
        if rests and (caught or run.current_step >= total):
            return
        if rests and not waiting:
            console.say(f"{near(run.path)}: paused at step {run.current_step} by another process; waiting for it to "
                        "continue, Ctrl-C quits")
        waiting = rests
        if rests:
            time.sleep(LOOK)


@contextlib.contextmanager
def _signals(caught: list[int]) -> Iterator[None]:
    """Notes the first of the signals that ask to stop; the second does what it always did."""
    before = {}

    def note(number: int, frame) -> None:
        caught.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)
    for one in STOPS:
        if signal.getsignal(one) != signal.SIG_IGN:  # nohup's wish
            before[one] = signal.signal(one, note)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
