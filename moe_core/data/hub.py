"""The documents of a streamed data set, through connections that drop.

A dropped connection is opened again at the document after the last one read, after waits that grow; only when
several tries in a row bring nothing is it an error, and even then whoever reads again goes on from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moe_core.config import DataConfig
from moe_core.data.cache import cache_root, key_of, unwritable, write_whole
from moe_core.data.corpus import DataError, is_validation, quiet_datasets
from moe_core.data.pretrained import Pretrained
from moe_core.data.tokenise import joined

ROWS = 32  # read at a time: no more is read again where a connection drops
WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each new try; `datasets` itself reconnects 20 times within one
_NETWORK = {"aiohttp", "fsspec", "http", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "ssl", "urllib3"}


def open_hub(data: DataConfig, split: str):
    """The ``datasets.IterableDataset`` of a split of a data set on the hub; no code of its is run.

    Raises DataError where there is none, and what the connection raised where it dropped.
    """
    import datasets

    if tuple(map(int, datasets.__version__.split(".")[:2])) < (5, 1):
        # Before, the place of a stream that had been resumed once was wrong: documents were read twice, or never.
        raise DataError(f"dataset_name = {data.dataset_name!r}: streaming needs datasets 5.1 or newer, which resumes "
                        f"at the exact document; this is {datasets.__version__}: pip install -U datasets")
    try:
        with quiet_datasets():
            return datasets.load_dataset(data.dataset_name, data.dataset_config, split=split, streaming=True)
    except Exception as error:  # they have no common class
        if is_dropped(error):
            raise
        reason = _reason(error)
        if "BuilderConfig" in reason or "Config name" in reason:
            refused = f"dataset_config = {data.dataset_config!r}: must be one that {data.dataset_name!r} has"
        elif "split" in reason.lower():
            field = "split" if split == data.split else "val_split"
            refused = f"{field} = {split!r}: must be a split that {data.dataset_name!r} has"
        else:
            refused = (f"dataset_name = {data.dataset_name!r}: there is no such file or folder here, and the Hugging "
                       "Face hub does not give a data set of that name")
        raise DataError(f"{refused} ({reason})") from error


class Documents:
    """What ``open()``, a ``datasets.IterableDataset``, holds in the column ``text_key``.

    ``title`` names it in messages ("dataset_name = 'x'"); ``say`` hears of every new try.
    """

    def __init__(self, open: Callable[[], Any], title: str, text_key: str, say: Callable[[str], None] = print):
        self._open, self.title, self._text_key, self._say = open, title, text_key, say

    def read(self, epoch: int, cursor: Any, stop: threading.Event) -> Iterator[tuple[list[str], Any]]:
        """Texts, several at a time, and the cursor after them, from a cursor (None: the start) to the epoch's end.

        Blank ones are left out. Epochs after the first take the files in another order. Raises DataError, also
        when ``stop`` is set.
        """
        failures = 0
        while True:
            try:
                if stop.is_set():
                    raise DataError(f"{self.title}: was closed while it was read")
                rows = self._open()
                if rows.column_names:  # not every source knows them before it is read
                    self._check_column(rows.column_names)
                    rows = rows.select_columns([self._text_key])
                rows = rows.with_format("arrow")
                rows.set_epoch(epoch)
                if cursor is not None:
                    rows.load_state_dict(cursor)
                for table in rows.iter(batch_size=ROWS):
                    if stop.is_set():
                        raise DataError(f"{self.title}: was closed while it was read")
                    texts = self._texts(table)
                    cursor, failures = rows.state_dict(), 0
                    yield texts, cursor
                return
            except Exception as error:
                if isinstance(error, DataError):
                    raise
                reason = _reason(error)
                if not is_dropped(error):
                    raise DataError(f"{self.title}: cannot be read ({reason})") from error
                if failures == len(WAITS):
                    raise DataError(
                        f"{self.title}: the connection is gone ({reason}), also after {failures} retries over "
                        f"{sum(WAITS)} s; nothing is lost: start again, and training goes on at the very next document"
                    ) from error
                wait, failures = WAITS[failures], failures + 1
                self._say(f"{self.title}: the connection dropped ({reason}); retrying in {wait} s ({failures} of "
                          f"{len(WAITS)})")
                stop.wait(wait)

    def _texts(self, table) -> list[str]:
        self._check_column(table.column_names)
        texts = table[self._text_key].to_pylist()
        other = next((text for text in texts if text is not None and not isinstance(text, str)), None)
        if other is not None:
            raise DataError(f"text_key = {self._text_key!r}: must be a column of text; it holds {type(other).__name__}")
        return [text for text in texts if text and not text.isspace()]

    def _check_column(self, columns: list[str]) -> None:
        if self._text_key not in columns:
            raise DataError(f"text_key = {self._text_key!r}: must be a column of {self.title.split(' = ')[-1]}, which "
                            f"has {', '.join(map(repr, columns))}")


def is_dropped(error: BaseException) -> bool:
    """Whether trying again may help: a connection broke, was refused, took too long, or a server was busy."""
    if "OfflineModeIsEnabled" in f"{type(error).__name__} {error}":
        return False  # HF_HUB_OFFLINE is set
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
        return False
    if isinstance(error, OSError | EOFError) or type(error).__module__.split(".")[0] in _NETWORK:
        return True
    return error.__cause__ is not None and is_dropped(error.__cause__)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def validation_tokens(documents: Documents, tokenizer: Pretrained, data: DataConfig,
                      say: Callable[[str], None]) -> np.ndarray:
    """The tokens, 1-D, of the first ``eval_take`` documents of ``val_split``, or on the validation side of the hash.

    Chosen once and kept in the cache, so that they stay the same, and a run that is opened again reads nothing.
    Raises DataError.
    """
    path = cache_root() / "validation" / (key_of(
        data.dataset_name, data.dataset_config, data.val_split or [data.split, data.val_fraction], data.text_key,
        data.eval_take, tokenizer.digest) + ".npy")
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError):  # not there, or cut short
        chosen: list[str] = []
    read = data.eval_take if data.val_split else round(data.eval_take / data.val_fraction)
    say(f"{documents.title}: choosing {data.eval_take:,} validation documents once, from about {read:,}")
    for texts, _ in documents.read(0, None, threading.Event()):
        chosen += [text for text in texts if data.val_split or is_validation(text, data.val_fraction)]
        if len(chosen) >= data.eval_take:
            break
    if not chosen:
        raise DataError(f"val_fraction = {data.val_fraction}: puts no document of {documents.title} on the validation "
                        "side; must be larger, or name a val_split")
    tokens = joined(tokenizer.backend, [[text] for text in chosen[: data.eval_take]], tokenizer.end_of_text, np.uint32)
    try:
        write_whole(path, lambda file: np.save(file, tokens))
    except OSError as error:
        raise unwritable(error) from error
    return tokens
