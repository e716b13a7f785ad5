"""The one way in: from a config to what a run trains and validates on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe_core.config import RunConfig
from moe_core.data.batches import Batches, load_tokens, validation_batches


class TrainingBatches(Protocol):
    """Batches without end, from a place that can be saved and gone back to."""

    def next(self) -> Tensor:
        """The next batch, int64 [B, S + 1]. After an exception the next call goes on from the same place."""

    def state_dict(self) -> dict:
        """The place where :meth:`next` goes on: dicts, lists, numbers, text and tensors, which it may share."""

    def load_state_dict(self, state: dict) -> None:
        """Go on at exactly that place."""

    def close(self) -> None:
        """Let threads, processes and connections go. Safe to call twice."""


@dataclass(frozen=True)
class Data:
    """What a run reads: token windows [B, S + 1], inputs ``[:, :-1]`` and targets ``[:, 1:]``.

    ``validation`` is fixed, and shares no document with ``train``. ``vocab_size`` counts the tokenizer's tokens,
    which may be fewer than the model's; ``tokenizer`` is the path of a tokenizer.json, or the name or folder that
    was given for AutoTokenizer, and ``end_of_text`` the id after each document; both None where only ids are known.
    """

    train: TrainingBatches
    validation: list[Tensor]
    vocab_size: int
    tokenizer: str | None
    end_of_text: int | None


def open_data(config: RunConfig, pin: bool, say: Callable[[str], None]) -> Data:
    """The data of a run whose config is :func:`settled`; ``say`` hears what preparing it takes.

    ``pin`` puts batches in page-locked memory, for a GPU. Raises DataError.
    """
    block, batch = config.model.block_size, config.optim.batch_size
    tokens = load_tokens(config.data, config.model.vocab_size, say)
    train = Batches(tokens.train, block, batch, config.seed, pin)
    validation = validation_batches(tokens.val, block, batch, config.eval_iters)
    return Data(train, validation, tokens.vocab_size, str(tokens.tokenizer_path), 0)


def settled(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """The config with what follows from its data filled in. Settling twice changes nothing. Raises DataError."""
    return config
