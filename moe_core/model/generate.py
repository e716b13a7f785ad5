"""Tokens after a prompt, one by one, with the keys and values of earlier tokens kept.

Each row of a batch is as it would be by itself: rows are padded on the right, where causality hides the padding, and
each goes on at its own position. Nothing is dropped, whatever the config says of capacity: room is a share of a
training batch, and counting it over a single new token, or over the other prompts, would let a text depend on its
neighbours. There is no noise; a balance bias still takes part in which experts are picked.

Shapes: B rows, S positions, N tokens fed to a row at a time, D model width, G key and value heads, C head width,
V vocabulary, L routed blocks, K picks of a token, T tokens of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core.checked import ConfigError, is_integer, is_number, plain
from moe_core.model.cache import LayerCache
from moe_core.model.router import RouterControls, Routing
from moe_core.model.transformer import Transformer


@dataclass(frozen=True)
class Fed:
    """What the model has just read of each row: the whole prompt first, then a token at a time, each with its
    experts. A row that has ended is fed nothing more: its arrays are empty.
    """

    token_ids: tuple[np.ndarray, ...]  # int64 [T] of each row
    experts: tuple[np.ndarray, ...]  # int64 [L, T, K], first choice first; L is 0 for a dense model
    weights: tuple[np.ndarray, ...]  # float32 [L, T, K], what each expert's output is multiplied by


class Decoder:
    """A model in the middle of its texts: :meth:`feed` reads on and gives what may come next."""

    def __init__(self, model: Transformer, rows: int, length: int, temp: Tensor | float | None = None,
                 use_cache: bool = True):
        """``length``: tokens that a row may come to. ``temp``: the router's temperature; None is the config's final
        one. Without the cache everything is read again at each call: the reference.
        """
        config, router, weight = model.config, model.router_config, model.embed.weight
        self.model, self.device = model, weight.device
        temp = router.router_temp_final if temp is None else float(temp)
        # Room for every token in each expert, so that none is dropped.
        self.controls = RouterControls.constant(temp, 0.0, max(1, config.n_experts) / router.top_k, weight.device)
        self.caches = [LayerCache(rows, config.kv_heads, length, config.head_dim, weight, model.compute_dtype)
                       for _ in model.blocks] if use_cache else None
        self.texts: list[list[int]] = [[] for _ in range(rows)]

    def feed(self, news: Sequence[Sequence[int]]) -> tuple[Tensor, Fed]:
        """Read ``news``, tokens for each row: at first the prompts, then one or none. float32 logits [B, V] of what
        follows each row, and what was read.
        """
        first = not any(self.texts)
        for text, new in zip(self.texts, news, strict=True):
            text += new
        if first or self.caches is None:
            read = self.texts
            at_BN = torch.arange(max(map(len, read)), device=self.device).expand(len(read), -1)
        else:
            read = [text[-1:] for text in self.texts]  # the last one again where a row has ended: it changes nothing
            at_BN = torch.tensor([[len(text) - 1] for text in self.texts], device=self.device)
        width = max(map(len, read))
        tokens_BN = torch.tensor([[*row, *[0] * (width - len(row))] for row in read], device=self.device)
        x_BND, routings = self._blocks(tokens_BN, at_BN, prompt=first)
        last_B = torch.tensor([len(row) - 1 for row in read], device=self.device)
        x_BD = self.model.norm(x_BND[torch.arange(len(read), device=self.device), last_B])
        logits_BV = F.linear(x_BD, self.model.embed.weight.to(x_BD.dtype)).float()
        return logits_BV, self._fed(news, read, routings)

    def _blocks(self, tokens_BN: Tensor, at_BN: Tensor, prompt: bool) -> tuple[Tensor, list[Routing]]:
        model = self.model
        x_BND, rope = model.embed(tokens_BN), None
        if model.rope is None:
            x_BND = x_BND + model.positions(at_BN)
        else:
            rope = tuple(table[at_BN] for table in model.rope)
        x_BND, routings = x_BND.to(model.compute_dtype), []
        for i, block in enumerate(model.blocks):
            cache, bias_E = None, None
            if self.caches is not None:
                cache = self.caches[i]
                cache.at_B, cache.upto = (None, 0) if prompt else (at_BN[:, 0], max(map(len, self.texts)))
            if model.balance_bias is not None and i >= model.n_dense:
                bias_E = model.balance_bias[i - model.n_dense]
            x_BND, routing = block(x_BND, rope, self.controls, None, bias_E, None, cache)
            if routing is not None:
                routings.append(routing)
        return x_BND, routings

    def _fed(self, news: Sequence[Sequence[int]], read: Sequence[Sequence[int]], routings: list[Routing]) -> Fed:
        """Of what was read, the part that is new, row by row."""
        rows, width, top_k = len(read), max(map(len, read)), self.model.router_config.top_k
        shape, picked = (len(routings), rows, width, top_k), []
        for name in ("experts_TK", "weights_TK"):
            values = [getattr(routing, name) for routing in routings]
            table = torch.stack(values).cpu().numpy() if values else np.zeros((0,), np.int64)
            table = table.reshape(shape)
            picked.append(tuple(table[:, row, len(read[row]) - len(new) : len(read[row])]
                                for row, new in enumerate(news)))
        return Fed(tuple(np.array(new, np.int64) for new in news), *picked)


@torch.no_grad()
def stream(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = None, *,
           temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None, end_of_text: int | None = None,
           router_temp: Tensor | float | None = None, use_cache: bool = True) -> Iterator[Fed]:
    """Go on with each prompt (token ids, at least one), and give what is read as it is read: the prompts, then
    token after token until each row has ``max_new_tokens`` more or has come to ``end_of_text``, which it keeps.

    ``max_new_tokens`` None is as many as ``block_size`` leaves after the longest prompt; no text outgrows
    ``block_size``, since a model was never trained beyond it. ``temperature`` 0 takes the likeliest token; else the
    logits are divided by it, and one is drawn by ``generator`` (on the model's device) from the ``top_k`` likeliest,
    and from the fewest whose probabilities come to ``top_p`` (nucleus sampling, Holtzman et al. 2020). Both None is
    from all. Raises ValueError, before anything is read; ConfigError where experts choose.
    """
    length = _checked(model, prompts, max_new_tokens, temperature, top_k, top_p)
    new_tokens = length - max(map(len, prompts))
    decoder = Decoder(model, len(prompts), length, router_temp, use_cache)
    news, going = [list(map(int, prompt)) for prompt in prompts], [True] * len(prompts)
    for _ in range(new_tokens):
        logits_BV, fed = decoder.feed(news)
        yield fed
        drawn = sample(logits_BV, temperature, top_k, top_p, generator).tolist()
        news = [[token] if goes else [] for token, goes in zip(drawn, going, strict=True)]
        if not any(news):
            return
        going = [goes and token != end_of_text for token, goes in zip(drawn, going, strict=True)]
    yield decoder.feed(news)[1]


def generate(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = None,
             **how) -> list[list[int]]:
    """Each prompt with what follows it, as token ids; ``how`` is :func:`stream`'s."""
    texts: list[list[int]] = [[] for _ in prompts]
    for fed in stream(model, prompts, max_new_tokens, **how):
        for text, new in zip(texts, fed.token_ids, strict=True):
            text += new.tolist()
    return texts


def sample(logits_BV: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> Tensor:
    """One token for each row, int64 [B]; see :func:`stream`."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kept = logits_BV.topk(top_k, -1).indices
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(-1, kept, logits_BV.gather(-1, kept))
    probs_BV = logits_BV.softmax(-1)
    if top_p is not None:
        sorted_BV, order_BV = torch.sort(probs_BV, dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # of the likelier ones: the first token always stays
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.where(before_BV < top_p, 0.0))
    return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]


def _checked(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int | None, temperature: float,
             top_k: int | None, top_p: float | None) -> int:
    """The length that a row may come to. Raises ValueError for what cannot be."""
    size, vocab_size = model.config.block_size, model.config.vocab_size
    if model.config.n_experts and model.router_config.routing == "expert":
        raise ConfigError("routing = 'expert': must be 'token' for generation; experts choose among all tokens of a "
                          "text, and those to come are not written yet")
    if not prompts or not all(map(len, prompts)):
        raise ValueError("prompt: must have at least one token; a run's end-of-text token begins a new document")
    for prompt in prompts:
        if not all(0 <= token < vocab_size for token in prompt):
            raise ValueError(f"prompt: token ids must be 0 to {vocab_size - 1}")
    room = size - max(map(len, prompts))
    if room < 1:
        raise ValueError(f"prompt: {size - room:,} tokens; must be at most {size - 1:,}, as block_size = {size:,} "
                         "holds the prompt and what follows it")
    if max_new_tokens is not None and not is_integer(plain(max_new_tokens), 1, room):
        raise ValueError(f"max_new_tokens = {max_new_tokens!r}: must be an integer, 1 to {room:,} here: block_size "
                         f"= {size:,}, and the longest prompt has {size - room:,} tokens")
    if not is_number(plain(temperature)) or temperature < 0:
        raise ValueError(f"temperature = {temperature!r}: must be a number, 0 (the likeliest token) or more")
    if top_k is not None and not is_integer(plain(top_k), 1):
        raise ValueError(f"top_k = {top_k!r}: must be an integer, at least 1, or None")
    if top_p is not None and not (is_number(plain(top_p)) and 0 < top_p <= 1):
        raise ValueError(f"top_p = {top_p!r}: must be more than 0 and at most 1, or None")
    return size if max_new_tokens is None else size - room + max_new_tokens
