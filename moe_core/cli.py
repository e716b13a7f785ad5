"""``moe ...``: from a shell what the notebook does, in the same run directories.

Exit codes: 0; 1 for a run that failed, or did not come out the same; 2 for a command that cannot be; 128 and the
signal's number for training that a signal stopped, at a step boundary and saved.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_core import commands, headless
from moe_core.checkpoint import CheckpointError
from moe_core.config import ConfigError
from moe_core.data import DataError
from moe_core.headless import TrainingError, held, tell
from moe_core.knobs import KnobError
from moe_core.store import StoreError

REFUSED = (ConfigError, DataError, KnobError, StoreError, CheckpointError, ValueError)
PATIENCE = 60.0  # seconds that a wish may take to be taken up by the process that trains

TRAIN = """
The line may be one of the older scripts', pasted whole with its prompt and broken lines:

  moe train python train_experimental.py --device cuda --n_experts 8 --dropless --attn_gate sigmoid_head
  moe train --dataset c4 --layers 12 --opt-list adamw,muon_adamw --steps 500
  moe train runs/top2 python launch_training.py --dim 512 --num-experts 8 --train-data tokens.npy

or this project's own: a preset, and any field of the config by its name:

  moe train runs/first --preset nano --n_experts 16 --top_k 2 --no-qk_norm
  moe train --preset moe-203m --dataset_name texts/ --mirrors wandb,tensorboard

RUN_DIR (or --run DIR, or --checkpoint_dir DIR) is where the run goes; a free name beside it where it exists already.
--auto_resume goes on with the run that is there, --resume PATH with that run or from that checkpoint. With more than
one optimizer in --opt-list it is a shoot-out. Ctrl-C pauses at the next step boundary, saves, and says how to go on.
"""
SHOOTOUT = """
  moe shootout runs/duel --preset nano --opt-list adamw,muon_adamw,muon_sophia,sophia --csv duel.csv
  moe shootout python train_dense_gpu.py --dataset c4 --layers 12 --opt-list adamw,sophia --steps 500

Each optimizer trains from the same weights on the same batches; the directory holds an ordinary run for each.
The same command with the same directory goes on where it was interrupted.

  --seeds N    N seeds from --seed on, for means and spreads
  --tune       a small search of the peak rates first, with the same budget for each optimizer
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, as everything that is refused."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _run(words)
    except BrokenPipeError:  # who read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        tell("moe: interrupted")
        return 130
    except ModuleNotFoundError as error:
        if debug:
            traceback.print_exc()
        tell(f"moe: needs {error.name}, which is not installed; pip install 'moe-workbench[lab]'")
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        expected = isinstance(error, (*REFUSED, TrainingError))
        what = "" if expected else f"{type(error).__name__}: "
        tell(f"moe: {what}{' '.join(str(error).split())}{'' if expected else '; --debug says where'}")
        return 2 if isinstance(error, REFUSED) else 1


