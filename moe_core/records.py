"""What a step leaves behind: its row, what its gradients told, and what the routers decided on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moe_core.metrics import Reading


@dataclass(frozen=True)
class StepRecord:
    """What optimizer step number ``step`` (the first is 1) did and saw.

    ``metrics``: the published names; loss, shares and the rest are of the forward passes of this step, hence
    of the weights before its update, and means over all its micro-batches; ``update/...`` is the update that
    made those weights, by the step before (0 in the first); ``val/...`` is of the weights after its own.
    ``shares``: float32 [2, L, E], demand and served as shares of assignments. ``alerts``: what a person should
    hear of, a sentence each.
    """

    step: int
    metrics: dict[str, float]
    shares: np.ndarray
    alerts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Routed:
    """What the routers of optimizer step ``step`` decided on in its last micro-batch, for ``Run.preview``.

    The logits stay on the device, L * T * E * 4 bytes until the next step; the noise is drawn again from ``noise``.
    """

    step: int
    values: dict[str, float]  # of the knobs
    router_logits: tuple[Tensor, ...]  # raw, [T, E] of each layer
    noise: Tensor  # the noise generator's state before that micro-batch
    bias_LE: Tensor | None  # the balance bias that took part


@dataclass(frozen=True)
class Backward:
    """What a step knows before its update. The parameters' ``.grad`` belong to it."""

    reading: Reading
    norm: float  # of the gradient
    ghats: list[Tensor | None]  # gradients on sampled labels; empty where no Hessian pass was due
    ghat_norm: float  # 0 where none was due
    update_sizes: list[float]  # of each parameter group, by the step before
    router_logits: tuple[Tensor, ...] | None  # of the last micro-batch
    batches: list[tuple[Tensor, Tensor]]  # each micro-batch, and the noise generator's state before it
    is_finite: bool  # all that the host was told
    demand_LE: Tensor | None  # assignments that asked for each expert, in all of them; None when dense
    bias_LE: Tensor | None  # a copy of the balance bias
    waited: float  # seconds, for data
