"""RunStore: metrics, expert shares and events of a run in one SQLite file (see ``moe_core.storage.schema``).

One process writes, any number read, and neither waits for the other (WAL). What a ``log_...`` call returned
from outlives ``kill -9``; a power cut may take the newest commits with it, never an older row
(``synchronous=NORMAL``). The run must lie on a local disk: WAL needs memory that readers and writer share.
Copy a run that is being written with SQLite's ``VACUUM INTO``, never file by file: when a process closes a
file, POSIX drops all its locks on that file, SQLite's too.

L layers, E experts, n rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import struct
import threading
import time as clock
from collections.abc import Callable, Iterator, Mapping
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np

from moe_core.storage import access
from moe_core.storage.access import StoreError, as_store_error
from moe_core.storage.rows import Branch, Checkpoint, Steps, decode, pack_metrics, to_json, written
from moe_core.storage.schema import MAIN, STEP_BITS, STEP_MAX, lineage_sql

__all__ = ["Branch", "Checkpoint", "RunStore", "Steps", "StoreError"]

PART = 1024  # rows that are read at once where all would be too many


class _Layout(NamedTuple):
    id: int
    floats: struct.Struct


class RunStore:
    """What a run left on disk: :meth:`create` makes one, :meth:`open` comes back to it. A context manager.

    Any thread may use it. What goes wrong with the file or is refused is a StoreError, one line.
    """

    def __init__(self, path: Path, lock: filelock.BaseFileLock | None = None):
        """For :meth:`create` and :meth:`open`; a store with the writer's ``lock`` can write."""
        self.path = path
        self._lock = lock
        self._closed, self._pid = False, os.getpid()
        self._pool = threading.Lock()  # of the next line
        self._idle: list[sqlite3.Connection] = []  # read connections that no thread is using
        self._keep = os.access(path, os.W_OK)  # elsewhere a connection may be blind to what comes later
        self._guard = threading.Lock()  # of all below: the writer's
        self._writer: sqlite3.Connection | None = None
        self._forks: dict[int, int] = {}  # branch id -> the last step that it inherits
        self._layouts: dict[tuple, _Layout] = {}
        self._shape: tuple[int, ...] | None = None  # of every row's shares

    # ---- making and opening ------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | os.PathLike, config: Mapping[str, Any], meta: Mapping[str, Any] | None = None,
               fill: Callable[[Path], None] | None = None) -> RunStore:
        """Make a run in the directory ``path``, which must not exist, and open it for writing.

        ``config`` and ``meta``: JSON values; ``fill(folder)`` writes what else is in the directory from the first.
        """
        access.make(Path(path), config, meta, fill)
        return cls.open(path, write=True)

    @classmethod
    def open(cls, path: str | os.PathLike, write: bool = False) -> RunStore:
        """The run in ``path``: to read, whoever is writing it, or with ``write`` to be the one who writes.

        Raises StoreError, with nothing written, where ``path`` is no run, is newer than this code, has
        another writer (and says which), or may not be accessed.
        """
        path = Path(path)
        with as_store_error(path):
            access.check(path)
            path = path.absolute()  # what is read and written later lies there wherever the process goes meanwhile
            store = cls(path, access.take_lock(path) if write else None)
            try:
                access.refuse_damaged(store)
                if write:
                    store._start_writing()
            except BaseException:
                store.close()
                raise
            return store

    def _start_writing(self) -> None:
        self._writer = db = access.connect(self.path / access.FILE, "rw")
        db.execute("PRAGMA synchronous = NORMAL")
        self._forks = {branch: fork or 0 for branch, fork in db.execute("SELECT id, fork_step FROM branches")}
        for layout, names, layers, experts in db.execute("SELECT id, names, layers, experts FROM layouts"):
            self._remember(layout, tuple(json.loads(names)), (2, layers, experts) if layers else None)
        self.set_meta("writer", access.me())

    @property
    def closed(self) -> bool:
        """Whether it was closed here."""
        return self._closed

    def close(self) -> None:
        """Let the run go, for another to write. Again is harmless; any other use after it is a StoreError."""
        with self._pool:
            self._closed = True
            while self._idle:
                self._idle.pop().close()
        with self._guard:
            try:
                if self._writer is not None:
                    self._writer.close()
            finally:
                self._writer = None
                if self._lock is not None:
                    self._lock.release()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- writing -----------------------------------------------------------------------------------------

    def log_step(self, branch_id: int, step: int, time: float, metrics: Mapping[str, float],
                 shares: np.ndarray | None = None) -> None:
        """Append the row of a step; it is committed when this returns.

        ``time``: seconds since 1970. ``metrics``: kept as float32. ``shares``: float32 [2, L, E], demand then
        served; None or L = E = 0 for a dense model. Refused: a step that the branch has or inherits, a value
        that is no number, shares of another shape than the run's.
        """
        data = np.ascontiguousarray(shares, "<f4").tobytes() if shares is not None and shares.size else None
        key = tuple(metrics), None if data is None else tuple(shares.shape)
        with self._guard:
            db, inherited = self._writable(branch_id)
            layout = self._layouts.get(key) or self._add_layout(db, *key)
            try:
                if not inherited < step <= STEP_MAX:
                    raise ValueError(f"the branch takes steps after {inherited}")
                db.execute("INSERT INTO steps(id, layout, time, metrics, shares) VALUES (?, ?, ?, ?, ?)", (
                    branch_id << STEP_BITS | index(step), layout.id, float(time),
                    pack_metrics(layout.floats, metrics), data))
            except sqlite3.IntegrityError:
                raise StoreError(f"{self.path}: step {step} is not written: it exists already") from None
            except (sqlite3.Error, ValueError, TypeError) as error:
                raise StoreError(f"{self.path}: step {step} is not written: {error}") from error

    def log_event(self, branch_id: int, step: int, kind: str, payload: Mapping[str, Any],
                  asked: float | None = None) -> int:
        """Append an event and return its id; it is committed when this returns.

        ``asked``: when somebody asked for it, seconds since 1970; ``applied`` is now. ``payload``: JSON
        values; a number that is not finite is kept as text, since JSON has none.
        """
        text = self._json(payload, f"the payload of a {kind} event")
        return self._insert(
            "INSERT INTO events(branch, step, kind, asked, applied, payload) VALUES (?, ?, ?, ?, ?, ?)",
            (branch_id, index(step), kind, asked, clock.time(), text), branch_id)

    def add_branch(self, name: str, parent: int, fork_step: int) -> int:
        """Open a branch that shows what ``parent`` shows up to ``fork_step``, and return its id.

        Refused: a name that is taken, a ``fork_step`` that ``parent`` has not reached.
        """
        known, name = {branch.id: branch.name for branch in self.branches()}, written(name)
        if name in known.values():
            raise StoreError(f"{self.path}: there is a branch {name!r} already")
        last = self.last_step(parent)
        if not 0 <= index(fork_step) <= last:
            raise StoreError(f"{self.path}: fork_step = {fork_step}: must be a step of {known[parent]!r}, 0 to {last}")
        branch = self._insert("INSERT INTO branches(name, parent, fork_step, created) VALUES (?, ?, ?, ?)",
                              (name, parent, index(fork_step), clock.time()))
        self._forks[branch] = index(fork_step)
        return branch

    def add_checkpoint(self, branch_id: int, step: int, name: str | None, path: str) -> int:
        """Enter a state that was saved under ``path`` (relative to the run); returns its id."""
        return self._insert("INSERT INTO checkpoints(branch, step, name, path, created) VALUES (?, ?, ?, ?, ?)",
                            (branch_id, index(step), name and written(name), path, clock.time()))

    def drop_checkpoint(self, checkpoint_id: int) -> None:
        """Take a checkpoint off the list; its file is the caller's."""
        self._insert("DELETE FROM checkpoints WHERE id = ?", (checkpoint_id,))

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a JSON value under ``key``, in place of what was there."""
        self._insert("INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                     (key, self._json(value, key)))

    def _json(self, value: Any, what: str) -> str:
        try:
            return to_json(value)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self.path}: {what} is not JSON: {error}") from error

    def _insert(self, sql: str, values: tuple, branch_id: int = MAIN) -> int:
        with self._guard, as_store_error(self.path):
            return self._writable(branch_id)[0].execute(sql, values).lastrowid

    def _writable(self, branch_id: int) -> tuple[sqlite3.Connection, int]:
        """The write connection, and the last step that the branch inherits."""
        if self._writer is None or self._pid != os.getpid():  # a forked child would be a second writer
            raise StoreError(f"{self.path}: is {'closed' if self._closed else 'open for reading only'}")
        if branch_id not in self._forks:
            raise StoreError(f"{self.path}: branch_id = {branch_id!r}: there is no such branch")
        return self._writer, self._forks[branch_id]

    def _add_layout(self, db: sqlite3.Connection, names: tuple[str, ...], shape: tuple | None) -> _Layout:
        if shape is not None and (len(shape) != 3 or shape[0] != 2 or self._shape not in (None, shape)):
            raise StoreError(f"{self.path}: shares of shape {shape}: must be {self._shape or '(2, L, E)'}")
        with as_store_error(self.path):
            made = db.execute("INSERT INTO layouts(names, layers, experts) VALUES (?, ?, ?)",
                              (json.dumps(names), *(shape or (2, 0, 0))[1:])).lastrowid
        return self._remember(made, names, shape)

    def _remember(self, layout: int, names: tuple[str, ...], shape: tuple | None) -> _Layout:
        self._shape = shape or self._shape
        return self._layouts.setdefault((names, shape), _Layout(layout, struct.Struct(f"<{len(names)}f")))

    # ---- reading -----------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """What :meth:`create` was given."""
        return self.get_meta("config")

    def get_meta(self, key: str, default: Any = None) -> Any:
        """The JSON value under ``key``."""
        with self._reader() as db:
            found = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            return default if found is None else json.loads(found[0])

    def branches(self) -> list[Branch]:
        """Every branch: ``main``, then the others as they were opened."""
        with self._reader() as db:
            return [Branch(*row) for row in
                    db.execute("SELECT id, name, parent, fork_step, created FROM branches ORDER BY id")]

    def branch_id(self, name: str | None = None) -> int:
        """The id of the branch with this name; None is the current one. Raises StoreError."""
        if name is None:
            return self.get_meta("branch", MAIN)
        known = {branch.name: branch.id for branch in self.branches()}
        if name not in known:
            raise StoreError(f"branch = {name!r}: must be one of {', '.join(map(repr, known))}")
        return known[name]

    def checkpoints(self) -> list[Checkpoint]:
        """Every checkpoint of every branch, oldest first."""
        with self._reader() as db:
            return [Checkpoint(*row) for row in
                    db.execute("SELECT id, branch, step, name, path, created FROM checkpoints ORDER BY id")]

    def lineage(self, branch_id: int) -> list[tuple[int, int]]:
        """(branch id, last step that it lends) of a branch and its ancestors, the branch itself first."""
        with self._reader() as db:
            return [(ancestor, upto) for _, ancestor, upto in db.execute(lineage_sql("WHERE id = ?"), (branch_id,))]

    def last_step(self, branch_id: int = MAIN) -> int:
        """The newest step that the branch shows, its parent's included; 0 when there is none."""
        with self._reader() as db:
            for span in reversed(self._spans(db, branch_id)):
                (newest,) = db.execute("SELECT max(id) FROM steps WHERE id > ? AND id <= ?", span).fetchone()
                if newest is not None:
                    return newest & STEP_MAX
        return 0

    def read_steps(self, branch_id: int = MAIN, since: int = 0, *, shares: bool = True,
                   limit: int = STEP_MAX) -> Steps:
        """The rows of the steps after ``since`` that the branch shows, its parent's included, oldest first.

        ``shares=False`` leaves the expert shares, often most of the bytes, on disk: [n, 2, 0, 0]. ``limit``: the
        oldest rows, at most so many.
        """
        rows: list[tuple] = []
        sql = (f"SELECT id, time, layout, metrics{', shares' if shares else ''} FROM steps "
               "WHERE id > ? AND id <= ? ORDER BY id LIMIT ?")
        with self._reader() as db:
            for span in self._spans(db, branch_id, since):
                rows += db.execute(sql, (*span, limit - len(rows)))
            # After the rows, so that every layout that they mean is there.
            layouts = {row[0]: row[1:] for row in db.execute("SELECT id, names, layers, experts FROM layouts")}
            return decode(rows, layouts, shares)

    def read_parts(self, branch_id: int = MAIN, since: int = 0, *, shares: bool = True) -> Iterator[Steps]:
        """What :meth:`read_steps` reads, ``PART`` rows at a time, at least one part: memory for all shares may lack."""
        while True:
            part = self.read_steps(branch_id, since, shares=shares, limit=PART)
            yield part
            if len(part) < PART:
                return
            since = int(part.steps[-1])

    def read_events(self, branch_id: int = MAIN, after: int = 0) -> list[dict[str, Any]]:
        """The events that the branch shows, its parent's included, by step, then in the order they came.

        Dicts of id, branch (the name of the one it happened on), step, kind, asked and applied (seconds since
        1970), payload (a dict). ``after``: only events with a greater id.
        """
        with self._reader() as db:
            self._spans(db, branch_id)  # refuses an unknown branch
            rows = db.execute(f"""
                SELECT e.id, b.name AS branch, e.step, e.kind, e.asked, e.applied, e.payload
                FROM ({lineage_sql("WHERE id = ?")}) l
                JOIN events e ON e.branch = l.ancestor AND e.step <= l.upto
                JOIN branches b ON b.id = e.branch
                WHERE e.id > ? ORDER BY e.step, e.id""", (branch_id, after))
            names = [column[0] for column in rows.description]
            events = [dict(zip(names, row, strict=True)) for row in rows]
            return [{**event, "payload": dict(json.loads(event["payload"]))} for event in events]

    def last_event(self) -> int:
        """The greatest id of any event; 0 when there is none."""
        with self._reader() as db:
            return db.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0]

    def _spans(self, db: sqlite3.Connection, branch_id: int, since: int = 0) -> list[tuple[int, int]]:
        """The ranges (after, last] of ``steps.id`` that a branch shows after step ``since``, oldest first."""
        found = db.execute(lineage_sql("WHERE id = ?"), (branch_id,)).fetchall()
        if not found:
            raise StoreError(f"{self.path}: branch_id = {branch_id!r}: there is no such branch")
        return [(ancestor << STEP_BITS | min(max(since, 0), STEP_MAX), ancestor << STEP_BITS | upto)
                for _, ancestor, upto in reversed(found)]

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """A read connection that no other thread is using."""
        with as_store_error(self.path), access.as_damage(self.path):
            with self._pool:
                if self._closed:
                    raise StoreError(f"{self.path}: is closed")
                db = self._idle.pop() if self._idle else None
            db = db or access.connect_reader(self.path / access.FILE)
            try:
                yield db
            finally:
                with self._pool:
                    if self._keep and not self._closed:
                        self._idle.append(db)
                    else:
                        db.close()
