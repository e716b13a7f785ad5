"""What a run writes after a prompt, beside its training: ``run.generate()`` and ``run.stream()`` do this.

The weights of one step are copied, as a probe does, and go on with the text in a model of their own: no weight, no
random number and no place in the data of the run moves by it. How tokens are drawn is in ``moe_core.model.generate``.

L layers with experts, T tokens of the prompt and of what follows, K picks of a token.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_core.checked import is_integer, plain
from moe_core.config import RunConfig
from moe_core.data import tokenizer_of
from moe_core.data.pretrained import Pretrained
from moe_core.inspect import Inspection
from moe_core.model import generate as decoding
from moe_core.probe import built, weights_of
from moe_core.token_text import TokenText, classes_of, pieces_of
from moe_core.trainer import resolve_device


@dataclass(frozen=True, eq=False)
class Generation:
    """A text that a run went on with, from the weights after ``step``. All arrays are read-only.

    ``text`` is the prompt and what follows it, without special tokens; ``token_ids`` [T] have all. While a text is
    being written (``Run.stream``) the newest token is the last of them.
    """

    step: int
    text: str
    continuation: str  # what follows the prompt
    token_ids: np.ndarray  # int64 [T]
    n_prompt: int  # of these are the prompt's
    experts: np.ndarray  # int64 [L, T, K], first choice first; L is 0 for a dense model
    weights: np.ndarray  # float32 [L, T, K], what each expert's output is multiplied by
    n_experts: int
    blocks: tuple[int, ...]  # the number of each layer's block in the model
    tokenizer: TokenText

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Generation(step {self.step}, {self.n_prompt} + {len(self.token_ids) - self.n_prompt} tokens: " \
               f"{self.text!r})"

    def inspection(self) -> Inspection:
        """The same to look into: :class:`~moe_core.inspect.Inspection`. Raises ValueError for a dense model."""
        if not self.n_experts:
            raise ValueError("inspection: a dense model has no experts to ask")
        ids, n = self.token_ids.tolist(), len(self.token_ids)
        token_bytes = tuple(map(self.tokenizer.bytes_of, ids))
        pieces, one = tuple(pieces_of(token_bytes)), np.zeros(n, np.int64)
        return Inspection(
            step=self.step, n_experts=self.n_experts, token_ids=self.token_ids, token_bytes=token_bytes, pieces=pieces,
            classes=classes_of(pieces, list(map(self.tokenizer.is_special, ids))), documents=one, windows=one,
            kinds=(None,), experts=self.experts, weights=self.weights, kept=np.ones(self.experts.shape, bool),
            blocks=self.blocks)


def generate(run, prompt, max_new_tokens: int | None = None, step: int | str | None = None, **how):
    """See ``Run.generate``, which is this; ``run`` may also be a :class:`~moe_core.probe.Saved`."""
    many = isinstance(prompt, Sequence) and not isinstance(prompt, str) and not _is_ids(prompt)
    *_, writers = _stream(run, list(prompt) if many else [prompt], max_new_tokens, step, **how)
    texts = [writer.written() for writer in writers]
    return texts if many else texts[0]


def stream(run, prompt, max_new_tokens: int | None = None, step: int | str | None = None,
           **how) -> Iterator[Generation]:
    """See ``Run.stream``, which is this."""
    for [writer] in _stream(run, [prompt], max_new_tokens, step, **how):
        yield writer.written()


def _stream(run, prompts: list, max_new_tokens: int | None, step: int | str | None, *, temperature: float = 1.0,
            top_k: int | None = None, top_p: float | None = None, seed: int = 0) -> Iterator[list[_Writer]]:
    config, tokenizer = run.config, _tokenizer(run)
    if not is_integer(seed := plain(seed), 0, 2**63 - 1):
        raise ValueError(f"seed = {seed!r}: must be an integer, 0 to {2**63 - 1}")
    ids = [_encoded(prompt, tokenizer) for prompt in prompts]
    weights = weights_of(run, step)
    generator = torch.Generator(resolve_device(config)).manual_seed(seed)
    feeding = decoding.stream(
        built(config, weights), ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        generator=generator, end_of_text=None if tokenizer is None else tokenizer.end_of_text,
        router_temp=weights.knobs.get("router_temp"))
    writers = [_Writer(config, weights.step, len(row), tokenizer) for row in ids]
    for fed in feeding:
        for row, writer in enumerate(writers):
            writer.parts.append((fed.token_ids[row], fed.experts[row], fed.weights[row]))
        yield writers


class _Writer:
    """One text on its way."""

    def __init__(self, config: RunConfig, step: int, n_prompt: int, tokenizer: Pretrained | None):
        self.config, self.step, self.n_prompt, self.tokenizer = config, step, n_prompt, tokenizer
        self.shown = TokenText(None if tokenizer is None else tokenizer.backend)
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def written(self) -> Generation:
        ids, experts, weights = (np.concatenate([part[i] for part in self.parts], axis)
                                 for i, axis in ((0, 0), (1, 1), (2, 1)))
        self.parts = [(ids, experts, weights)]
        for array in self.parts[0]:
            array.flags.writeable = False
        text, before = self._text(ids), self._text(ids[: self.n_prompt])
        model = self.config.model
        return Generation(
            step=self.step, text=text, token_ids=ids, n_prompt=self.n_prompt, experts=experts, weights=weights,
            # A character whose bytes began in the prompt belongs to neither side alone.
            continuation=text[len(before):] if text.startswith(before) else self._text(ids[self.n_prompt:]),
            n_experts=model.n_experts, blocks=tuple(range(model.n_layer - model.n_moe_layer, model.n_layer)),
            tokenizer=self.shown)

    def _text(self, ids: np.ndarray) -> str:
        if self.tokenizer is None:
            return "".join(self.shown.bytes_of(token).decode() for token in ids.tolist())
        return self.tokenizer.backend.decode(ids.tolist(), skip_special_tokens=True)


_tokenizers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _tokenizer(run) -> Pretrained | None:
    if run not in _tokenizers:
        _tokenizers[run] = tokenizer_of(run.config, print)
    return _tokenizers[run]


def _is_ids(prompt) -> bool:
    return isinstance(prompt, Sequence | np.ndarray) and len(prompt) > 0 and all(
        isinstance(token, int | np.integer) for token in prompt)


def _encoded(prompt, tokenizer: Pretrained | None) -> list[int]:
    """Token ids of a text; an empty one is the beginning of a document."""
    if _is_ids(prompt):
        return [int(token) for token in prompt]
    if not isinstance(prompt, str):
        raise ValueError(f"prompt = {repr(prompt)[:60]}: must be a text, token ids, or a list of those")
    if tokenizer is None:
        raise ValueError("prompt: this run has no tokenizer, its data are token ids; give those, or name a tokenizer "
                         "in the config")
    return tokenizer.backend.encode(prompt, add_special_tokens=False).ids or [tokenizer.end_of_text]
