"""``moe ...``: from a shell what the notebook does, in the same run directories.

Exit codes: 0; 1 for a run that failed, or did not come out the same; 2 for a command that cannot be; 128 and the
signal's number for training that a signal stopped, at a step boundary and saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence

from moe_core.checked import described
from moe_core.config import RunConfig
from moe_core.shell import headless, verbs
from moe_core.shell.headless import TrainingError, tell
from moe_core.trainer import NonFiniteError

FAILED = (TrainingError, NonFiniteError)

TRAIN = """
The line may be a legacy training script's, pasted whole with its prompt and broken lines:

  moe train python train_experimental.py --device cuda --n_experts 8 --dropless --attn_gate sigmoid_head
  moe train --dataset c4 --layers 12 --opt-list adamw,muon_adamw --steps 500
  moe train runs/top2 python launch_training.py --dim 512 --num-experts 8 --train-data tokens.npy

or this project's own: a preset, and any field of the config by its name:

  moe train runs/first --preset nano --n_experts 16 --top_k 2 --no-qk_norm
  moe train --preset moe-203m --dataset_name texts/ --mirrors wandb,tensorboard

RUN_DIR (or --run DIR, or --checkpoint_dir DIR) is where the run goes; a free name beside it where it exists already.
--auto_resume continues the run that is there, --resume PATH that run, or from that checkpoint. With more than one
optimizer in --opt-list it is a shoot-out. Ctrl-C pauses at the next step boundary, saves, and says how to continue.
"""
SHOOTOUT = """
  moe shootout runs/duel --preset nano --opt-list adamw,muon_adamw,muon_sophia,sophia --csv duel.csv
  moe shootout python train_dense_gpu.py --dataset c4 --layers 12 --opt-list adamw,sophia --steps 500

Each optimizer trains from the same weights on the same batches; the directory holds an ordinary run for each.
The same command with the same directory resumes where it was interrupted.

  --seeds N    N seeds from --seed on, for means and spreads
  --tune       a small search of the peak rates first, with the same budget for each optimizer
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # a file on Windows, say, may not take every character of a note
        sys.stdout.reconfigure(errors="backslashreplace")
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
        tell(f"moe: {_said(error)}")
        return 2 if isinstance(error, (ValueError, OSError)) or (_ours(error) and not isinstance(error, FAILED)) else 1


