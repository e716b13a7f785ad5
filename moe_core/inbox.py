"""Wishes of other processes for the one that trains a run: ``<run>/inbox.sqlite``, a row a wish.

A file of its own, so that no other process ever holds a lock that a step's row would have to wait for.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_core.storage.access import StoreError, as_store_error, connect

FILE = "inbox.sqlite"
_DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)  # ERROR: it has no such table
_TABLE = """CREATE TABLE IF NOT EXISTS wishes(
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, payload TEXT NOT NULL, asked REAL NOT NULL, answered REAL,
    refused TEXT)"""


@dataclass(frozen=True)
class Wish:
    """What somebody asked for; ``refused`` says why not. ``asked``, ``answered``: seconds since 1970, None: not yet."""

    id: int
    kind: str
    payload: dict[str, Any] = field(hash=False)
    asked: float
    answered: float | None
    refused: str | None


class Inbox:
    """The wishes for the run in ``path``. Any process and thread may use one; the file comes with the first wish."""

    def __init__(self, path: Path):
        self._file = path / FILE

    def post(self, kind: str, payload: dict[str, Any]) -> int:
        """Leave a wish; returns its id."""
        with self._open("rwc") as db:
            db.execute(_TABLE)
            return db.execute("INSERT INTO wishes(kind, payload, asked) VALUES (?, ?, ?)",
                              (kind, json.dumps(payload), time.time())).lastrowid

    def read(self, after: int = 0, waiting: bool = False) -> list[Wish]:
        """The wishes with a greater id than ``after``, oldest first; ``waiting``: those without an answer."""
        if not self._file.exists():
            return []
        with self._open("rw") as db:
            rows = db.execute("SELECT id, kind, payload, asked, answered, refused FROM wishes WHERE id > ? "
                              f"{'AND answered IS NULL' if waiting else ''} ORDER BY id", (after,)).fetchall()
        return [Wish(i, kind, json.loads(payload), *rest) for i, kind, payload, *rest in rows]

    def waiting(self) -> list[Wish]:
        """The wishes without an answer, for who opens the run. A file that is no inbox is put aside, and said."""
        try:
            return self.read(waiting=True)
        except (StoreError, ValueError, TypeError) as error:  # of the last two: a payload that is not JSON
            code = getattr(error.__cause__, "sqlite_errorcode", None)
            if isinstance(error, StoreError) and code not in _DAMAGED:  # another has it locked, say
                raise
            aside = self._file.with_name(f"{FILE}.damaged-{time.time_ns()}")
            os.replace(self._file, aside)
            print(f"{self._file}: damaged, so it is renamed {aside.name}; requests left in it are not carried out")
            return []

    def answer(self, wish: int, refused: str | None = None) -> None:
        """Done, or ``refused`` with a reason."""
        with self._open("rw") as db:
            db.execute("UPDATE wishes SET answered = ?, refused = ? WHERE id = ?", (time.time(), refused, wish))

    @contextlib.contextmanager
    def _open(self, mode: str) -> Iterator[sqlite3.Connection]:
        # A connection a call: they are rare, and none then outlives a run that is moved or deleted.
        with as_store_error(self._file), contextlib.closing(connect(self._file, mode)) as db:
            yield db
