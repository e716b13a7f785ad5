"""A run's metrics in other trackers as well: each mirror is a thread that reads the store and passes rows on.

Training waits for none of this. A mirror reads the rows that are committed, as any reader of the store does, and
sends them under the same names (those per layer stay in the store). It rests twenty times as long as it works, since
what it works it may take from the training thread. What a tracker cannot do is said once, as an ``alert`` event: a
package that is not installed ends that mirror; after any other error it tries again later, from the last row that
went through; one that hangs holds up nobody but itself.

Trackers want steps that rise, and a run's history is a tree. So every branch is a tracker run of its own, grouped
with the others of the run: ``main`` under the run's name, a branch under ``<run>/<branch>``, beginning at the step
after its fork, and taken up again when the run is back on it or opened again. How far each has come is kept in the
store's meta, ``mirror/<tracker>``: {branch id: {"key", "step"}}; after kill -9 the rows of the last second may be
sent again.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_core.config import RunConfig
from moe_core.storage.rows import Steps
from moe_core.store import MAIN, Branch, RunStore, StoreError
from moe_core.trackers import TRACKERS, Line, Tracker

CHUNK = 16  # rows handed over without a rest
REST = 20  # how many times as long a mirror rests as it worked: it shares the interpreter with the training
RETRY_S = 60.0  # after an error
PATIENCE_S = 60.0  # until a tracker that does not answer is said to hang
CLOSE_S = 12.0  # that closing the run may wait for all mirrors together


class Mirrors:
    """The mirrors that ``run.config.mirrors`` names, from now until :meth:`close`. For :class:`~moe_core.Run`.

    They are closed too when the main thread of the process ends.
    """

    def __init__(self, run, trackers: Mapping[str, type[Tracker]] = TRACKERS, patience: float = PATIENCE_S):
        """``run`` is held by nothing here; ``trackers``: by name; ``patience`` in seconds."""
        names = dict.fromkeys(filter(None, run.config.mirrors.split(",")))
        self._mirrors = [_Mirror(name, trackers[name], run.store, run.config) for name in names]
        self._patience = patience
        self._ended = threading.Event()
        self._guard = threading.Lock()  # of closing
        for mirror in self._mirrors:
            mirror.start()
        # Not a daemon: it outlives the main thread for as long as the last rows take, and that is bounded.
        threading.Thread(target=self._watch, name="moe-mirrors", daemon=False).start()

    def close(self, wait: float = CLOSE_S) -> None:
        """Send what is left, finish every tracker, and return within ``wait`` seconds whatever they do."""
        with self._guard:
            if self._ended.is_set():
                return
            deadline = time.monotonic() + wait
            for mirror in self._mirrors:
                mirror.stop(deadline - wait / 2)  # the other half is for the trackers' own endings
            for mirror in self._mirrors:
                mirror.join(max(0.0, deadline - time.monotonic()))
            for mirror in self._mirrors:
                mirror.abandon()
            self._ended.set()

    def _watch(self) -> None:
        """Say it of a tracker that does not come back, and close when the main thread has ended."""
        main = threading.main_thread()
        while not self._ended.wait(0 if not main.is_alive() else min(1.0, self._patience)):
            if not main.is_alive():
                return self.close()
            for mirror in self._mirrors:
                mirror.say_if_it_hangs(self._patience)
            if all(mirror.is_done() for mirror in self._mirrors):
                return


class _Mirror(threading.Thread):
    """One tracker's thread. Only it calls the tracker."""

    def __init__(self, name: str, kind: type[Tracker], store: RunStore, config: RunConfig):
        super().__init__(name=f"moe-mirror-{name}", daemon=True)
        # A run that is let go without being closed must not be kept open by its mirrors.
        self._store = weakref.ref(store)
        self._label, self._kind, self._config = name, kind, config
        self._meta = f"mirror/{name}"
        self._places: dict[str, dict[str, Any]] = store.get_meta(self._meta, {})
        self._tracker: Tracker | None = None
        self._on: int | None = None  # the branch that the tracker shows
        self._asked: float | None = None  # when the tracker was called, while it has not answered
        self._troubles: list[str] = []  # to be said; the first of its kind only
        self._known: set[str] = set()
        self._saying = threading.Lock()
        self._stopping = threading.Event()
        self._until = float("inf")  # when stopping: no row is sent after this
        self._abandoned = False

    # ---- from other threads ------------------------------------------------------------------------------

    def stop(self, until: float) -> None:
        """Have the thread send what is there, but nothing after ``until`` (monotonic seconds), and end."""
        self._until = until
        self._stopping.set()

    def abandon(self) -> None:
        """Say what did not get through; a thread that comes back after this does nothing more."""
        self._abandoned = True
        store = self._store()
        if self.is_alive():
            self._trouble("hangs", "did not finish in time")
            with contextlib.suppress(StoreError):  # rows are then sent twice, not lost
                if store is not None:
                    store.set_meta(self._meta, self._places)
        if store is not None:
            if "package" not in self._known and (left := self._left(store)):
                self._trouble("left", f"{left} steps were not sent; they go out when the run is opened again")
            self._say(store)

    def is_done(self) -> bool:
        """Whether there is nothing left to send or to say."""
        return not self.is_alive() and (not self._troubles or self._store() is None)

    def say_if_it_hangs(self, patience: float) -> None:
        asked, store = self._asked, self._store()
        if asked is not None and time.monotonic() - asked > patience:
            self._trouble("hangs", f"has not answered for {patience:g} s; training goes on without it")
        if store is not None:
            self._say(store)

    # ---- the thread itself -------------------------------------------------------------------------------

    def run(self) -> None:
        pause = 0.0
        while not self._abandoned:
            self._stopping.wait(pause)
            last, pause = self._stopping.is_set(), self._kind.interval_s
            store = self._store()
            if store is None:
                break
            try:
                self._look(store)
            except StoreError as error:  # closed by its owner, or the disk; the store's own trouble is said by training
                self._trouble("store", str(error))
                pause = RETRY_S
            except ImportError as error:
                return self._trouble("package", f"{error}; `pip install {self._label}` and open the run again")
            except Exception as error:
                self._trouble("error", f"{type(error).__name__}: {error}; training goes on, this is tried again")
                self._finish()
                pause = RETRY_S
            del store  # while it sleeps, the run may be let go
            if last:
                break
        self._finish()

    def _look(self, store: RunStore) -> None:
        """Send the rows that are new, of the branch that the run is on last."""
        current = store.branch_id()
        for branch in sorted(store.branches(), key=lambda b: (b.id == current, b.id)):
            rows = store.read_steps(branch.id, self._place(branch)["step"], shares=False)
            if len(rows) and not self._send(store, branch, rows):
                return

    def _place(self, branch: Branch) -> dict[str, Any]:
        return self._places.get(str(branch.id), {"key": None, "step": branch.fork_step or 0})

    def _send(self, store: RunStore, branch: Branch, rows: Steps) -> bool:
        """Hand rows over, with rests between; False when there is no more time."""
        if time.monotonic() > self._until:
            return False
        place = self._open(store, branch)
        columns = [(i, name) for i, name in enumerate(rows.names) if "/layer_" not in name]
        for start in range(0, len(rows), CHUNK):
            began = time.perf_counter()
            try:
                for n in range(start, min(start + CHUNK, len(rows))):
                    if time.monotonic() > self._until:
                        return False
                    row = rows.values[n].tolist()
                    self._asked = time.monotonic()
                    self._tracker.log(int(rows.steps[n]), float(rows.time[n]),
                                      {name: row[i] for i, name in columns if row[i] == row[i]})  # NaN: there is none
                    if self._abandoned:
                        return False
                    place["step"] = int(rows.steps[n])
                self._asked = time.monotonic()
                self._tracker.flush()
            finally:
                self._asked = None
                if not self._abandoned:
                    store.set_meta(self._meta, self._places)
            self._stopping.wait(REST * (time.perf_counter() - began))
        return True

    def _open(self, store: RunStore, branch: Branch) -> dict[str, Any]:
        """Have the tracker show this branch; its place."""
        place = self._place(branch)
        if self._on == branch.id:
            return place
        self._finish()
        resumed = place["key"] is not None
        place["key"] = place["key"] or secrets.token_hex(4)
        name = self._config.wandb_run_name or Path(store.path).resolve().name
        line = Line(
            Path(store.path), self._config.wandb_project, name,
            name if branch.id == MAIN else f"{name}/{branch.name}", branch.name, place["key"],
            self._config.to_dict(), resumed, place["step"])
        self._asked = time.monotonic()
        try:
            self._tracker = self._kind(line)
        finally:
            self._asked = None
        if self._abandoned:
            return place
        self._on, self._places[str(branch.id)] = branch.id, place
        if not resumed:
            store.log_event(branch.id, place["step"], "mirror", {
                "name": self._label, "text": f"branch {branch.name} is mirrored to {self._label}: "
                                             f"{self._tracker.where}"})
        return place

    def _finish(self) -> None:
        tracker, self._tracker, self._on = self._tracker, None, None
        if tracker is None or self._abandoned:
            return
        self._asked = time.monotonic()
        try:
            tracker.finish()
        except Exception as error:
            self._trouble("error", f"{type(error).__name__}: {error}")
        finally:
            self._asked = None

    # ---- what went wrong ---------------------------------------------------------------------------------

    def _trouble(self, kind: str, text: str) -> None:
        if kind not in self._known:
            self._known.add(kind)
            self._troubles.append(" ".join(f"mirror to {self._label}: {text}".split())[:500])

    def _say(self, store: RunStore) -> None:
        """Write the troubles down; what the store refuses (a full disk, say) is said when it takes it."""
        with self._saying, contextlib.suppress(StoreError):
            while self._troubles:
                branch = store.branch_id()
                store.log_event(branch, store.last_step(branch), "alert", {"text": self._troubles[0]})
                del self._troubles[0]

    def _left(self, store: RunStore) -> int:
        """Steps of all branches that this tracker does not have."""
        with contextlib.suppress(StoreError):
            return sum(len(store.read_steps(branch.id, self._place(branch)["step"], shares=False))
                       for branch in store.branches())
        return 0
