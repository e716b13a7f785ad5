"""Copies of a trainer's state in host memory: to go back to at once, and to save while training goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SNAPSHOT_BYTES = 256 << 20  # of host memory for all snapshots; the newest is kept whatever its size


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy in host memory of the trainer after ``step``, a row of its own of ``branch``."""

    branch: int
    step: int
    state: dict[str, Any]
    bytes: int


class Snapshots:
    """The newest few, oldest first. Whoever holds one keeps it, also when it has gone from here."""

    def __init__(self):
        self._kept: list[Snapshot] = []

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(tuple(self._kept))

    def take(self, branch: int, step: int, state: dict[str, Any]) -> Snapshot:
        """Make a copy of ``state`` the newest, or the one of it that is there; the oldest go where memory is short."""
        newest = next((s for s in self._kept if (s.branch, s.step) == (branch, step)), None)
        kept = [s for s in self._kept if s is not newest]
        if newest is None:
            size = _bytes(state)
            while kept and sum(s.bytes for s in kept) + size > SNAPSHOT_BYTES:
                del kept[0]
            self._kept = kept  # before the copy, which may need their memory
            newest = Snapshot(branch, step, copied(state), size)
        self._kept = [*kept, newest]
        return newest


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A deep copy with every tensor in host memory, whole when this returns."""
    devices: set[torch.device] = set()
    copy = _copied(state, devices)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copy


def _copied(value: Any, devices: set[torch.device]) -> Any:
    if isinstance(value, Tensor):
        if value.is_cuda:
            devices.add(value.device)
        return _room(value).copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        return {key: _copied(item, devices) for key, item in value.items()}
    return [_copied(item, devices) for item in value] if isinstance(value, list | tuple) else value


def _room(like: Tensor) -> Tensor:
    """Host memory for a copy. A GPU writes into page-locked memory by itself; torch keeps that for the next one."""
    if like.is_cuda:
        with contextlib.suppress(RuntimeError):  # some systems lock little of it; then the host copies
            return torch.empty_like(like, device="cpu", pin_memory=True)
    return torch.empty_like(like, device="cpu")


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_bytes, items))
