"""Who may open a run's file, and how: making and checking it, connections, the lock of its one writer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from moe_core.storage.schema import APPLICATION_ID, SCHEMA_VERSION, create_schema

FILE = "run.sqlite"
PROBE = 0.5  # seconds that taking the lock waits
LOCK = "writer.lock"  # held by the process that writes; the system frees it however that process ends


class StoreError(RuntimeError):
    """The run's file cannot be made, opened, read or written: one line, with its path and why."""


@contextlib.contextmanager
def as_store_error(path: Path) -> Iterator[None]:
    """Turns what SQLite and the system raise into a StoreError about ``path``."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def as_damage(path: Path) -> Iterator[None]:
    """The same for what Python raises where the file holds other than it should: it changed, or a stranger made it."""
    try:
        yield
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise StoreError(f"{path}: is damaged: {type(error).__name__}: {error}") from error


def refuse_damaged(store) -> None:
    """Raise StoreError where what all else relies on is not in a RunStore: a config, branches, the current one."""
    names = {branch.id: branch.name for branch in store.branches()}
    if not isinstance(store.config, dict) or store.branch_id() not in list(names):
        raise StoreError(f"{store.path}: is damaged: it has no config, or not the branch that it stands on")
    if not all(isinstance(name, str) for name in names.values()):
        raise StoreError(f"{store.path}: is damaged: the name of a branch is no text")


def refuse_existing(path: str | os.PathLike) -> None:
    """Raise StoreError where :func:`make` would: ``path`` is taken, or cannot be made. Writes nothing."""
    with as_store_error(path := Path(path)):
        if os.path.lexists(path):
            open_it = "open that run, or " if (path / FILE).is_file() else ""
            raise StoreError(f"{path}: exists already; {open_it}choose another directory")
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir():
            raise StoreError(f"{path}: cannot be created, {above} is not a directory")
        if not os.access(above, os.W_OK | os.X_OK):
            raise StoreError(f"{path}: cannot be created, no write access to {above}")


def make(path: Path, config: Mapping[str, Any], meta: Mapping[str, Any] | None = None,
         fill: Callable[[Path], None] | None = None) -> None:
    """A run's directory with an empty store; ``config`` and ``meta`` are JSON values, ``fill`` writes what else
    belongs in the directory. It is there whole or not at all. Raises StoreError.
    """
    refuse_existing(path)
    try:
        meta = [(key, json.dumps(value, allow_nan=False))
                for key, value in {"config": config, "created": time.time(), **(meta or {})}.items()]
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path}: the config is not JSON: {error}") from error
    # Made beside its place and moved there whole, so that a crash leaves no half of a run.
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with as_store_error(path):
        try:
            draft.mkdir(parents=True)
            with contextlib.closing(connect(draft / FILE, "rwc")) as db:
                if db.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                    raise StoreError(f"{path}: SQLite has no WAL mode on this file system; use a local disk")
                create_schema(db, time.time())
                db.executemany("INSERT INTO meta VALUES (?, ?)", meta)
            if fill is not None:
                fill(draft)
            draft.rename(path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def check(path: Path) -> None:
    """Raise StoreError unless ``path`` is a run that this code can read. Writes nothing.

    It asks through SQLite on purpose: open() and close() of the file by the process that writes it would drop
    the locks that guard its writing.
    """
    file = path / FILE
    if not path.exists():
        raise StoreError(f"{path}: there is no such directory")
    if not file.is_file():
        raise StoreError(f"{path}: is not a run, there is no {FILE} in it")
    if not os.access(file, os.R_OK):
        raise StoreError(f"{path}: no read access to {file}")
    try:
        with contextlib.closing(connect_reader(file, leave_no_trace=True)) as db:
            kind, version = (db.execute(f"PRAGMA {name}").fetchone()[0]
                             for name in ("application_id", "user_version"))
    except sqlite3.OperationalError:
        raise  # may not or cannot be read just now, which says nothing of what it is
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{path}: is not a run, {FILE}: {error}") from error
    if kind != APPLICATION_ID or version < 1:
        raise StoreError(f"{path}: is not a run, {FILE} was written by something else")
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path}: was written by a newer version (schema {version}, this one knows up to "
                         f"{SCHEMA_VERSION}); update to open it")


def take_lock(path: Path) -> filelock.BaseFileLock:
    """The writer's lock of a run, held. Raises StoreError naming who holds it, or what may not be written."""
    for place in (path, path / FILE, path / LOCK):
        if place.exists() and not os.access(place, os.W_OK):
            raise StoreError(f"{path}: no write access to {place}; open it for reading")
    if (path / FILE).is_symlink():
        raise StoreError(f"{path}: {FILE} is a link; open the run that it leads to, in whose directory the lock is")
    lock = filelock.FileLock(path / LOCK, thread_local=False)  # any thread may close what another opened
    try:
        lock.acquire(timeout=PROBE)  # a moment's patience, for another's look at who writes
    except filelock.Timeout:
        who = _spoken(_signed(path))
        raise StoreError(f"{path}: already open for writing by {who}; "
                         "one process may write a run, any number may read and steer it (mc.Run.attach)") from None
    return lock


def writer(path: Path) -> dict[str, Any] | None:
    """Who writes the run in ``path`` now, as :func:`me` signs; None where nobody does."""
    if not (path / LOCK).exists():
        return None
    lock = filelock.FileLock(path / LOCK, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return _signed(path)
    except OSError:  # not ours to write
        return _signed(path) if _held(path / LOCK) else None
    lock.release()
    return None


def _held(file: Path) -> bool:
    """Whether a process holds the lock ``file``, which may be read and not written; True where that cannot be told."""
    try:
        import fcntl

        with open(file, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return True
    return False


def _signed(path: Path) -> dict[str, Any]:
    with contextlib.closing(connect_reader(path / FILE)) as db:
        found = db.execute("SELECT value FROM meta WHERE key = 'writer'").fetchone()
    return json.loads(found[0]) if found else {}


def me() -> dict[str, Any]:
    """How a writer signs: pid, host, since (seconds since 1970)."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}


def _spoken(writer: dict[str, Any]) -> str:
    if not writer:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(writer["since"]))
    own = "this process, " if (writer["pid"], writer["host"]) == (os.getpid(), socket.gethostname()) else ""
    return f"{own}pid {writer['pid']} on {writer['host']}, since {since}"


def connect(file: Path, mode: str) -> sqlite3.Connection:
    """A connection that commits every statement by itself and that any thread may use, one at a time."""
    # as_uri wants the whole path, and quotes in it what a URI would take for its own (? and #)
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None,
                           check_same_thread=False, timeout=10)


def connect_reader(file: Path, leave_no_trace: bool = False) -> sqlite3.Connection:
    """A read-only connection.

    A reader of a WAL file makes files beside it. Where it may not, and nobody has the file open (there is no
    -wal, so all is in the main file), it is read as a file that cannot change.
    """
    unused = not file.with_name(f"{file.name}-wal").exists()
    fixed = unused and (leave_no_trace or not os.access(file.parent, os.W_OK))
    return connect(file, "ro&immutable=1" if fixed else "ro")
