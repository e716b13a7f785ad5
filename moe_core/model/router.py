"""The router: who goes where, with what weight, at what loss. All of it in float32.

Routing is data: :func:`route` turns raw logits into a frozen :class:`Routing` and touches nothing else, so
that it can be checked by hand, asked "what if", and recomputed without counting twice.

Shapes: B sequences, T tokens of all of them, D model width, E experts, K picks of a token, C tokens
that an expert takes where experts choose, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_core.config import RouterConfig


class RouterControls(NamedTuple):
    """What a knob can turn, as 0-D float32 tensors on the model's device.

    Tensors, because a Python number read in forward would recompile a compiled model at each change.
    """

    temp: Tensor  # > 0, divides the logits
    noise_std: Tensor  # >= 0, scales the selection noise
    capacity_factor: Tensor | None  # > 0, an expert's room in units of the fair share; None when dropless

    @classmethod
    def constant(cls, temp: float, noise_std: float, capacity_factor: float,
                 device: torch.device | None = None) -> RouterControls:
        """Controls that hold the given numbers."""
        return cls(*(torch.full((), float(value), device=device, dtype=torch.float32)
                     for value in (temp, noise_std, capacity_factor)))


@dataclass(frozen=True)
class RouterStats:
    """What one layer did with one batch, detached; with a leading L after :meth:`stack`."""

    demand_E: Tensor  # float32, assignments that asked for each expert; they add up to T * K
    served_E: Tensor  # float32, assignments that got in
    top1_p: Tensor  # float32 0-D, mean over tokens of the probability of the first pick
    entropy: Tensor  # float32 0-D, mean over tokens of the entropy of the probabilities, in nats
    no_expert: Tensor  # float32 0-D, share of the tokens that no expert took

    @staticmethod
    def stack(layers: Sequence[RouterStats]) -> RouterStats:
        """The statistics of L layers as one, each tensor with a leading dimension L."""
        return RouterStats(*(torch.stack([getattr(s, f.name) for s in layers]) for f in fields(layers[0])))


@dataclass(frozen=True)
class Routing:
    """One layer's decision for T tokens. Picks are in order of preference, the first choice at K index 0.

    Where experts choose, K is E: all experts in the token's own order, kept where the expert took it.
    """

    experts_TK: Tensor  # int64, the experts picked; no expert twice in a row
    weights_TK: Tensor  # float32, what each expert's output is multiplied by; carries the gradient
    kept_TK: Tensor  # bool, False where the expert was full: a dropped assignment adds nothing
    balance_loss: Tensor  # float32 0-D, 1 when balanced, E / K when collapsed
    sequence_loss: Tensor  # float32 0-D, the balance loss of each sequence by itself, then their mean
    z_loss: Tensor  # float32 0-D, of the raw logits
    stats: RouterStats
    logits_TE: Tensor  # float32, the raw logits, detached: what to ask "what if" of
    tokens_EC: Tensor | None = None  # int64, the tokens that each expert took; None where tokens choose


def draw_noise(kind: str, shape: Sequence[int], generator: torch.Generator | None = None,
               device: torch.device | None = None) -> Tensor:
    """Standard selection noise in float32: "gumbel" is Gumbel(0, 1), "gaussian" is N(0, 1).

    ``generator`` must live on ``device``; None is torch's global one. Raises ValueError for another kind.
    """
    noise = torch.empty(tuple(shape), device=device, dtype=torch.float32)
    if kind == "gaussian":
        return noise.normal_(generator=generator)
    if kind == "gumbel":
        return noise.exponential_(generator=generator).log_().neg_()  # finite: torch draws no 0
    raise ValueError(f"noise kind = {kind!r}: must be 'gumbel' or 'gaussian'")


def within_capacity(picks_TKE: Tensor, capacity: Tensor) -> Tensor:
    """Who gets in, [T, K] bool: first choices before second, earlier tokens before later.

    ``picks_TKE`` is bool and one-hot over E; ``capacity`` is the number of assignments an expert takes.
    """
    T, K, E = picks_TKE.shape
    queue_NE = picks_TKE.transpose(0, 1).reshape(K * T, E)
    place_N = (queue_NE.cumsum(0) * queue_NE).sum(-1)  # from 1, in the queue of the assignment's own expert
    return (place_N <= capacity).view(K, T).t()


def capacity_of(controls: RouterControls, T: int, E: int, top_k: int) -> int:
    """Tokens that an expert takes where experts choose, ceil(capacity_factor * T * K / E), 1 to T. It reads the factor
    on the host, because shapes follow it: no wait where the factor is kept there.
    """
    # Less a thousandth, or the float32 rounding of a factor such as 1.2 would buy a whole place.
    return min(T, max(1, math.ceil(float(controls.capacity_factor) * T * top_k / E - 1e-3)))


class _Picks(NamedTuple):
    experts_TK: Tensor
    kept_TK: Tensor
    demand_BE: Tensor  # float32, as served_E
    served_E: Tensor
    tokens_EC: Tensor | None


def _tokens_choose(scores_TE: Tensor, controls: RouterControls, top_k: int, dropless: bool, B: int) -> _Picks:
    T, E = scores_TE.shape
    # The largest of a few is half as long to find without topk, and a compiler can do it on the way.
    experts_TK = scores_TE.argmax(-1, keepdim=True) if top_k == 1 else scores_TE.topk(top_k, dim=-1).indices
    # Compared with a range: bincount would wait for the device, and break a compiled graph.
    picks_TKE = experts_TK.unsqueeze(-1) == torch.arange(E, device=experts_TK.device)
    demand_BE = picks_TKE.unflatten(0, (B, -1)).sum((1, 2)).float()
    if dropless:
        return _Picks(experts_TK, torch.ones_like(experts_TK, dtype=torch.bool), demand_BE, demand_BE.sum(0), None)
    # On the device, and less a thousandth as in capacity_of.
    capacity = torch.ceil(controls.capacity_factor * (T * top_k / E) - 1e-3).clamp_min(1)
    kept_TK = within_capacity(picks_TKE, capacity)
    return _Picks(experts_TK, kept_TK, demand_BE, (picks_TKE & kept_TK.unsqueeze(-1)).sum((0, 1)).float(), None)


def _experts_choose(scores_TE: Tensor, preferences_TE: Tensor, capacity: int, B: int) -> _Picks:
    tokens_CE = scores_TE.topk(capacity, dim=0).indices
    taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(0, tokens_CE, True)
    experts_TE = preferences_TE.argsort(dim=-1, descending=True, stable=True)
    taken_BE = taken_TE.unflatten(0, (B, -1)).sum(1).float()
    return _Picks(experts_TE, taken_TE.gather(1, experts_TE), taken_BE, taken_BE.sum(0), tokens_CE.t())


def route(logits_TE: Tensor, controls: RouterControls, noise_TE: Tensor | None = None,
          bias_E: Tensor | None = None, *, top_k: int, router_scores: str = "softmax",
          norm_topk_prob: bool = False, dropless: bool = True, routing: str = "token",
          n_sequences: int = 1) -> Routing:
    """Route T tokens, of ``n_sequences`` equally long sequences one after another, by their raw float32 logits.

    Tempered logits t = logits / temp give the scores p, free of noise and bias: softmax(t), or sigmoid(t), each
    expert's by itself. The K largest of t + noise_std * noise + bias win, which without the two is the order of p
    either way; noise and bias are in units of the tempered logit with sigmoid too (DeepSeek-V3 adds its bias to
    sigmoid(t)). Weights are p, or with ``norm_topk_prob`` p divided by its sum over the K. Without ``dropless``
    an expert takes ceil(capacity_factor * T * K / E) assignments.

    With ``routing`` "expert" (Zhou et al. 2022) each expert takes that many tokens, those of the largest
    log p + noise_std * noise of its own, at the weight p; a token may get none or many. Demand and served are both
    what was taken. Which tokens an expert takes also depends on tokens that come later in the text.

    Losses and statistics read the scores as probabilities q = p / sum_e p, which is p itself with softmax. The
    balance loss is E * sum_e demand share_e * mean_T(q_e) (Fedus et al. 2021; with sigmoid DeepSeek-AI 2024), the
    sequence loss the same within each sequence, and then the mean over them (DeepSeek-AI 2024), the z-loss
    mean_T(logsumexp(logits)^2) (Zoph et al. 2022). ``noise_TE`` comes from :func:`draw_noise`, ``bias_E`` from
    :mod:`moe_core.model.balance`; None is none.
    """
    T, E = logits_TE.shape
    tempered_TE = logits_TE / controls.temp
    # What softmax makes q of: the logarithm of p, or all the same p times a number.
    log_scores_TE = F.logsigmoid(tempered_TE) if router_scores == "sigmoid" else tempered_TE
    log_probs_TE = log_scores_TE.log_softmax(-1)
    probs_TE = log_probs_TE.exp()

    log_weights_TE = log_scores_TE if router_scores == "sigmoid" else log_probs_TE
    scores_TE = log_weights_TE if routing == "expert" else tempered_TE
    if noise_TE is not None:
        scores_TE = scores_TE + controls.noise_std * noise_TE
    if bias_E is not None:
        scores_TE = scores_TE + bias_E
    if routing == "expert":
        picks = _experts_choose(scores_TE, log_weights_TE, capacity_of(controls, T, E, top_k), n_sequences)
    else:
        picks = _tokens_choose(scores_TE, controls, top_k, dropless, n_sequences)
    experts_TK, demand_E = picks.experts_TK, picks.demand_BE.sum(0)
    asked = T * top_k if picks.tokens_EC is None else picks.tokens_EC.numel()
    if norm_topk_prob:
        # The same as p / sum(p), without 0 / 0 where noise picks experts of vanishing probability.
        weights_TK = log_scores_TE.gather(1, experts_TK).softmax(-1)
    else:
        weights_TK = (tempered_TE.sigmoid() if router_scores == "sigmoid" else probs_TE).gather(1, experts_TK)

    return Routing(
        experts_TK=experts_TK,
        weights_TK=weights_TK,
        kept_TK=picks.kept_TK,
        balance_loss=E * (demand_E / asked * probs_TE.mean(0)).sum(),
        sequence_loss=E * n_sequences / asked * (picks.demand_BE * probs_TE.unflatten(
            0, (n_sequences, -1)).mean(1)).sum(-1).mean(),
        z_loss=logits_TE.logsumexp(-1).square().mean(),
        stats=RouterStats(
            demand_E=demand_E,
            served_E=picks.served_E,
            top1_p=probs_TE.detach().gather(1, experts_TK[:, :1]).mean(),
            entropy=-(probs_TE * log_probs_TE).detach().sum(-1).mean(),
            no_expert=(~picks.kept_TK.any(-1)).float().mean(),
        ),
        logits_TE=logits_TE.detach(),
        tokens_EC=picks.tokens_EC,
    )


def routing_options(config: RouterConfig) -> dict:
    """What :func:`route` reads of a config, by its arguments' names."""
    return {name: getattr(config, name) for name in ("routing", "top_k", "router_scores", "norm_topk_prob", "dropless")}


class Router(nn.Module):
    """A linear layer, then :func:`route`. ``weight`` [E, D] and ``bias`` [E] or None, uninitialised."""

    def __init__(self, d_model: int, n_experts: int, config: RouterConfig, bias: bool = True):
        super().__init__()
        self.options = routing_options(config)
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.register_parameter("bias", nn.Parameter(torch.empty(n_experts)) if bias else None)

    def forward(self, x_TD: Tensor, controls: RouterControls, noise_TE: Tensor | None = None,
                bias_E: Tensor | None = None, n_sequences: int = 1) -> Routing:
        # In bfloat16 two or three choices in a thousand would flip.
        logits_TE = F.linear(x_TD.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        return route(logits_TE, controls, noise_TE, bias_E, n_sequences=n_sequences, **self.options)
