"""Token ids that somebody else made: one long 1-D array in a .npy or .bin file, mapped, not read."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_core.config import DataConfig
from moe_core.data.cache import cache_root, key_of, write_whole
from moe_core.data.corpus import DataError

SUFFIXES = (".npy", ".bin")
CHUNK = 1 << 24  # tokens checked at a time


def token_arrays(data: DataConfig, vocab_size: int, say: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens, 1-D, every id below ``vocab_size``. Raises DataError.

    Validation is the array in ``val_data``, or the last ``val_fraction`` of the training one.
    """
    train, _ = _open(data, "dataset_name", vocab_size, say)
    if data.val_data is not None:
        return train, _open(data, "val_data", vocab_size, say)[0]
    at = len(train) - int(len(train) * data.val_fraction)
    return train[:at], train[at:]


def array_digests(data: DataConfig, vocab_size: int, say: Callable[[str], None]) -> list[str]:
    """What names the content of the training array, and of the one in ``val_data``. Raises DataError."""
    fields = ["dataset_name", *(["val_data"] if data.val_data is not None else [])]
    return [_open(data, field, vocab_size, say)[1] for field in fields]


def _open(data: DataConfig, field: str, vocab_size: int, say: Callable[[str], None]) -> tuple[np.ndarray, str]:
    """The array, and a digest of its ids, which is made where they are checked: once, while the file stays the same."""
    path = Path(getattr(data, field)).expanduser().absolute()

    def refused(what: str) -> DataError:
        return DataError(f"{field} = {getattr(data, field)!r}: {what}")
    if path.suffix.lower() not in SUFFIXES:
        raise refused(f"must be an array of token ids, {' or '.join(SUFFIXES)}")
    try:
        stat = path.stat()
        if path.suffix.lower() == ".npy":
            tokens = np.lib.format.open_memmap(path, mode="r")
        else:
            size = np.dtype(data.token_dtype).itemsize
            if stat.st_size % size:
                raise refused(f"{stat.st_size:,} bytes are not a multiple of the {size} of a "
                              f"{data.token_dtype}; is token_dtype right?")
            tokens = np.memmap(path, data.token_dtype, mode="r") if stat.st_size else np.empty(0, data.token_dtype)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise refused("there is no such file") from error
    except OSError as error:
        raise refused(f"cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, TypeError, OverflowError) as error:  # of the last two: a shape that none can have
        reason = str(error).splitlines()[0]
        raise refused(f"is not a .npy file of plain numbers ({reason})") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise refused(f"must be a 1-D array of integers, token ids; it is {tokens.ndim}-D of {tokens.dtype}")
    if not len(tokens):
        raise refused("must hold token ids; it is empty")
    stamp = cache_root() / "stamps" / key_of("ids", str(path), stat.st_size, stat.st_mtime_ns, str(tokens.dtype))
    largest, digest = stamp.read_text().split() if stamp.is_file() else (vocab_size, "")
    if int(largest) >= vocab_size:
        if len(tokens) > CHUNK:
            say(f"Checking the {len(tokens):,} token ids of {path} once")
        largest, digest = _checked(tokens, vocab_size, refused)
        if path.suffix.lower() == ".bin" and len(tokens) > 1 and not tokens[1:CHUNK:2].any():
            raise refused(f"every second id is 0, as where ids of a wider type are read as {data.token_dtype}; is "
                          "token_dtype right?")
        with contextlib.suppress(OSError):  # where the cache cannot be written they are checked every time
            write_whole(stamp, lambda file: file.write(f"{largest} {digest}".encode()))
    return tokens, digest


def _checked(tokens: np.ndarray, vocab_size: int, refused: Callable[[str], DataError]) -> tuple[int, str]:
    """The largest id and the digest; raises what ``refused`` makes for the first that is not in the vocabulary."""
    largest, digest = 0, hashlib.blake2b(str(tokens.dtype).encode(), digest_size=10)
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocab_size:
            at = int(np.flatnonzero((chunk < 0) | (chunk >= vocab_size))[0])
            raise refused(f"holds token id {int(chunk[at])} at position {start + at:,}; must be 0 to {vocab_size - 1}, "
                          f"since vocab_size = {vocab_size}")
        largest = max(largest, high)
        digest.update(np.ascontiguousarray(chunk).data)
    return largest, digest.hexdigest()
