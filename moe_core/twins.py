"""A MoE beside a model of the same size, as a token sees it: equal active parameters, dense or finer grained."""

from __future__ import annotations

import dataclasses

import torch

from moe_core.checked import whole
from moe_core.config import ConfigError, RunConfig
from moe_core.model import Transformer
from moe_core.optim import parameter_groups


def active_params(config: RunConfig) -> int:
    """Weights in the matrices that one token is multiplied with: K experts of E, shared ones, router, tied head.

    Counted on the model itself, by module. Embedding look-ups, learned positions, norms and biases are not in it.
    """
    with torch.device("meta"):
        model = Transformer(config.model, config.router, experts_impl=config.experts_impl)
    groups = parameter_groups(model)
    whole = sum(p.numel() for name in ("attention", "mlp", "router") for p in groups.get(name, ()) if p.ndim > 1)
    held = sum(p.numel() for p in groups.get("experts", ()) if p.ndim > 2)
    met = held // config.model.n_experts * config.router.top_k if held else 0
    return whole + met + model.embed.weight.numel()


def total_params(config: RunConfig) -> int:
    """Every parameter of the config's model once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config.model, config.router).parameters())


def moe_twin(dense: RunConfig, n_experts: int = 8, **changes) -> RunConfig:
    """The MoE that multiplies a token with as many weights as ``dense`` does, router included.

    Each MLP becomes ``n_experts`` SwiGLU experts, of which a token meets ``top_k`` (a field of ``changes``, 1 where
    it is not given); their width is the multiple of 8 that comes nearest. All else stays: depth, width, attention,
    data, schedule, batch. Raises ConfigError where ``dense`` has experts, or its MLP is too small to be split.
    """
    if dense.model.n_experts:
        raise ConfigError(f"n_experts = {dense.model.n_experts}: must be 0; the model to make a MoE twin of is dense")
    if dense.model.mlp_width and "mlp_width" not in changes:
        changes["mlp_width"] = None  # of no block of the twin; left set, it would only mislead
    # A width of 8 shows what a unit of width and the rest weigh, whatever the model's parts are.
    narrow, wider = (dense.replace(n_experts=n_experts, expert_width=width, **changes) for width in (8, 16))
    fixed, unit = active_params(narrow), (active_params(wider) - active_params(narrow)) // 8
    width = 8 * round((active_params(dense) - fixed + 8 * unit) / unit / 8)
    if width < 8:
        raise ConfigError(f"n_experts = {n_experts}: must be smaller, or top_k; the dense model's MLP of width "
                          f"{dense.model.ff_width} is too small to be split")
    return dataclasses.replace(narrow, model=dataclasses.replace(narrow.model, expert_width=width))


def finer(config: RunConfig, times: int) -> RunConfig:
    """The MoE with ``times`` as many experts, each a ``times``-th as wide, of which a token meets ``times`` as many:
    fine-grained experts (Dai et al. 2024, DeepSeekMoE).

    The weights in experts stay as many, in all and for a token, shared ones included; only the router grows. Shares
    are still shares of assignments, but the fair share 1/E is a ``times``-th of what it was. Raises ConfigError for a
    dense model, and where the width cannot be divided into multiples of 8.
    """
    model, router = config.model, config.router
    if not model.n_experts:
        raise ConfigError("n_experts = 0: must be at least 1 for experts that are to be made finer")
    times = whole("times", times, ConfigError)
    if model.ff_width % (8 * times):
        raise ConfigError(f"times = {times}: expert_width = {model.ff_width} must be a multiple of {8 * times}, so "
                          "that each part is a multiple of 8")
    return config.replace(n_experts=times * model.n_experts, top_k=times * router.top_k,
                          expert_width=model.ff_width // times, n_shared_experts=times * model.n_shared_experts)