def _ours(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in ("moe_core", "widgets")


def _said(error: Exception) -> str:
    """One line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    said = " ".join(str(error).split())
    return said if _ours(error) or type(error) is ValueError else f"{type(error).__name__}: {said}; --debug says where"


def _run(words: list[str]) -> int:
    parser = _parser()
    if words and words[0] == "bench":  # whose flags are made where they are read
        return verbs.bench(words[1:])
    free = {"train": verbs.train, "shootout": verbs.shootout}
    if words and words[0] in free and not {"-h", "--help"} & set(words):
        return free[words[0]](words[1:])  # their flags are the config's fields
    if not words:
        parser.print_help()
        return 2
    given = parser.parse_args(words)
    return given.do(given) or 0


def _parser() -> argparse.ArgumentParser:
    parser = verbs.Parser(
        "moe", description="Train and study mixture-of-experts routers, from a shell.",
        epilog="moe COMMAND --help describes a command. --debug shows the traceback of a failure.")
    each = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, do: Callable | None, what: str, example: str = "", usage: str | None = None):
        sub = each.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + ".", usage=usage,
            epilog=("examples:\n" if do else "") + example, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(do=do)
        return sub

    run = dict(metavar="RUN", help="a run's directory")
    add("train", None, "create a run and train it to max_iters", TRAIN + "\nFields:\n" + textwrap.indent(
        "\n".join(described(RunConfig)), "  "), "moe train [RUN_DIR] COMMAND LINE")
    p = add("resume", lambda a: headless.resume(a.run, a.steps), "continue a run, or from one of its checkpoints",
            "  moe resume runs/first\n  moe resume runs/first --steps 200\n"
            "  moe resume runs/first/checkpoints/1-00000400.safetensors")
    p.add_argument("run", metavar="RUN", help="a run's directory, or a file in its checkpoints folder")
    p.add_argument("--steps", type=verbs.steps, metavar="N", help="train N more steps (default: to the planned end)")
    p = add("rewind", verbs.rewind, "go back to a step, on a new branch; the old branch is kept",
            "  moe rewind runs/first 400\n  moe rewind runs/first 400 --name sharper")
    p.add_argument("run", **run)
    p.add_argument("step", type=int, metavar="STEP")
    p.add_argument("--name", help="name of the new branch")
    p = add("fork", verbs.fork, "copy a run's state and history into a new run",
            "  moe fork runs/first runs/second\n  moe fork runs/first runs/second --step 400")
    p.add_argument("run", **run)
    p.add_argument("path", metavar="PATH", help="the new run's directory")
    p.add_argument("--step", type=int, help="fork the state after this step (default: the current one)")
    p = add("replay", verbs.replay, "retrain from scratch and compare every metric",
            "  moe replay runs/first")
    p.add_argument("run", **run)
    p = add("note", verbs.note, "pin a note to a run's step", '  moe note runs/first "entropy drifts back up"\n'
            '  moe note runs/first "loss spike" --step 120')
    p.add_argument("run", **run)
    p.add_argument("text", metavar="TEXT")
    p.add_argument("--step", type=int, help="step to pin it to (default: the current one)")
    p = add("knob", verbs.knob, "turn a knob, even while another process trains the run",
            "  moe knob runs/first router_temp 1.3\n  moe knob runs/first router_temp 1.0 --over 200\n"
            "  moe knob runs/first router_temp follow")
    p.add_argument("run", **run)
    p.add_argument("name", metavar="KNOB", help="router_temp, router_noise_std, load_balance_alpha, ...")
    p.add_argument("value", metavar="VALUE", help="a number to hold, or 'follow' for the schedule")
    p.add_argument("--over", type=verbs.steps, metavar="N", help="ramp to VALUE over N steps")
    p = add("ls", verbs.ls, "list the runs in a directory", "  moe ls\n  moe ls runs")
    p.add_argument("dir", nargs="?", default=".", metavar="DIR")
    p = add("show", verbs.show, "summarise a run: its config, metrics, knobs, branches, health and newest events",
            "  moe show runs/first")
    p.add_argument("run", **run)
    p = add("export", verbs.export, "write a run's tables as CSV or Parquet",
            "  moe export runs/first --csv first.csv\n  moe export runs/first --csv shares.csv --table shares\n"
            "  moe export runs/first --parquet tables/\n\nAn OUT without a suffix is a folder for all three tables.")
    p.add_argument("run", **run)
    to = p.add_mutually_exclusive_group(required=True)
    to.add_argument("--csv", metavar="OUT")
    to.add_argument("--parquet", metavar="OUT")
    p.add_argument("--branch", help="name of a branch (default: the current one)")
    p.add_argument("--table", default="metrics", choices=("metrics", "shares", "events"),
                   help="table to write where OUT is a single file")
    p.add_argument("--per-layer", action="store_true", help="include each layer's metrics")
    static = dict(action="store_true", help="write HTML without JavaScript")
    p = add("report", verbs.report, "write a report on a run: setup, observations, effects, how to reproduce it",
            "  moe report runs/first first.html\n"
            '  moe report runs/first first.md --baseline runs/old --gate "val/loss < 4.0 by 1400"')
    p.add_argument("run", **run)
    p.add_argument("out", metavar="OUT", help="a .html, .md or .ipynb file")
    p.add_argument("--gate", action="append", default=[], metavar="LINE",
                   help="an acceptance criterion, such as 'val/loss < 4.0 by 1400'; repeatable")
    p.add_argument("--baseline", action="append", default=[], metavar="RUN", help="a run to compare with; repeatable")
    p.add_argument("--snapshot", action="append", type=int, metavar="STEP", help="a step to show in full; repeatable")
    p.add_argument("--title")
    p.add_argument("--static", **static)
    p = add("compare", verbs.compare, "write a report that compares several runs",
            "  moe compare runs/first runs/second both.html")
    p.add_argument("runs", nargs="+", metavar="RUN")
    p.add_argument("out", metavar="OUT", help="a .html, .md or .ipynb file")
    p.add_argument("--title")
    p.add_argument("--static", **static)
    p = add("import", verbs.import_, "import a console log or a W&B CSV export as a run, to compare with",
            "  moe import train.log runs/baseline\n  moe import part1.log part2.log runs/baseline\n"
            "  moe import dense.log runs/dense --val-every 200\n  moe import wandb_export.csv runs/baseline")
    p.add_argument("logs", nargs="+", metavar="LOG", help="a log, or the parts of one in order")
    p.add_argument("run", metavar="RUN", help="the new run's directory; a folder of runs where the logs hold several")
    p.add_argument("--val-every", action="append", default=[], metavar="[NAME=]N",
                   help="steps between validations in a dense log, of all optimizers or of one; repeatable")
    p.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="rename a metric; repeatable")
    p.add_argument("--shift", type=int, default=0, metavar="N", help="add N to every step of the log")
    add("shootout", None, "train the same model with several optimizers and compare them", SHOOTOUT,
        "moe shootout [DIR] COMMAND LINE [--seeds N] [--tune]")
    add("bench", None, "time whole training steps against installed Hugging Face models")
    return parser
