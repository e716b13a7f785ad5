"""Which parameter goes to which group, and the one schedule shape that every group follows.

A group's rate is ``peak * lr_shape(step) * lr_scale``: the ratio between two groups never changes.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from moe_core.config import OptimConfig


def lr_shape(config: OptimConfig, step: int) -> float:
    """Rate at optimizer step ``step`` (the first is 1) as a share of the peak.

    Linear from ``1 / warmup_iters`` to 1, then a cosine to ``min_lr / learning_rate`` at ``lr_decay_iters``,
    then flat.
    """
    floor, t = config.min_lr / config.learning_rate, step - 1
    if t < config.warmup_iters:
        return (t + 1) / config.warmup_iters
    if t >= config.lr_decay_iters:
        return floor
    done = (t - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over every parameter of ``model``: matrices decay, vectors (norms, biases) do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "name": "matrices", "weight_decay": config.weight_decay},
        {"params": vectors, "name": "vectors", "weight_decay": 0.0},
    ]
    for group in groups:
        group["peak_lr"] = config.learning_rate
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def set_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its own peak rate times ``share``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
