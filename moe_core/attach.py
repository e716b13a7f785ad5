"""A run that another process trains, in a user's hand: read from its store, steered through its inbox.

    run = mc.Run.attach("runs/night")
    Workbench(run)                        # live; closing it stops nothing
    run.knobs["router_temp"].hold(1.3)    # taken up at the trainer's next step boundary
"""

from __future__ import annotations

import time
from pathlib import Path

from moe_core import probe
from moe_core.checked import whole
from moe_core.config import RunConfig
from moe_core.face import Face
from moe_core.history import turns
from moe_core.inbox import Inbox
from moe_core.knobs import Knobs
from moe_core.porter import PROGRESS
from moe_core.session import BUSY, Command, Progress
from moe_core.storage import access
from moe_core.store import RunStore, StoreError

LOOK = 0.1  # seconds that what was read counts as new
ANSWER = 0.05  # seconds between two looks for an answer


class Attached(Face):
    """The run in ``path``, whoever trains it, as a :class:`~moe_core.Run` shows it. Made by ``Run.attach``.

    What is asked of it is a wish that the training process takes up within a fifth of a second and applies at its
    next step boundary. Where no process trains the run, ``session.state`` is "gone" and a wish is a StoreError.
    """

    attached = True

    def __init__(self, store: RunStore):
        """For ``Run.attach``."""
        self.store, self.path = store, Path(store.path)
        self.config = RunConfig.from_dict(store.config)
        self._as_turned = Knobs(self.config)
        self._looked, self._event = 0.0, -1
        self.session = _Remote(self)
        self._look()

    def close(self) -> None:
        """Let go of the run's file; the training goes on."""
        self.store.close()

    def rewind(self, step: int, name: str | None = None, wait: bool = True) -> None:
        """Have the trainer go back to the state after ``step``, on a new branch, and rest there."""
        step = self._check_step(step)
        self._check_name(name)
        self.session.ask("rewind", {"step": step, "name": name}, wait)

    def undo(self, wait: bool = True) -> None:
        """Have the trainer go back to where its last chunk started, on a new branch."""
        self.session.ask("undo", {}, wait)

    def switch(self, branch: str, wait: bool = True) -> None:
        """Have the trainer go to the end of another branch and make it the current one."""
        self._other_branch(branch)
        self.session.ask("switch", {"branch": branch}, wait)

    def __getattr__(self, name: str):
        if name in ("preview", "fork", "ab", "replay", "resume", "history"):
            raise AttributeError(f"{name}: not available on an attached run; use the process that trains {self.path}, "
                                 "or mc.Run.open where none does")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"Attached({str(self.path)!r}, step {self.current_step}, {self.session.state})"

    # The names that Face reads, each looked up in the store anew.

    @property
    def _step(self) -> int:
        self._look()
        return self._last

    @property
    def _knobs(self) -> Knobs:
        self._look()
        return self._as_turned

    @property
    def _probed(self):
        return probe.Saved(self.store)  # the newest saved state stands for now

    @property
    def _branch(self):
        self._look()
        return self._on

    def _look(self) -> None:
        if time.monotonic() - self._looked < LOOK:
            return
        current, events = self.store.branch_id(), self.store.last_event()
        if (current, events) != (getattr(self, "_on", None) and self._on.id, self._event):
            self._on = next(b for b in self.store.branches() if b.id == current)
            self._as_turned.replay(turns(self.store, current))
            self._event = events
        self._last = self.store.last_step(current)
        self._looked = time.monotonic()


class _Remote:
    """What stands for the session of another process."""

    def __init__(self, run: Attached):
        self._run, self._inbox = run, Inbox(run.path)

    def ask(self, kind: str, payload: dict, wait: bool = False) -> None:
        """Leave a wish; with ``wait`` until it is answered. StoreError where nobody is there or it is refused."""
        self._refuse_gone()
        wish = self._inbox.post(kind, payload)
        while wait and (answer := self._inbox.read(after=wish - 1)[0]).answered is None:
            self._refuse_gone()
            time.sleep(ANSWER)
        self._run._looked = 0.0
        if wait and answer.refused:
            raise StoreError(f"{self._run.path}: {answer.refused}")

    def _refuse_gone(self) -> None:
        if access.writer(self._run.path) is None:
            raise StoreError(f"{self._run.path}: no process trains this run, so nothing was changed; mc.Run.open "
                             "continues it here")

    def start(self, n: int) -> None:
        self.ask("start", {"n": whole("n", n)}, wait=True)

    def pause(self) -> None:
        self.ask("pause", {})

    def post(self, command: Command) -> None:
        self.ask(command.kind, command.payload)

    def pending(self) -> list[Command]:
        return [Command(wish.kind, wish.payload, wish.asked) for wish in self._inbox.read(waiting=True)]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing trains; False when ``timeout`` seconds pass first. Raises what stopped the training, and
        StoreError where the process that trained is gone before its chunk was done.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (seen := self.progress()).state in BUSY:
            if end is not None and time.monotonic() >= end:
                return False
            time.sleep(ANSWER)
        told = self._run.store.get_meta(PROGRESS) or {"state": None, "error": None}
        if told["error"]:  # also of one that is gone since
            raise RuntimeError(told["error"])
        if (seen.state == "gone" and told["state"] in BUSY
                and seen.step < told["chunk_start"] + told["chunk_total"]):
            raise StoreError(f"{self._run.path}: no process trains this run any more; it is at step {seen.step}, and "
                             "mc.Run.open continues it here")
        return True

    @property
    def state(self) -> str:
        """That of the session which trains, or "gone"."""
        return self.progress().state

    def progress(self) -> Progress:
        run = self._run
        told = run.store.get_meta(PROGRESS)
        step = run.current_step
        if told is None or access.writer(run.path) is None:
            return Progress("gone", step, 0, 0, None, None, None)
        total = told["chunk_total"]
        done = min(max(step - told["chunk_start"], 0), total)
        tok_s = left = None
        if told["state"] in BUSY and done:
            tok_s = float(run.store.read_steps(run._branch.id, step - 1, shares=False).column("perf/tok_s")[-1])
            left = (total - done) * run.config.tokens_per_step / tok_s
        return Progress(told["state"], step, done, total, tok_s, left, told["error"])

    def close(self) -> None:
        """Nothing to stop: the session belongs to the process that trains."""
