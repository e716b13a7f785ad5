"""The one way in: from a config to what a run trains and validates on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe_core.config import DataConfig, RunConfig
from moe_core.data.arrays import SUFFIXES as ARRAYS
from moe_core.data.arrays import array_digests, token_arrays
from moe_core.data.batches import Batches, load_tokens, validation_batches
from moe_core.data.cache import key_of
from moe_core.data.corpus import EMBEDDED, DataError
from moe_core.data.corpus import SUFFIXES as FILES
from moe_core.data.hub import Documents, open_hub, validation_tokens
from moe_core.data.prefetch import Prefetched
from moe_core.data.pretrained import Pretrained, load_pretrained, of_backend, settled_vocabulary
from moe_core.data.stream import Stream

_OTHER_FILES = (".json", ".csv", ".tsv", ".gz", ".zst", ".zip", ".arrow", ".html", ".pdf", ".npz", ".pt")


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


def kind_of(data: DataConfig) -> str:
    """What ``dataset_name`` means: "embedded", "array", "files" or "hub".

    A name of the hub is one or two words with at most one "/" between them, "owner/name", that no file or folder here
    has, and that does not end like a file that could be read here. All else is a path.
    """
    name = data.dataset_name
    if name == EMBEDDED:
        return "embedded"
    if name.lower().endswith(ARRAYS):
        return "array"
    if os.path.exists(os.path.expanduser(name)) or name.lower().endswith((*FILES, *_OTHER_FILES)):
        return "files"
    return "hub" if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) else "files"


def settled(config: RunConfig, say: Callable[[str], None], weights_vocab: int | None = None) -> RunConfig:
    """The config with what follows from its data filled in: the ``vocab_size`` of a tokenizer given by name.

    One that is ``weights_vocab``, that of the weights which the run begins with, stays. Settling twice changes nothing.
    Raises DataError.
    """
    _refuse_nameless(config.data)
    _refuse_unread(config.data)
    return config if config.model.vocab_size == weights_vocab else settled_vocabulary(config, say)


def open_data(config: RunConfig, pin: bool, say: Callable[[str], None]) -> Data:
    """The data of a run whose config is :func:`settled`; ``say`` hears what preparing it takes.

    ``pin`` puts batches in page-locked memory, ready ahead, for a GPU. Raises DataError.
    """
    data, block, batch = config.data, config.model.block_size, config.optim.batch_size
    _refuse_nameless(data)
    tokenizer = load_pretrained(data.tokenizer) if data.tokenizer else None
    if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(f"vocab_size = {config.model.vocab_size}: must be at least the {tokenizer.vocab_size:,} tokens "
                        f"of tokenizer = {data.tokenizer!r}")
    kind = kind_of(data)
    if kind == "hub":
        train, val = _streamed(config, tokenizer, pin, say)
        about = tokenizer.vocab_size, tokenizer.name, tokenizer.end_of_text
    else:
        if kind == "array":
            tokens, val = token_arrays(data, config.model.vocab_size, say)
            about = ((tokenizer.vocab_size, tokenizer.name, tokenizer.end_of_text) if tokenizer
                     else (config.model.vocab_size, None, None))
        else:
            found = load_tokens(data, config.model.vocab_size, say, tokenizer)
            tokens, val = found.train, found.val
            about = found.vocab_size, str(found.tokenizer_path), found.end_of_text
        train = Batches(tokens, block, batch, config.seed, pin)
        if pin:  # without a GPU a batch is copied from the mapped file in microseconds
            train = Prefetched(train, data.prefetch_factor * max(1, data.num_workers))
    return Data(train, validation_batches(val, block, batch, config.eval_iters), *about)


def fingerprint(config: RunConfig, say: Callable[[str], None]) -> str:
    """What names the tokens that a run whose config is :func:`settled` reads: other text, another tokenizer or other
    ids have another one, the same in another place the same. Of a stream it is the tokenizer alone. Raises DataError.
    """
    data = config.data
    tokenizer, kind = load_pretrained(data.tokenizer) if data.tokenizer else None, kind_of(data)
    if kind in ("embedded", "files"):
        return load_tokens(data, config.model.vocab_size, say, tokenizer).key
    ids = array_digests(data, config.model.vocab_size, say) if kind == "array" else []
    return key_of(kind, ids, tokenizer.digest if tokenizer else None)


def tokenizer_of(config: RunConfig, say: Callable[[str], None]) -> Pretrained | None:
    """The tokenizer of a run whose config is :func:`settled`, without its data; None where only ids are known."""
    from tokenizers import Tokenizer

    if config.data.tokenizer:
        return load_pretrained(config.data.tokenizer)
    if kind_of(config.data) == "array":
        return None
    found = load_tokens(config.data, config.model.vocab_size, say)
    return of_backend(str(found.tokenizer_path), Tokenizer.from_file(str(found.tokenizer_path)), found.end_of_text)


def _refuse_nameless(data: DataConfig) -> None:
    if kind_of(data) == "hub" and not data.tokenizer:
        raise DataError(f"dataset_name = {data.dataset_name!r}: there is no such file or folder here; as a data set of "
                        "the hub it is streamed, and needs a tokenizer by name (tokenizer = 'gpt2', say)")


def _refuse_unread(data: DataConfig) -> None:
    """Nothing that was asked of the data goes unread in silence."""
    kind = kind_of(data)
    for kinds, what, names in (("array", "an array", ("val_data",)),
                               ("hub", "a data set on the hub", ("dataset_config", "split", "val_split"))):
        for name in names:
            value, default = getattr(data, name), getattr(DataConfig, name)
            if kind != kinds and value != default:
                raise DataError(f"{name} = {value!r}: must be {default!r} for dataset_name = {data.dataset_name!r}, "
                                f"which is not {what}")


def _streamed(config: RunConfig, tokenizer: Pretrained, pin: bool, say: Callable[[str], None]):
    """Training batches and the validation tokens of a data set on the hub."""
    data = config.data

    def documents(split: str) -> Documents:
        return Documents(lambda: open_hub(data, split), f"dataset_name = {data.dataset_name!r}", data.text_key, say)
    val = validation_tokens(documents(data.val_split or data.split), tokenizer, data, say)
    train = Stream(
        documents(data.split), tokenizer, block_size=config.model.block_size, batch_size=config.optim.batch_size,
        shuffle_buffer=data.shuffle_buffer, seed=config.seed, num_workers=data.num_workers,
        val_fraction=None if data.val_split else data.val_fraction, prefetch_factor=data.prefetch_factor, pin=pin,
        say=say)
    return train, val
