"""What each command of ``moe`` does; ``moe_core.cli`` says how it is called."""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path

from moe_core import commands
from moe_core.config import ConfigError
from moe_core.knobs import KnobError
from moe_core.shell import headless
from moe_core.shell.headless import held, printable, tell, typed
from moe_core.store import StoreError

PATIENCE = 60.0  # seconds that a wish may take to be taken up by the process that trains


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, as everything that is refused."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def steps(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer, at least 1")
    return int(text)


# ---- training --------------------------------------------------------------------------------------------


def train(words: list[str]) -> int:
    line = commands.read(["moe", "train", *words])
    several = "," in line.config.opt_list
    return shootout(words) if several else headless.train(line)


def shootout(words: list[str]) -> int:
    from moe_core.shootout import Search, shootout_from

    own, words = _own_flags(words)
    line = commands.read(["moe", "shootout", *words])
    config = line.config
    place = line.given.get("checkpoint_dir") or (Path(config.csv).with_suffix("") if config.csv
                                                 else headless.default_place("shootout"))
    tell(f"{place}: the shoot-out's directory; the same command with it resumes an interrupted shoot-out")
    term = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        shootout_from(config, place, own.seeds, tune=Search() if own.tune else None)
    except KeyboardInterrupt:
        tell(f"{place}: paused and saved; resume with the same command and --run {typed(place)}")
        return 130
    finally:
        signal.signal(signal.SIGTERM, term)
    return 0


def _own_flags(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser("moe shootout", add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", type=steps, default=1)
    parser.add_argument("--tune", action="store_true")
    return parser.parse_known_args(words)


def bench(words: list[str]) -> None:
    from moe_core.bench import command

    parser = Parser("moe bench", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    command.main(parser.parse_args(words))


# ---- steering --------------------------------------------------------------------------------------------


def _taken_up(run) -> None:
    """Wait until what was asked is applied: at once here, at the next step boundary elsewhere."""
    end = time.monotonic() + PATIENCE
    while run.session.pending():
        if time.monotonic() > end:
            raise StoreError(f"{run.path}: requested, but not applied within {PATIENCE:.0f} seconds; it may still be")
        time.sleep(0.05)


def _refuse_elsewhere(run, what: str) -> None:
    if run.attached:
        raise StoreError(f"{run.path}: another process has this run open; {what} it there, or once it is closed")


def rewind(given) -> None:
    with held(given.run) as run:
        run.rewind(given.step, name=given.name)
        if not run.attached:
            run.history.save(run._branch.id, run._trainer)  # else the next process would go back further
        print(f"{given.run}: at step {run.current_step} on branch {run.branch!r}; continue with: "
              f"moe resume {typed(given.run)}")


def fork(given) -> None:
    with held(given.run) as run:
        _refuse_elsewhere(run, "fork")
        run.fork(given.path, given.step).close()
        print(f"{given.path}: continue with: moe resume {typed(given.path)}")


def replay(given) -> int:
    from moe_core.history import GPU_TOLERANCE

    with held(given.run) as run:
        _refuse_elsewhere(run, "replay")
        worst = run.replay()["largest"].sort_values(ascending=False)
        taken, on_cpu = run.current_step, run.config.device == "cpu" or not _cuda()
    off = worst[~(worst <= 0)]  # NaN too
    if off.empty:
        print(f"{given.run}: {taken} steps retrained, all {len(worst)} metrics bit-identical")
        return 0
    print(f"{given.run}: {taken} steps retrained, {len(off)} of {len(worst)} metrics differ; the largest differences:")
    for name, value in off.head(10).items():
        print(f"  {name:<28}{value:.3g}")
    return int(on_cpu or not worst["train/ce"] <= GPU_TOLERANCE)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def note(given) -> None:
    with held(given.run) as run:
        before = run.store.last_event()
        run.note(given.text, given.step)
        _taken_up(run)
        noted = [e["step"] for e in run.store.read_events(run.store.branch_id(), after=before)
                 if e["kind"] == "note" and e["payload"]["text"] == given.text]
        if not noted:
            raise StoreError(f"{run.path}: the process that trains it did not record the note")
        print(f"{given.run}: noted at step {noted[0]}")


def knob(given) -> None:
    with held(given.run) as run:
        knob = run.knobs[given.name]
        if given.value == "follow":
            if given.over is not None:
                raise KnobError(f"{given.name}: follow takes no --over; the schedule sets the value")
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


def ls(given) -> None:
    from moe_core.shell import overview

    print("\n".join(map(printable, overview.table(Path(given.dir)))))


def show(given) -> None:
    from moe_core.shell import overview

    print("\n".join(map(printable, overview.describe(Path(given.run)))))


def export(given) -> None:
    from moe_core.export import ExportError, export

    suffix, out = (".csv", given.csv) if given.csv is not None else (".parquet", given.parquet)
    if Path(out).suffix in {".csv", ".parquet"} - {suffix}:
        raise ExportError(f"{out}: must end in {suffix}, or be a folder")
    print(export(given.run, out, given.branch, table=given.table, per_layer=given.per_layer, suffix=suffix))


def report(given) -> None:
    from widgets import report

    print(report.write(given.run, given.out, static=given.static, gates=given.gate, baselines=given.baseline,
                       snapshots=given.snapshot, title=given.title))


def compare(given) -> None:
    from widgets import compare

    print(compare.write(given.runs, given.out, static=given.static, title=given.title))


def import_(given) -> None:
    from moe_core.old_logs import import_log

    try:
        every = {name: steps(number) for name, _, number in (said.rpartition("=") for said in given.val_every)}
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--val-every {error}") from None
    if "" in every and len(every) > 1:
        raise ConfigError(f"--val-every {every['']}: is for all optimizers and cannot be combined with NAME=N")
    made = import_log(given.logs, given.run, every.get("", every or None), dict(map(_pair, given.rename)), given.shift)
    print("\n".join(map(printable, str(made).splitlines())))


def _pair(said: str) -> tuple[str, str]:
    old, equals, new = said.partition("=")
    if not (old and equals and new):
        raise ConfigError(f"--rename {said!r}: must be OLD=NEW")
    return old, new
