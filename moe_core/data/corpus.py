"""Where text comes from: documents one by one, and the side of the train/validation split each is on.

The embedded corpus is the source code of the standard library of the Python that runs this, so it is
there on every machine and needs no network. A user's own text comes through ``datasets``, streamed:
that leaves no second copy of the text in its cache.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import re
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_core.checked import first_line
from moe_core.config import DataConfig

EMBEDDED = "stdlib"
TEXT_SUFFIXES = (".txt", ".py", ".md")  # one document a file
ROW_SUFFIXES = (".jsonl", ".parquet")  # one document a row, in the column text_key
SUFFIXES = TEXT_SUFFIXES + ROW_SUFFIXES
_LISTED = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"

# Not the library itself: other people's packages, tests (not installed everywhere), this build's settings.
_SKIPPED_FOLDERS = re.compile(r"(site|dist)-packages|lib-dynload|tests?|idle_test|__pycache__|config-.*")
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*|(site|user)customize\.py")


class DataError(ValueError):
    """Text that cannot be used: one line with the field, the value and what would be right."""


def source_files(data: DataConfig) -> list[Path]:
    """The files behind ``data.dataset_name``, absolute, in a fixed order; folders are searched to the bottom.

    Hidden files and folders are left out unless they are named. Raises DataError.
    """
    if data.dataset_name == EMBEDDED:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _walk(root, _SKIPPED_FOLDERS.fullmatch)
                 if file.suffix == ".py" and not _SKIPPED_FILES.fullmatch(file.name)]
        if not files:
            raise DataError(f"{_name(data)}: this Python has no standard library sources in {root}; "
                            f"give the path of {_LISTED} files")
        return files
    path = Path(data.dataset_name).expanduser()
    if os.path.isdir(path):
        every = list(_walk(path, lambda name: name.startswith(".")))
    elif os.path.exists(path):  # and not path.exists(), which raises for what is no path: the text itself, say
        every = [path]
    else:
        found = sorted(glob.glob(str(path), recursive=True))
        every = [Path(name) for name in found if os.path.isfile(name)]
        if not every:
            raise DataError(f"{_name(data)}: there is no such file or folder; must be {EMBEDDED!r}, a "
                            f"folder, a file or a glob of {_LISTED} files, or a data set of the hub, 'owner/name'")
    files = [file.absolute() for file in every if file.suffix.lower() in SUFFIXES]
    if not files:
        suffixes = ", ".join(sorted({file.suffix or "no suffix" for file in every})) or "no file"
        raise DataError(f"{_name(data)}: must hold {_LISTED} files; found {suffixes}")
    return files


def documents(data: DataConfig) -> Iterator[str]:
    """The documents of the corpus, in the order of :func:`source_files` and of the rows in each file.

    Line ends of text files come as ``\\n``; blank documents and empty rows are left out. Raises DataError.
    """
    files = source_files(data)
    texts = _read_embedded(files) if data.dataset_name == EMBEDDED else _read_local(data, files)
    return (text for text in texts if text.strip())


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document is on the validation side: about ``fraction`` of all documents are.

    It depends on the document alone, so adding or removing others never moves it, and copies of one
    document are always on the same side.
    """
    return int.from_bytes(fingerprint(text)[:8], "big") < fraction * 2.0**64


def fingerprint(text: str) -> bytes:
    """16 bytes that stand for the document's content (BLAKE2b)."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def pieces(text: str, size: int) -> list[str]:
    """``text`` cut into pieces of at most ``size`` characters, at line ends where there are any."""
    return re.findall(rf"(?s).{{1,{size}}}(?:\n|\Z)|.{{1,{size}}}", text)


def _walk(root: Path, skipped) -> Iterator[Path]:
    """The files below ``root`` in one order everywhere; whatever is ``skipped`` by its name is left out."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not skipped(name))
        yield from (Path(folder, name) for name in sorted(files) if not skipped(name))


def _name(data: DataConfig) -> str:
    return f"dataset_name = {data.dataset_name!r}"


def _read_embedded(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace")


def _read_local(data: DataConfig, files: list[Path]) -> Iterator[str]:
    from datasets import IterableDataset

    # The readers make a lock file and an empty folder for a cache they never fill when streaming.
    with quiet_datasets(), tempfile.TemporaryDirectory() as unused_cache:
        for is_text, group in itertools.groupby(files, lambda file: file.suffix.lower() in TEXT_SUFFIXES):
            if is_text:
                yield from _read_text(data, list(group), IterableDataset, unused_cache)
            else:
                for file in group:
                    yield from _read_rows(data, file, IterableDataset, unused_cache)


def _read_text(data: DataConfig, files: list[Path], reader, cache: str) -> Iterator[str]:
    file = files[0]
    try:
        # from_text takes patterns, not paths: "[" in a file's name would silently match nothing.
        rows = iter(reader.from_text([glob.escape(str(file)) for file in files], sample_by="document",
                                     encoding="utf-8-sig", cache_dir=cache))
        for file in files:  # one row a file, in this order
            text = next(rows)["text"]
            if "\0" in text:
                raise DataError(f"{_name(data)}: {file} is binary, not text; leave it out")
            yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{_name(data)}: {file} is not UTF-8 text; convert it or leave it out") from error
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(data, file, "text", error) from error


def _read_rows(data: DataConfig, file: Path, reader, cache: str) -> Iterator[str]:
    if not file.stat().st_size:
        return  # an empty shard, which the JSON reader stumbles over
    is_parquet, path = file.suffix.lower() == ".parquet", glob.escape(str(file))
    try:
        if is_parquet:
            _check_column(data, file, reader.from_parquet(path, cache_dir=cache).column_names)
            # Only the column that is read; and an empty first row group would make the batch size 0.
            rows = reader.from_parquet(path, cache_dir=cache, columns=[data.text_key], batch_size=1024)
        else:
            rows = reader.from_json(path, cache_dir=cache)
        for table in rows.with_format("arrow").iter(batch_size=1024):
            _check_column(data, file, table.column_names)
            for text in table[data.text_key].to_pylist():
                if text is not None and not isinstance(text, str):
                    raise DataError(f"text_key = {data.text_key!r}: must be a column of text; in {file} it "
                                    f"holds {type(text).__name__}")
                yield text or ""
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(data, file, "Parquet" if is_parquet else "JSON lines", error) from error


def _unreadable(data: DataConfig, file: Path, kind: str, error: Exception) -> DataError:
    """What the readers raise has no common class and is about the file's content: one line for all of it."""
    return DataError(f"{_name(data)}: {file} cannot be read as {kind} ({first_line(error)})")


def _check_column(data: DataConfig, file: Path, columns: list[str]) -> None:
    if data.text_key not in columns:
        raise DataError(f"text_key = {data.text_key!r}: must be a column of {file}, which has "
                        f"{', '.join(map(repr, columns))}")


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars and no log lines beside our own; the user's settings are put back afterwards."""
    import datasets

    bars_were_off, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars_were_off:
            datasets.enable_progress_bars()
