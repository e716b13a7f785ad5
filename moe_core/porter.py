"""Carries the wishes of other processes to the run that this process trains, and tells them how it stands.

A small thread beside the session: training never waits for it, and it never touches the model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from moe_core.inbox import Inbox, Wish
from moe_core.knobs import check_turn
from moe_core.session import Command
from moe_core.store import StoreError

LOOK = 0.2  # seconds between two looks at the inbox
PROGRESS = "progress"  # the store's meta key of what is told: state, chunk's first step and length, error


class Porter:
    """The thread of one open run. It lets the run go where nobody else holds it."""

    def __init__(self, run):
        self._run = weakref.ref(run)
        self._inbox = Inbox(run.path)
        self._taken: dict[int, Callable[[], bool]] = {}  # wish -> whether it is done
        self._told: dict | None = None
        self._closed = threading.Event()
        for wish in self._inbox.waiting():
            self._inbox.answer(wish.id, "no process was training the run when this was requested")
        self._tell(run)
        self._thread = threading.Thread(target=self._work, name="moe-porter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take up no more wishes, and wait for the thread."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        said = ""
        while not self._closed.wait(LOOK):
            run = self._run()
            if run is None:
                return
            try:
                self._look(run)
                said = ""
            except StoreError as error:  # a full disk, say; training goes on, and so does the looking
                if str(error) != said and not self._closed.is_set():
                    said = str(error)
                    print(f"{run.path}: requests from other processes cannot be read: {error}")
            del run

    def _look(self, run) -> None:
        for wish in self._inbox.read(after=max(self._taken, default=0), waiting=True):
            try:
                self._taken[wish.id] = self._take(run, wish)
            except StoreError:
                raise
            except Exception as error:  # whatever a wish that another process wrote leads to, this thread goes on
                self._inbox.answer(wish.id, f"{wish.kind}: {str(error) or type(error).__name__}")
        self._tell(run)  # before the answer, so that who gets it sees what came of it
        for wish in [wish for wish, done in self._taken.items() if done()]:
            del self._taken[wish]
            self._inbox.answer(wish)

    def _take(self, run, wish: Wish) -> Callable[[], bool]:
        """Start what a wish asks for; the answer says whether it is done."""
        session, said = run.session, wish.payload
        if wish.kind in ("knob", "note", "checkpoint"):
            if wish.kind == "knob":
                check_turn(run.knobs[said["name"]].name, said["mode"], said.get("value"), said.get("over"))
            command = Command(wish.kind, said, wish.asked)
            session.post(command)
            return lambda: command not in session.pending()
        if wish.kind == "start":
            session.start(said["n"])
        elif wish.kind == "pause":
            session.pause()
        elif wish.kind in ("rewind", "undo", "switch"):
            getattr(run, wish.kind)(**said, wait=False)
            return lambda: session.state != "moving"
        else:
            raise ValueError("unknown command; there are knob, note, checkpoint, start, pause, rewind, undo, switch")
        return lambda: True

    def _tell(self, run) -> None:
        now = run.progress()
        told = {"state": now.state, "chunk_start": run.session.chunk_start, "chunk_total": now.chunk_total,
                "error": now.error}
        if told != self._told:
            run.store.set_meta(PROGRESS, told)
            self._told = told
