"""Optimizers, their parameter groups, the one rate schedule they share, and Sophia's curvature pass."""

from moe_core.optim.build import build_optimizer, lr_shape, main_lr, parameter_groups, set_lr
from moe_core.optim.hessian import hessian_due, sample_labels, sampled_gradients
from moe_core.optim.mixed import MixedOptimizer, Muon, SophiaG
from moe_core.optim.update_size import measured_step, update_sizes

__all__ = ["MixedOptimizer", "Muon", "SophiaG", "build_optimizer", "hessian_due", "lr_shape", "main_lr",
           "measured_step", "parameter_groups", "sample_labels", "sampled_gradients", "set_lr", "update_sizes"]
