"""From what a step left on the device to the metrics by name.

A step packs all it has to say into one float32 vector (:func:`pack`), which crosses to the host once;
:class:`Told` and its :class:`Reading` give the vector its names back, and :func:`step_metrics` derives the published
metrics.

L layers, E experts. Demand is the share of a layer's assignments that asked for an expert; served is the
share of the same assignments that got in, so the two are equal where nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_core.config import RouterConfig, RunConfig
from moe_core.knobs import KNOBS
from moe_core.model import Output
from moe_core.optim import lr_shape, main_lr

PER_LAYER = 6  # numbers that a layer reports beside its shares


def collapse_lines(top_k: int) -> tuple[float, int]:
    """From which largest demand up, and from how many active experts down, a layer counts as collapsed.

    An expert that all tokens ask for has 1/K of the assignments, and K experts are active at the least.
    """
    return 0.90 / top_k, top_k


def pack(out: Output) -> Tensor:
    """All that one micro-batch reports, as one flat float32 vector on its device."""
    parts = [out.losses["ce"].detach()]
    if out.stats is not None:
        s = out.stats
        parts += [out.balance_L, out.sequence_L, out.z_L, s.top1_p, s.entropy, s.no_expert, s.demand_E, s.served_E]
    if out.mtp_N is not None:
        parts.append(out.mtp_N)
    return torch.cat([part.float().reshape(-1) for part in parts])


def packed_demand(packed: Tensor, n_layer: int, n_experts: int) -> Tensor:
    """The assignments that asked for each expert, [L, E], in what :func:`pack` made; a view."""
    start, size = 1 + PER_LAYER * n_layer, n_layer * n_experts
    return packed[start : start + size].view(n_layer, n_experts)


@dataclass(frozen=True)
class Reading:
    """A packed vector, unpacked: means over the step's micro-batches; assignment counts as shares."""

    ce: float
    balance_L: np.ndarray
    sequence_L: np.ndarray
    z_L: np.ndarray
    top1_p_L: np.ndarray
    entropy_L: np.ndarray
    no_expert_L: np.ndarray
    shares: np.ndarray  # float32 [2, L, E]: demand, served; L = E = 0 when dense
    bias_LE: np.ndarray | None  # what the step was routed with; None where there is none
    mtp_N: np.ndarray  # of each head for tokens further on

    @classmethod
    def unpack(cls, vector: np.ndarray, n_layer: int, n_experts: int, n_mtp: int = 0) -> Reading:
        """``vector``: the mean of :func:`pack` over micro-batches of equal size, and behind it the balance bias."""
        if not n_experts:
            nothing = np.zeros(0, np.float32)
            return cls(float(vector[0]), *[nothing] * PER_LAYER, np.zeros((2, 0, 0), np.float32), None,
                       vector[1 : 1 + n_mtp])
        start = 1 + PER_LAYER * n_layer
        end = start + 2 * n_layer * n_experts
        per_layer = vector[1:start].reshape(PER_LAYER, n_layer)
        counts = vector[start:end].reshape(2, n_layer, n_experts)
        asked = counts[0].sum(-1, keepdims=True)  # every assignment asks for exactly one expert
        mtp_N, rest = vector[end : end + n_mtp], vector[end + n_mtp :]
        bias_LE = rest.reshape(n_layer, n_experts) if len(rest) else None
        return cls(float(vector[0]), *per_layer, (counts / asked).astype(np.float32), bias_LE, mtp_N)


@dataclass(frozen=True)
class Told:
    """What the host is told of a step before its update."""

    reading: Reading
    update_sizes: list[float]  # of each parameter group, by the step before
    ghat_norm: float  # of the gradients on sampled labels; 0 where no Hessian pass was due
    norm: float  # of the gradient
    is_finite: bool  # all of these

    @classmethod
    def unpack(cls, vector: np.ndarray, n_layer: int, n_experts: int, n_mtp: int, n_groups: int) -> Told:
        """``vector``: what :meth:`Reading.unpack` takes, and behind it the update sizes and the two norms."""
        read, (*sizes, ghat_norm, norm) = vector[: -n_groups - 2], vector[-n_groups - 2 :].tolist()
        return cls(Reading.unpack(read, n_layer, n_experts, n_mtp), sizes, ghat_norm, norm,
                   bool(np.isfinite(vector).all()))


