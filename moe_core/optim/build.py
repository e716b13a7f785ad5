"""Which parameter goes to which group, and the one schedule shape that every group follows.

A group's rate is ``peak * lr_shape(step) * lr_scale``: the ratio between two groups never changes.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor, nn

from moe_core.config import ConfigError, OptimConfig
from moe_core.model.attention import Attention
from moe_core.model.experts import Experts
from moe_core.model.linear import Embedding, Linear
from moe_core.model.norm import RMSNorm
from moe_core.model.router import Router
from moe_core.model.transformer import MLP, Transformer
from moe_core.optim.mixed import MixedOptimizer


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


def set_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its own peak rate times ``share``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


# The rule of the matrices inside the blocks, and the rule of all the rest (the "aux" one).
_RULES = {"adamw": ("adamw", "adamw"), "muon_adamw": ("muon", "adamw"), "muon_sophia": ("muon", "sophia"),
          "sophia": ("sophia", "sophia")}


def parameter_groups(model: nn.Module) -> dict[str, list[Tensor]]:
    """Every parameter in exactly one group, chosen by the module that owns it.

    "embed": token embedding (the head too) and learned positions; "attention", "mlp" (dense, and shared
    experts) and "experts": matrices; "router": its matrix; "vectors": norms and all biases. Groups that stay empty are
    left out. Raises ConfigError for a parameter of any other module.
    """
    groups: dict[str, list[Tensor]] = {
        name: [] for name in ("embed", "attention", "mlp", "experts", "router", "vectors")}
    for module in model.modules():
        match module:
            case Embedding():
                groups["embed"].append(module.weight)
            case Attention() | MLP():
                name = "attention" if isinstance(module, Attention) else "mlp"
                linears = [child for child in module.children() if isinstance(child, Linear)]
                groups[name] += [linear.weight for linear in linears]
                groups["vectors"] += [linear.bias for linear in linears if linear.bias is not None]
            case Experts():
                groups["experts"] += module.weights()
                groups["vectors"] += module.biases()
            case Router():
                groups["router"].append(module.weight)
                groups["vectors"] += [] if module.bias is None else [module.bias]
            case RMSNorm():
                groups["vectors"].append(module.weight)
    times = Counter(p for params in groups.values() for p in params)  # tensors hash by identity
    for name, p in model.named_parameters():
        if times[p] != 1:
            raise ConfigError(f"parameter {name}: must be in one optimizer group, not in {times[p]}; "
                              "its module is none of those that parameter_groups knows")
    return {name: params for name, params in groups.items() if params}


def main_lr(config: OptimConfig) -> float:
    """Peak rate of the parameters that Muon does not have: the metric ``lr`` is this one's."""
    return config.sophia_lr if _RULES[config.optimizer][1] == "sophia" else config.learning_rate


def _settings(config: OptimConfig, rule: str, bs: int) -> dict:
    if rule == "muon":
        return {"peak_lr": config.muon_lr, "weight_decay": config.muon_wd, "momentum": config.muon_momentum,
                "scale": config.muon_scale, "ns_dtype": config.muon_dtype, "starved": config.starved_experts}
    if rule == "sophia":
        return {"peak_lr": config.sophia_lr, "weight_decay": config.sophia_wd, "rho": config.sophia_rho,
                "betas": (config.sophia_b1, config.sophia_b2), "eps": config.sophia_eps, "bs": bs}
    return {"peak_lr": config.learning_rate, "weight_decay": config.weight_decay,
            "betas": (config.beta1, config.beta2), "eps": 1e-8}


def build_optimizer(config: OptimConfig, model: Transformer) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over all of ``model``; each group has a ``name`` and a ``peak_lr``.

    Vectors do not decay. Sophia's ``bs`` is the number of predictions in a micro-batch, which is what a
    Hessian pass takes. Raises ConfigError where a mix with Muon finds no matrix for it.
    """
    bs = config.batch_size * model.config.block_size
    in_blocks, aux = _RULES[config.optimizer]
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    groups = []
    for name, params in parameter_groups(model).items():
        is_muons = name in ("attention", "mlp", "experts") or (name == "router" and config.router_optimizer == "muon")
        rule = in_blocks if is_muons else aux
        group = {"params": params, "name": name, "rule": rule, **_settings(config, rule, bs)}
        if rule == "adamw":
            group["fused"] = fused
        if name == "embed" and config.embed_lr:
            group["peak_lr"] = config.embed_lr
        if name == "vectors":
            group["weight_decay"] = 0.0
        group["lr"] = group["peak_lr"]
        groups.append(group)
    if in_blocks == "muon" and not any(group["rule"] == "muon" for group in groups):
        raise ConfigError(f"optimizer = {config.optimizer!r}: the model has no matrix for Muon "
                          "(attention, MLP, experts); 'adamw' and 'sophia' need none")
    if in_blocks == aux == "adamw":
        return torch.optim.AdamW(groups, fused=fused)
    return MixedOptimizer(groups)
