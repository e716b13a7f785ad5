"""A run's tables as CSV or Parquet, for any other tool; also of a run that is being trained, or an imported one."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moe_core import frames
from moe_core.store import RunStore

SUFFIXES = (".csv", ".parquet")
TABLES = ("metrics", "shares", "events")
_TEXT = ("name", "mode", "text")  # what an event says, where it says that
_NUMBER = ("value", "over")


class ExportError(RuntimeError):
    """A table that cannot be written: one line, with its path and why."""


def export(run_path: str | os.PathLike, out: str | os.PathLike, branch: str | None = None, *,
           table: str = "metrics", per_layer: bool = False, suffix: str = ".csv") -> Path:
    """Write tables of a run and return where: a file by the suffix of ``out``, or a folder with all three tables.

    ``branch``: by name, with what it inherited; None is the current one. An ``out`` that ends in .csv or .parquet
    holds one ``table``: "metrics" (a row a step, its index: the branch whose row it is, then the metrics, float32,
    nothing where a step has no such metric; those per layer too with ``per_layer``), "shares" (a row for each step,
    layer and expert: demand and served) or "events" (a row each: step, kind, branch, asked and applied in UTC, what
    most of them say, and all that they say as JSON in ``payload``). Any other ``out`` is a folder, made where it is
    missing, in which metrics, shares and events are written, each with ``suffix``.

    Every file is written beside its place and renamed. Nothing waits for a writer of the run, nor it for this.
    Raises ExportError, or StoreError where ``run_path`` is no run or has no such branch.
    """
    out = Path(out)
    single = out.suffix.lower() in SUFFIXES
    if table not in TABLES:
        raise ExportError(f"table = {table!r}: must be one of {', '.join(map(repr, TABLES))}")
    if suffix not in SUFFIXES:
        raise ExportError(f"suffix = {suffix!r}: must be one of {', '.join(map(repr, SUFFIXES))}")
    if out.suffix and not single and not out.is_dir():
        raise ExportError(f"{out}: must end in {' or '.join(SUFFIXES)}, or name a folder for all tables")
    _need("pandas", out)
    if (out.suffix.lower() if single else suffix) == ".parquet":
        _need("pyarrow", out)
    with RunStore.open(run_path) as store:
        line = store.branch_id(branch)
        make = {"metrics": lambda: [_metrics(store, line, per_layer)],
                "shares": lambda: (frames.experts_of([part]) for part in store.read_parts(line)),
                "events": lambda: [_events(store, line)]}
        if single:
            _write(make[table](), out)
        else:
            for name in TABLES:
                _write(make[name](), out / f"{name}{suffix}")
    return out


def _need(package: str, out: Path) -> None:
    try:
        __import__(package)
    except ImportError:
        raise ExportError(f"{out}: needs {package}, which is not installed: pip install {package}") from None


def _metrics(store: RunStore, line: int, per_layer: bool):
    frame = frames.metrics(store, line, 0, per_layer)
    names = {branch.id: branch.name for branch in store.branches()}
    owner = np.empty(len(frame), object)
    for branch, upto in store.lineage(line):  # the line itself, then whose rows it shows up to where it forked
        owner[frame.index <= upto] = names[branch]
    frame.insert(0, "branch", owner)
    return frame


def _events(store: RunStore, line: int):
    """The events with columns of one type each, so that any tool can read them."""
    import pandas as pd

    rows = store.read_events(line)
    frame = pd.DataFrame({key: [row[key] for row in rows] for key in ("step", "kind", "branch", "asked", "applied")})
    for column in ("asked", "applied"):
        frame[column] = pd.to_datetime(frame[column].astype(float), unit="s", utc=True)
    for key in _TEXT:
        frame[key] = pd.Series([said if isinstance(said := row["payload"].get(key), str) else None for row in rows],
                               dtype=object)
    for key in _NUMBER:
        frame[key] = pd.Series([said if isinstance(said := row["payload"].get(key), int | float) else math.nan
                                for row in rows], dtype=float)
    frame["payload"] = [json.dumps(row["payload"], ensure_ascii=False) for row in rows]
    return frame


def _write(parts: Iterable, path: Path) -> None:
    """One table, which comes as frames of the same columns: all shares of a long run are more than memory holds."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".csv":
            for k, frame in enumerate(parts):
                frame.to_csv(draft, mode="a", header=k == 0, index=frame.index.name is not None, encoding="utf-8")
        else:
            _write_parquet(parts, draft)
        os.replace(draft, path)
    except OSError as error:
        raise ExportError(f"{path}: not written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _write_parquet(parts: Iterable, draft: Path) -> None:
    from pyarrow import Table, parquet

    with contextlib.ExitStack() as stack:
        file = None
        for frame in parts:
            table = Table.from_pandas(frame, preserve_index=frame.index.name is not None)
            file = file or stack.enter_context(parquet.ParquetWriter(draft, table.schema))
            file.write_table(table)
