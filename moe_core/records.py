"""What a step leaves behind: its row, what its gradients told, and what the routers decided on.

E experts, L routed layers, T tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_core.metrics import Told


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


class OnItsWay:
    """A vector that the device sends to the host, which waits for it in :meth:`read` alone."""

    def __init__(self, vector: Tensor):
        self._there = None
        if vector.is_cuda:
            self._host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._host.copy_(vector, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(vector.device))
        else:
            self._host = vector.cpu()

    def read(self) -> np.ndarray:
        if self._there is not None:
            self._there.synchronize()
        return self._host.numpy()


@dataclass(frozen=True)
class Backward:
    """A step before its update, on the device. The parameters' ``.grad`` belong to it."""

    report: OnItsWay  # what ``told`` is made of: means, the balance bias, ``update_sizes`` and norms
    routed: tuple[int, int, int]  # routed layers, experts, heads for tokens further on
    found_inf: Tensor  # 0-D float32: 1 where something in the report is not finite
    update_sizes: Tensor  # of each parameter group, by the step before
    norm: Tensor  # 0-D, of the gradient
    ghats: list[Tensor | None]  # gradients on sampled labels; empty where no Hessian pass was due
    router_logits: tuple[Tensor, ...] | None  # of the last micro-batch
    batches: list[tuple[Tensor, Tensor]]  # each micro-batch, and the noise generator's state before it
    demand_LE: Tensor | None  # assignments that asked for each expert, in all of them; None when dense
    bias_LE: Tensor | None  # a copy of the balance bias

    @functools.cached_property
    def told(self) -> Told:
        """What the host is told, which waits for it here."""
        return Told.unpack(self.report.read(), *self.routed, n_groups=len(self.update_sizes))


@dataclass(frozen=True)
class Place:
    """Where a step begins: the cursor of the data, and the state of the generators of noise and of labels."""

    cursor: dict
    noise: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Asked:
    """A step that was asked of the device, update included; what it has to say is on its way."""

    number: int
    values: dict[str, float]  # of the knobs
    begins: Place
    seen: Backward
    found_inf: Tensor | None  # 0-D: 1 where this step, or one before it that was not read yet, was not finite
