"""Balancing without a loss: a bias on the selection that follows the load (Wang et al. 2024, arXiv:2408.15664).

An expert that more than its share of a step's assignments asked for is picked less readily in the next step, and vice
versa. The bias decides which experts are picked, never their weights, so no gradient flows through it.

Shapes: E experts, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def follow_load(bias_LE: Tensor, demand_LE: Tensor, speed: Tensor) -> None:
    """One move of the bias, in place: ``b += speed * sign(mean - demand)``, then centred, layer by layer.

    ``bias_LE`` is float32: 0.5 + 1e-3 is 0.5 in bfloat16. ``demand_LE`` counts the assignments of a whole step,
    every micro-batch included, before any was dropped; ``speed`` is 0-D. Nothing waits for the device.
    """
    bias_LE += speed * torch.sign(demand_LE.mean(-1, keepdim=True) - demand_LE)
    bias_LE -= bias_LE.mean(-1, keepdim=True)
