"""What a run begins with where that is not fresh weights: kept in its own directory, so that it can go back to it.

``start.safetensors`` is the state before the first step, in a checkpoint's form: the weights, and an optimizer's state
where one was kept. ``tokenizer/`` is the tokenizer that came with them. A fork carries both on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_core import checkpoint
from moe_core.data.cache import cache_root, unwritable
from moe_core.data.pretrained import found, kept_folder
from moe_core.store import RunStore
from moe_core.trainer import Trainer, load_gathered

STATE, TOKENIZER = f"start{checkpoint.SUFFIX}", "tokenizer"
PARENT = "parent"  # the store's meta key: path, step, branch where they are known; how it became a run
FIRST = "first"  # in it, of a fork with changes: the first step whose state its config goes on from
WORDS = {"init_from": "weights from", "upcycle_from": "upcycled from", "init_from_hf": "weights from"}


@dataclass(frozen=True)
class Origin:
    """What a run is to begin with."""

    model: dict[str, Tensor]
    optimizer: dict | None
    parent: dict[str, Any]  # JSON values

    def begin(self, trainer: Trainer) -> Trainer:
        """``trainer`` at its first step, with these weights."""
        return _begun(trainer, {"model": self.model, "optimizer": self.optimizer})


def creation(begins: Origin | None, tokenizer: str | None) -> dict[str, Any]:
    """What ``RunStore.create`` needs to put into a new run's directory what it begins with, and the tokenizer of its
    config where that lies in the cache, which may be emptied.
    """
    def fill(folder: Path) -> None:
        try:
            if begins is not None:
                checkpoint.save(folder / STATE, {"model": begins.model, "optimizer": begins.optimizer}, begins.parent)
        except checkpoint.CheckpointError as error:
            raise OSError(str(error.__cause__)) from error  # the store names the run
        if (kept := _in_cache(tokenizer)) is not None:
            shutil.copytree(kept, folder / TOKENIZER)
    return {"meta": {} if begins is None else {PARENT: begins.parent}, "fill": fill}


def read(store: RunStore, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The state that a run began with: model, optimizer (None: fresh); None where it began with fresh weights.

    Raises CheckpointError where it is damaged or gone.
    """
    if not (store.path / STATE).exists() and "how" not in (store.get_meta(PARENT) or {}):
        return None
    return checkpoint.load(store.path / STATE, device)


def begun(trainer: Trainer, store: RunStore) -> Trainer:
    """A trainer at its first step, with what the run of ``store`` began with. Raises CheckpointError."""
    state = read(store, trainer.device)
    return trainer if state is None else _begun(trainer, state)


def inherited(store: RunStore) -> dict[str, Callable[[Path], None]]:
    """What ``RunStore.create`` needs for a run that goes on from this one's line."""
    def fill(folder: Path) -> None:
        for name, copied in ((STATE, shutil.copy2), (TOKENIZER, shutil.copytree)):
            if (store.path / name).exists():
                copied(store.path / name, folder / name)
    return {"fill": fill}


def restore_tokenizer(store: RunStore, name: str | None) -> None:
    """Put the run's own copy of the tokenizer ``name`` of its config back into the cache, if it is gone from there; and
    nowhere else, wherever the config of a run that a stranger made says. Raises DataError.
    """
    own, folder = store.path / TOKENIZER, _in_cache(name)
    if own.is_dir() and folder is not None:
        try:
            kept_folder(folder, lambda draft: shutil.copytree(own, draft))
        except OSError as error:
            raise unwritable(error) from error


def _in_cache(name: str | None) -> Path | None:
    """The folder of the cache that a tokenizer's name means, there or not; None for any other name."""
    folder = Path(found(name or ""))
    return folder if folder.parent == cache_root() / "tokenizers" else None


def words(parent: Mapping[str, Any]) -> str:
    """How a run came of its parent, before the parent's path."""
    return WORDS.get(parent.get("how"), "forked from")


def at_step(parent: Mapping[str, Any]) -> str:
    """Which step of the parent, behind its path."""
    return "" if parent.get("step") is None else f" at step {parent['step']}"


def _begun(trainer: Trainer, state: dict[str, Any]) -> Trainer:
    trainer.model.load_state_dict(state["model"])
    if state["optimizer"] is not None:
        load_gathered(trainer.optimizer, state["optimizer"])
    return trainer