def _run(words: list[str]) -> int:
    parser = _parser()
    free = {"train": _train, "shootout": _shootout}
    if words and words[0] in free and not {"-h", "--help"} & set(words):
        return free[words[0]](words[1:])  # their flags are the config's fields
    if not words:
        parser.print_help()
        return 2
    given = parser.parse_args(words)
    return given.do(given) or 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("moe", description="Train and study mixture-of-experts routers, from a shell.",
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     epilog="moe COMMAND --help says more of each. --debug shows a traceback where something fails.")
    commands_ = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, do: Callable | None, what: str, example: str = "", usage: str | None = None):
        sub = commands_.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + ".", usage=usage,
            epilog=("examples:\n" if do else "") + example, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(do=do)
        return sub

    run = dict(metavar="RUN", help="a run's directory")
    add("train", None, "make a run and train it to max_iters", TRAIN, "moe train [RUN_DIR] COMMAND LINE")
    p = add("resume", lambda a: headless.resume(a.run, a.steps), "go on with a run, or from one of its checkpoints",
            "  moe resume runs/first\n  moe resume runs/first --steps 200\n"
            "  moe resume runs/first/checkpoints/1-00000400.safetensors")
    p.add_argument("run", metavar="RUN", help="a run's directory, or a file in its checkpoints folder")
    p.add_argument("--steps", type=_steps, metavar="N", help="train N more steps; without it to the planned end")
    p = add("rewind", _rewind, "go back to a step, on a new branch; the old line stays",
            "  moe rewind runs/first 400\n  moe rewind runs/first 400 --name sharper")
    p.add_argument("run", **run)
    p.add_argument("step", type=int, metavar="STEP")
    p.add_argument("--name", help="of the new branch")
    p = add("fork", _fork, "copy a run's state and history into a run of its own",
            "  moe fork runs/first runs/second\n  moe fork runs/first runs/second --step 400")
    p.add_argument("run", **run)
    p.add_argument("path", metavar="PATH", help="the new run's directory")
    p.add_argument("--step", type=int, help="the state after this step; without it the present one")
    p = add("replay", _replay, "take all steps again from config, seed and events, and compare every metric",
            "  moe replay runs/first")
    p.add_argument("run", **run)
    p = add("note", _note, "pin a note to a run's step", '  moe note runs/first "entropy drifts back up"\n'
            '  moe note runs/first "loss spike" --step 120')
    p.add_argument("run", **run)
    p.add_argument("text", metavar="TEXT")
    p.add_argument("--step", type=int, help="without it the step that the run is at")
    p = add("knob", _knob, "turn a knob, also while another process trains the run",
            "  moe knob runs/first router_temp 1.3\n  moe knob runs/first router_temp 1.0 --over 200\n"
            "  moe knob runs/first router_temp follow")
    p.add_argument("run", **run)
    p.add_argument("name", metavar="KNOB", help="router_temp, router_noise_std, load_balance_alpha, ...")
    p.add_argument("value", metavar="VALUE", help="a number to hold, or 'follow' for the schedule")
    p.add_argument("--over", type=_steps, metavar="N", help="go to VALUE in N steps")
    p = add("ls", _ls, "list the runs in a directory", "  moe ls\n  moe ls runs")
    p.add_argument("dir", nargs="?", default=".", metavar="DIR")
    p = add("show", _show, "say what a run is, how it stands and what happened to it", "  moe show runs/first")
    p.add_argument("run", **run)
    p = add("export", _export, "write a run's metrics as a table", "  moe export runs/first --csv first.csv\n"
            "  moe export runs/first --parquet first.parquet --branch from-400")
    p.add_argument("run", **run)
    to = p.add_mutually_exclusive_group(required=True)
    to.add_argument("--csv", metavar="OUT")
    to.add_argument("--parquet", metavar="OUT")
    p.add_argument("--branch", help="without it the current one")
    p = add("report", _report, "write a run up: setup, observations, effects, how to reproduce it",
            "  moe report runs/first first.html\n  moe report runs/first first.md")
    p.add_argument("run", **run)
    p.add_argument("out", metavar="OUT", help="a .html, .md or .ipynb file")
    p = add("compare", _compare, "write several runs up side by side", "  moe compare runs/first runs/second both.html")
    p.add_argument("runs", nargs="+", metavar="RUN")
    p.add_argument("out", metavar="OUT")
    p = add("import", _import, "read an old console log or a W&B CSV export into a run of its own, to compare with",
            "  moe import train.log runs/baseline\n  moe import wandb_export.csv runs/baseline")
    p.add_argument("log", metavar="LOG")
    p.add_argument("run", metavar="RUN", help="the new run's directory")
    add("shootout", None, "train the same model with several optimizers and compare them", SHOOTOUT,
        "moe shootout [DIR] COMMAND LINE [--seeds N] [--tune]")
    return parser


