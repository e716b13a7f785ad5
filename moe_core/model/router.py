"""The router: who goes where, with what weight, at what loss. All of it in float32.

Routing is data: :func:`route` turns raw logits into a frozen :class:`Routing` and touches nothing else, so
that it can be checked by hand, asked "what if", and recomputed without counting twice.

Shapes: B sequences, T tokens of all of them, D model width, E experts, K picks of a token, L layers.
"""

from __future__ import annotations

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

    @staticmethod
    def stack(layers: Sequence[RouterStats]) -> RouterStats:
        """The statistics of L layers as one, each tensor with a leading dimension L."""
        return RouterStats(*(torch.stack([getattr(s, f.name) for s in layers]) for f in fields(layers[0])))


@dataclass(frozen=True)
class Routing:
    """One layer's decision for T tokens. Picks are in order of preference, the first choice at K index 0."""

    experts_TK: Tensor  # int64, the experts picked; no expert twice in a row
    weights_TK: Tensor  # float32, what each expert's output is multiplied by; carries the gradient
    kept_TK: Tensor  # bool, False where the expert was full: a dropped assignment adds nothing
    balance_loss: Tensor  # float32 0-D, 1 when balanced, E when collapsed
    sequence_loss: Tensor  # float32 0-D, the balance loss of each sequence by itself, then their mean
    z_loss: Tensor  # float32 0-D, of the raw logits
    stats: RouterStats
    logits_TE: Tensor  # float32, the raw logits, detached: what to ask "what if" of


def draw_noise(kind: str, shape: Sequence[int], generator: torch.Generator | None = None,
               device: torch.device | None = None) -> Tensor:
    """Standard selection noise in float32: "gumbel" is Gumbel(0, 1), "gaussian" is N(0, 1).

    ``generator`` must live on ``device``; None is torch's global one. Raises ValueError for another kind.
    """
    noise = torch.empty(tuple(shape), device=device, dtype=torch.float32)
    if kind == "gaussian":
        return noise.normal_(generator=generator)
    if kind == "gumbel":
        # -log of Exp(1). The clamp keeps a draw of exactly 0 from becoming inf, and 0 * inf a NaN.
        tiny = torch.finfo(torch.float32).tiny
        return noise.exponential_(generator=generator).clamp_min_(tiny).log_().neg_()
    raise ValueError(f"noise kind = {kind!r}: must be 'gumbel' or 'gaussian'")


def within_capacity(picks_TKE: Tensor, capacity: Tensor) -> Tensor:
    """Who gets in, [T, K] bool: first choices before second, earlier tokens before later.

    ``picks_TKE`` is bool and one-hot over E; ``capacity`` is the number of assignments an expert takes.
    """
    T, K, E = picks_TKE.shape
    queue_NE = picks_TKE.transpose(0, 1).reshape(K * T, E)
    place_N = (queue_NE.cumsum(0) * queue_NE).sum(-1)  # from 1, in the queue of the assignment's own expert
    return (place_N <= capacity).view(K, T).t()


def route(logits_TE: Tensor, controls: RouterControls, noise_TE: Tensor | None = None,
          bias_E: Tensor | None = None, *, top_k: int, router_scores: str = "softmax",
          norm_topk_prob: bool = False, dropless: bool = True, n_sequences: int = 1) -> Routing:
    """Route T tokens, of ``n_sequences`` equally long sequences one after another, by their raw float32 logits.

    Tempered logits t = logits / temp give the scores p, free of noise and bias: softmax(t), or sigmoid(t), each
    expert's by itself. The K largest of t + noise_std * noise + bias win, which without the two is the order of p
    either way; noise and bias are in units of the tempered logit with sigmoid too (DeepSeek-V3 adds its bias to
    sigmoid(t)). Weights are p, or with ``norm_topk_prob`` p divided by its sum over the K. Without ``dropless``
    an expert takes ceil(capacity_factor * T * K / E) assignments.

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

    scores_TE = tempered_TE if noise_TE is None else tempered_TE + controls.noise_std * noise_TE
    if bias_E is not None:
        scores_TE = scores_TE + bias_E
    experts_TK = scores_TE.topk(top_k, dim=-1).indices
    if norm_topk_prob:
        # The same as p / sum(p), without 0 / 0 where noise picks experts of vanishing probability.
        weights_TK = log_scores_TE.gather(1, experts_TK).softmax(-1)
    else:
        weights_TK = (tempered_TE.sigmoid() if router_scores == "sigmoid" else probs_TE).gather(1, experts_TK)

    # Compared with a range: bincount would wait for the device, and break a compiled graph.
    picks_TKE = experts_TK.unsqueeze(-1) == torch.arange(E, device=experts_TK.device)
    demand_BE = picks_TKE.unflatten(0, (n_sequences, -1)).sum((1, 2)).float()
    demand_E = demand_BE.sum(0)
    if dropless:
        kept_TK, served_E = torch.ones_like(experts_TK, dtype=torch.bool), demand_E
    else:
        # Less a thousandth, or the float32 rounding of a factor such as 1.2 would buy a whole place.
        capacity = torch.ceil(controls.capacity_factor * (T * top_k / E) - 1e-3).clamp_min(1)
        kept_TK = within_capacity(picks_TKE, capacity)
        served_E = (picks_TKE & kept_TK.unsqueeze(-1)).sum((0, 1)).float()

    return Routing(
        experts_TK=experts_TK,
        weights_TK=weights_TK,
        kept_TK=kept_TK,
        balance_loss=E * (demand_E / (T * top_k) * probs_TE.mean(0)).sum(),
        sequence_loss=E * n_sequences / (T * top_k) * (demand_BE * probs_TE.unflatten(
            0, (n_sequences, -1)).mean(1)).sum(-1).mean(),
        z_loss=logits_TE.logsumexp(-1).square().mean(),
        stats=RouterStats(
            demand_E=demand_E,
            served_E=served_E,
            top1_p=probs_TE.detach().gather(1, experts_TK[:, :1]).mean(),
            entropy=-(probs_TE * log_probs_TE).detach().sum(-1).mean(),
        ),
        logits_TE=logits_TE.detach(),
    )


def routing_options(config: RouterConfig) -> dict:
    """What :func:`route` reads of a config, by its arguments' names."""
    return {name: getattr(config, name) for name in ("top_k", "router_scores", "norm_topk_prob", "dropless")}


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