def step_metrics(config: RunConfig, groups: Sequence[Mapping], number: int, values: Mapping[str, float], told: Told,
                 clipped: int, skipped: int, tokens: int) -> dict[str, float]:
    """The row of step ``number`` but its speed and its validation.

    ``groups``: the optimizer's. ``values``: of the knobs. Before it ``clipped`` steps were clipped, ``skipped`` were
    refused, and ``tokens`` trained on.
    """
    optim, reading, norm = config.optim, told.reading, told.norm
    share = lr_shape(optim, number) * values["lr_scale"]
    routed = {}
    if config.model.n_experts:
        routed = router_metrics(reading, values.get("load_balance_alpha", 0.0), config.router)
    aux = routed.get("router/aux_mean", 0.0) + routed.get("router/seq_aux_mean", 0.0)
    z = values["router_z_loss_coef"] * routed["router/z_mean"] if routed else 0.0
    if routed and optim.skips_starved:
        routed["optim/starved_skipped"] = float((reading.shares[1] == 0).sum())
    further = {}
    if len(reading.mtp_N):
        further = {"train/mtp": float(reading.mtp_N.mean()),
                   **{f"train/mtp_{k}": float(ce) for k, ce in enumerate(reading.mtp_N, 1)}}
    return {
        "train/loss": reading.ce + aux + z + optim.mtp_coef * further.get("train/mtp", 0.0),
        "train/ce": reading.ce,
        **further,
        "lr": main_lr(optim) * share,
        **{f"lr/{group['name']}": group["peak_lr"] * share for group in groups},
        **{f"update/{group['name']}": size for group, size in zip(groups, told.update_sizes, strict=True)},
        "train/tokens_b": (tokens + config.tokens_per_step) / 1e9,
        "grad/norm": norm,
        "grad/clipped_cum": float(clipped + (norm > values["grad_clip"])),
        "grad/skipped_cum": float(skipped),
        **{KNOBS[name].metric: value for name, value in values.items()},
        **routed,
    }


def router_metrics(reading: Reading, alpha: float, router: RouterConfig) -> dict[str, float]:
    """The router's metrics of one step: means over layers, then every layer by itself.

    A name with ``/layer_{l}`` behind is that layer's own value of the metric in front of it. ``alpha`` is 0
    where no balance loss is minimised; ``router/balance_mean``, 1 when balanced, E/K when collapsed, is that
    loss itself, minimised or not. ``router/seq_aux_mean``, that of each sequence by itself times
    ``sequence_balance_alpha``, is there where it is minimised, and ``router/no_expert_mean``, the share of tokens
    that no expert took, where experts choose. ``router/bias_e{i}/layer_{l}`` has no mean: what is added
    to all of a layer's experts moves nothing. ``router/collapsed`` is 1 where a layer is past one of
    :func:`collapse_lines`, unless every expert takes every token by K = E.
    """
    demand_LE, served_LE = reading.shares
    top_L = demand_LE.max(-1)
    active_L = (demand_LE > 0).sum(-1)
    per_layer = {
        "router/aux_mean": alpha * reading.balance_L,
        "router/balance_mean": reading.balance_L,
        "router/z_mean": reading.z_L,
        "router/max_frac_mean": top_L,
        "router/active_mean": active_L,
        "router/drop_frac_mean": (demand_LE - served_LE).sum(-1),  # exactly 0 when nothing is dropped
        "router/top1_p_mean": reading.top1_p_L,
        "router/entropy_mean": reading.entropy_L,
    }
    if router.sequence_balance_alpha:
        per_layer["router/seq_aux_mean"] = router.sequence_balance_alpha * reading.sequence_L
    if router.routing == "expert":
        per_layer["router/no_expert_mean"] = reading.no_expert_L
    out = {name: float(values.mean()) for name, values in per_layer.items()}
    out["router/max_frac_max"] = float(top_L.max())
    out["router/active_min"] = float(active_L.min())
    share, active = collapse_lines(router.top_k)
    chooses = router.top_k < demand_LE.shape[1]
    out["router/collapsed"] = float(chooses and (top_L.max() >= share or active_L.min() <= active))
    for key, share_E in (("dem", demand_LE.mean(0)), ("srv", served_LE.mean(0))):
        out[f"router/frac_{key}_max"] = float(share_E.max())
        out[f"router/active_{key}"] = float((share_E > 0).sum())
        out |= {f"router/frac_{key}_e{i}": float(share) for i, share in enumerate(share_E)}
    for name, values in per_layer.items():
        out |= {f"{name}/layer_{layer}": float(value) for layer, value in enumerate(values)}
    if reading.bias_LE is not None:
        out["router/bias_max"] = float(np.abs(reading.bias_LE).max())
        out |= {f"router/bias_e{i}/layer_{layer}": float(b) for (layer, i), b in np.ndenumerate(reading.bias_LE)}
    return out
