"""Optimizers, their parameter groups and the one rate schedule they share."""

from moe_core.optim.build import build_optimizer, lr_shape, set_lr

__all__ = ["build_optimizer", "lr_shape", "set_lr"]