def _steps(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of steps, at least 1")
    return int(text)


# ---- training --------------------------------------------------------------------------------------------


def _train(words: list[str]) -> int:
    line = commands.read(["moe", "train", *words])
    several = "," in line.config.opt_list
    return _shootout(words) if several else headless.train(line)


def _shootout(words: list[str]) -> int:
    from moe_core.peaks import Search
    from moe_core.shootout import shootout_from

    own, words = _own_flags(words)
    line = commands.read(["moe", "shootout", *words])
    config = line.config
    place = line.given.get("checkpoint_dir") or (Path(config.csv).with_suffix("") if config.csv
                                                 else headless.default_place("shootout"))
    tell(f"{place}: the shoot-out's runs; the same command with this directory goes on where it was interrupted")
    term = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        shootout_from(config, place, own.seeds, tune=Search() if own.tune else None)
    except KeyboardInterrupt:
        tell(f"{place}: paused and saved; the same command with --run {place} goes on")
        return 130
    finally:
        signal.signal(signal.SIGTERM, term)
    return 0


def _own_flags(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser("moe shootout", add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", type=_steps, default=1)
    parser.add_argument("--tune", action="store_true")
    return parser.parse_known_args(words)


# ---- steering --------------------------------------------------------------------------------------------


def _taken_up(run) -> None:
    """Wait until what was asked is applied: at once here, at the next step boundary elsewhere."""
    end = time.monotonic() + PATIENCE
    while run.session.pending():
        if time.monotonic() > end:
            raise StoreError(f"{run.path}: asked, and not taken up within {PATIENCE:.0f} seconds; it still may be")
        time.sleep(0.05)


def _refuse_elsewhere(run, what: str) -> None:
    if run.attached:
        raise StoreError(f"{run.path}: another process has this run open; {what} it there, or when that one is done")


def _rewind(given) -> None:
    with held(given.run) as run:
        run.rewind(given.step, name=given.name)
        if not run.attached:
            run.history.save(run._branch.id, run._trainer)  # else the next process would go back further
        print(f"{given.run}: at step {run.current_step} on branch {run.branch!r}; go on with: moe resume {given.run}")


def _fork(given) -> None:
    with held(given.run) as run:
        _refuse_elsewhere(run, "fork")
        run.fork(given.path, given.step).close()
        print(f"{given.path}: go on with: moe resume {given.path}")


def _replay(given) -> int:
    from moe_core.history import GPU_TOLERANCE

    with held(given.run) as run:
        _refuse_elsewhere(run, "replay")
        worst = run.replay()["largest"].sort_values(ascending=False)
        steps, on_cpu = run.current_step, run.config.device == "cpu" or not _cuda()
    off = worst[~(worst <= 0)]  # NaN too
    if off.empty:
        print(f"{given.run}: {steps} steps again, all {len(worst)} metrics equal to the bit")
        return 0
    print(f"{given.run}: {steps} steps again, {len(off)} of {len(worst)} metrics differ; the largest differences:")
    for name, value in off.head(10).items():
        print(f"  {name:<28}{value:.3g}")
    return int(on_cpu or not worst["train/ce"] <= GPU_TOLERANCE)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _note(given) -> None:
    with held(given.run) as run:
        run.note(given.text, given.step)
        _taken_up(run)
        print(f"{given.run}: noted at step {run.current_step if given.step is None else given.step}")


def _knob(given) -> None:
    with held(given.run) as run:
        knob = run.knobs[given.name]
        if given.value == "follow":
            if given.over is not None:
                raise KnobError(f"{given.name}: follow takes no --over; the schedule says what it is")
            knob.follow()
        else:
            value = _number(given.name, given.value)
            knob.hold(value) if given.over is None else knob.ramp(value, given.over)
        _taken_up(run)
        knob = run.knobs[given.name]
        print(f"{given.run}: {knob!r}, from step {knob.applied_at}")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise KnobError(f"{name} = {text!r}: must be a number, or 'follow'") from None


# ---- reading ---------------------------------------------------------------------------------------------


def _ls(given) -> None:
    from moe_core import overview

    print("\n".join(overview.table(Path(given.dir))))


def _show(given) -> None:
    from moe_core import overview
    from moe_core.run import Run

    run = Run.attach(given.run)
    try:
        print("\n".join(overview.describe(run)))
    finally:
        run.close()


def _export(given) -> None:
    from moe_core.export import export

    out = given.csv or given.parquet
    export(given.run, out, given.branch)
    print(out)


def _report(given) -> None:
    from widgets.report import report

    from moe_core.run import Run

    run = Run.attach(given.run)
    try:
        report(run, given.out)
    finally:
        run.close()
    print(given.out)


def _compare(given) -> None:
    from widgets.compare import compare

    from moe_core.run import Run

    runs = [Run.attach(path) for path in given.runs]
    try:
        compare(runs, given.out)
    finally:
        for run in runs:
            run.close()
    print(given.out)


def _import(given) -> None:
    from moe_core.old_logs import import_log

    print(import_log(given.log, given.run))
