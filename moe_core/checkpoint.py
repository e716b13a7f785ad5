"""A whole state in one file: tensors as safetensors, the rest as JSON in the same file's header. No pickle.

A state is what ``state_dict()`` gives: dicts, lists, numbers, text and tensors, nested. It is written to a
temporary file, synced and renamed, so a crash or a full disk leaves the checkpoint before it as it was. A CRC-32 of
the file stands in its header, so that bytes which changed on the disk are not loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1  # of the header; a file of a greater one is refused
SUFFIX = ".safetensors"
_SUM, _UNSUMMED = b'"crc32":"', "0" * 8  # before the sum's digits in the header, and what they count as in the sum


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: one line, with its path and why."""


def save(path: str | os.PathLike, state: dict[str, Any], about: dict[str, Any]) -> int:
    """Write ``state`` to ``path``, whole or not at all; returns its bytes.

    ``about`` is JSON to be read without the tensors (:func:`about`). Raises CheckpointError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    header = {"format": str(FORMAT), "about": json.dumps(about), "state": json.dumps(_encode(state, tensors)),
              "crc32": _UNSUMMED}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)  # and none above it: a run that was moved or deleted does not come back
        save_file(tensors, draft, metadata=header)
        at, crc = _crc32(draft)
        with open(draft, "rb+") as file:
            file.seek(at)
            file.write(crc.encode())
            file.flush()
            os.fsync(file.fileno())
        size = draft.stat().st_size
        readable_as(draft, path.parent)
        os.replace(draft, path)
        _sync_folder(path.parent)
        return size
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not saved; the previous checkpoint is intact: {_reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in ``path``, its tensors on ``device``. Raises CheckpointError where it is not whole."""
    with damage(path):
        header, tensors = _read(path, device)
        return dict(_decode(json.loads(header["state"]), tensors))


def about(path: str | os.PathLike) -> dict[str, Any]:
    """What :func:`save` was told about the state, without reading a tensor. Raises CheckpointError."""
    with damage(path):
        return dict(json.loads(_read(path, None)[0]["about"]))


def _read(path: str | os.PathLike, device: torch.device | str | None) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            header = file.metadata() or {}
            if "state" not in header or not header.get("format", "").isdecimal():
                raise CheckpointError(f"{path}: not a checkpoint of a run")
            if int(header["format"]) > FORMAT:
                raise CheckpointError(f"{path}: was written by a newer version (format {header['format']}, this one "
                                      f"knows up to {FORMAT}); update to load it")
            if device is not None and "crc32" in header and (crc := _crc32(path)[1]) != header["crc32"]:
                raise CheckpointError(f"{path}: is damaged: its CRC-32 is {crc} and was {header['crc32']} when saved")
            names = file.keys() if device is not None else ()
            return header, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read; truncated or not a checkpoint: {_reason(error)}") from error


def _crc32(path: str | os.PathLike) -> tuple[int, str]:
    """(where in the file the sum's digits stand, the sum), of a file that safetensors reads."""
    with open(path, "rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        at = header.find(_SUM) + len(_SUM)
        crc = zlib.crc32(size + header[:at] + _UNSUMMED.encode() + header[at + len(_UNSUMMED):])
        while part := file.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return len(size) + at, f"{crc:08x}"


@contextlib.contextmanager
def damage(path: str | os.PathLike) -> Iterator[None]:
    """A header that safetensors reads may still not be what was written: then a CheckpointError."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {error}") from error


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``; each tensor moves to ``tensors`` and leaves its name. Keys need not be text."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_encode(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a state holds no {type(value).__name__}: it would need pickle")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _decode(item, tensors) for key, item in value["items"]}
    return value


def readable_as(file: Path, folder: Path) -> None:
    """Let those read and write ``file`` who may read and write ``folder``; safetensors lets its owner alone."""
    with contextlib.suppress(OSError):  # a file system may know no such rights
        file.chmod(folder.stat().st_mode & 0o666)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last through a power cut, where the system can open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
