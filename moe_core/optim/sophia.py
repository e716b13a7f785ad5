"""SophiaG: momentum over curvature, clipped element by element (Liu et al. 2023, arXiv:2305.14342).

The curvature is the Gauss-Newton diagonal of the mean cross-entropy. It is estimated from time to time by
``bs * ghat^2``, where ``ghat`` is the gradient of that mean over ``bs`` predictions whose labels were drawn
from the model's own logits (:mod:`moe_core.optim.hessian`). There is no bias correction: until the first
estimate every element that has momentum moves by the full rate.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_core.optim.rule import Group, Rule, State, tensor_state, unless, with_gradient


def _update(group: Group, state: State, found_inf: Tensor | None) -> None:
    lr, (beta1, _) = group["lr"], group["betas"]
    gain, kept = unless(found_inf, 1 - beta1, 0.0), unless(found_inf, 1 - lr * group["weight_decay"], 1.0)
    for p, g in with_gradient("SophiaG", group):
        momentum, hessian = tensor_state(state, p, "momentum", "hessian")
        momentum.lerp_(g, gain)
        # sign(m) min(|m| / d, 1) is clamp(m / d, -1, 1), because d is positive. In d's own memory.
        bound = hessian.mul(group["rho"] * group["bs"]).add_(group["eps"])
        update = torch.div(momentum, bound, out=bound).clamp_(-1, 1)
        if found_inf is not None:
            update.mul_(1 - found_inf)
        p.mul_(kept).add_(update, alpha=-lr)


def absorb_estimate(group: Group, state: State, ghats: Iterable[Tensor | None], found_inf: Tensor | None) -> None:
    """``h = b2 h + (1 - b2) ghat^2`` for each parameter of the group; None leaves its h alone, and so does
    ``found_inf`` 1, for which each ``ghat`` is to be zeros.
    """
    beta2 = group["betas"][1]
    kept = unless(found_inf, beta2, 1.0)
    for p, ghat in zip(group["params"], ghats, strict=True):
        if ghat is not None:
            _, hessian = tensor_state(state, p, "momentum", "hessian")
            hessian.mul_(kept).addcmul_(ghat, ghat, value=1 - beta2)


SOPHIA = Rule(
    name="SophiaG",
    # bs has no default that could be right: it is the size of the caller's Hessian pass.
    defaults={"lr": 1e-3, "weight_decay": 0.2, "betas": (0.965, 0.99), "rho": 0.1, "eps": 1e-15, "bs": None},
    update=_update,
)
