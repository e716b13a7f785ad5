"""The trackers that a run can be mirrored to, behind one small face: Weights & Biases, TensorBoard, trackio.

A tracker's run shows one branch, its steps rising. Each is made, used and finished by one thread of
:mod:`moe_core.mirrors`; anything here may raise or never come back. The packages are optional extras of this
project (``pip install moe-workbench[wandb]``) and are imported when the first row is there to be sent.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FINISH_S = 5.0  # that W&B may take to send what is left when a run is closed; the rest is for `wandb sync`


@dataclass(frozen=True)
class Line:
    """What a tracker is told of the branch that it is to show."""

    folder: Path  # of the run
    project: str
    run: str  # what the lines of one run have in common
    name: str  # of this line: the run's name, and the branch's behind it unless it is main
    branch: str
    key: str  # unique, and the same whenever this line is opened again
    config: dict[str, Any]
    resumed: bool  # whether it was opened before
    after: int  # the last step that was mirrored


class Tracker(Protocol):
    """One line in a tracker. ``interval_s``: seconds between two looks for new rows; ``where``: how it is found."""

    interval_s: float
    where: str

    def __init__(self, line: Line): ...

    def log(self, step: int, time: float, values: dict[str, float]) -> None:
        """Hand over the row of a step; ``time``: seconds since 1970."""

    def flush(self) -> None:
        """Let what was handed over survive this process, as far as the tracker can."""

    def finish(self) -> None:
        """End the line; it may be opened again later."""


class WandbTracker:
    """A W&B run in the group of its run; WANDB_MODE=offline writes to ``<run>/wandb``, for ``wandb sync``."""

    interval_s = 1.0

    def __init__(self, line: Line):
        import wandb

        # Without this W&B would ask for a key on the terminal, from a thread that nobody is talking to.
        if wandb.run is None and wandb.setup().settings.mode in ("online", "run", "shared") and \
                not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key is set: run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=line.project, group=line.run, name=line.name, id=line.key, config=line.config,
            dir=str(line.folder), resume="allow", reinit="create_new", save_code=False,
            settings=wandb.Settings(
                silent=True, console="off",  # what is printed belongs to the user
                finish_timeout=FINISH_S,
                stop_fn=_go_on))  # else the stop button of W&B's page interrupts the main thread
        offline = self._run.settings.mode in ("offline", "dryrun")
        self.where = f"wandb sync {self._run.settings.sync_dir}" if offline else self._run.url or "W&B"

    def log(self, step: int, time: float, values: dict[str, float]) -> None:
        self._run.log({**values, "_timestamp": time}, step=step, commit=True)

    def flush(self) -> None:
        """Nothing: W&B's own process has the rows already."""

    def finish(self) -> None:
        self._run.finish()


def _go_on() -> None:
    """What a stop asked for on W&B's page does: only whoever drives the run stops it."""


class TensorBoardTracker:
    """Event files in ``<run>/tensorboard/<branch>``; rows of one step are one record."""

    interval_s = 1.0

    def __init__(self, line: Line):
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        safe = re.sub(r"[^\w.-]+", "-", line.branch).strip("-.")[:60] or "branch"
        folder = line.folder / "tensorboard" / (safe if line.branch == safe else f"{safe}-{line.key}")
        # purge_step hides what an earlier process wrote beyond the step that it took note of.
        self._writer = SummaryWriter(str(folder), purge_step=line.after + 1 if line.resumed else None)
        if not line.resumed:
            self._writer.add_text("config", f"    {json.dumps(line.config, indent=2)}".replace("\n", "\n    "), 0)
        self.where = f"tensorboard --logdir {folder.parent}"

    def log(self, step: int, time: float, values: dict[str, float]) -> None:
        row = self._summary(value=[self._summary.Value(tag=name, simple_value=value)
                                   for name, value in values.items()])
        self._writer.file_writer.add_summary(row, step, walltime=time)

    def flush(self) -> None:
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class TrackioTracker:
    """A trackio run in the group of its run. trackio knows a run by its name, so the name carries the key."""

    interval_s = 5.0  # each time, its thread in this process works for tens of milliseconds, for one row or many

    def __init__(self, line: Line):
        import trackio

        name = f"{line.name}-{line.key}"
        # Its hardware monitors would be threads beside the training.
        self._run = trackio.init(
            line.project, name=name, group=line.run, config=line.config, embed=False, auto_log_gpu=False,
            auto_log_cpu=False, resume="allow")
        self.where = f"trackio show --project {line.project}, run {name}"

    def log(self, step: int, time: float, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        """Nothing: trackio's own thread writes every half second."""

    def finish(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "wandb": WandbTracker, "tensorboard": TensorBoardTracker, "trackio": TrackioTracker}
