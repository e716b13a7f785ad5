"""The optimizers: Muon, SophiaG, and one whose parameter groups follow different rules.

Each is a plain ``torch.optim.Optimizer``: everything that it knows lies in ``param_groups`` and ``state``, as
tensors, numbers and names, so that copies, ``state_dict`` and ``torch.load(weights_only=True)`` lose nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moe_core.optim.muon import MUON
from moe_core.optim.rule import Group, Rule, State, check_group, tensor_state, with_gradient
from moe_core.optim.sophia import SOPHIA, absorb_estimate


def _adamw_update(group: Group, state: State, found_inf: Tensor | None) -> None:
    """Torch's own AdamW, with its state under torch's names."""
    params, grads, steps, means, squares = [], [], [], [], []
    for p, g in with_gradient("AdamW", group):
        if "step" not in state[p]:
            state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
        mean, square = tensor_state(state, p, "exp_avg", "exp_avg_sq")
        for column, entry in zip((params, grads, steps, means, squares), (p, g, state[p]["step"], mean, square),
                                 strict=True):
            column.append(entry)
    beta1, beta2 = group["betas"]
    adamw(params, grads, means, squares, [], steps, fused=group["fused"], foreach=False, amsgrad=False,
          maximize=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
          eps=group["eps"], found_inf=found_inf)


ADAMW = Rule(
    name="AdamW",
    defaults={"lr": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "fused": False},
    choices={"fused": (False, True)},
    update=_adamw_update,
)

RULES: dict[str, Rule] = {"adamw": ADAMW, "muon": MUON, "sophia": SOPHIA}


class MixedOptimizer(torch.optim.Optimizer):
    """Each parameter group names its ``rule``: "adamw", "muon" or "sophia", and has its own hyperparameters.

    Hyperparameters that a group does not give are its rule's defaults. Raises ValueError for a rule, a
    hyperparameter or a parameter that cannot be, and RuntimeError for a sparse gradient. A step leaves
    every ``p.grad`` as it was, and alone what has none.

    ``found_inf``, torch's own name for it: None, or a 0-D float32 tensor on the parameters' device. Where it is 1 a
    step and an estimate change nothing but the gradients that they are given, and the host need not wait to know;
    AdamW's groups must then be fused ones.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[Group], **defaults):
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        name = {**self.defaults, **param_group}.get("rule")
        if name not in RULES:
            raise ValueError(f"rule = {name!r}: must be one of {', '.join(map(repr, RULES))}")
        group = {**RULES[name].defaults, **self.defaults, **param_group}
        super().add_param_group(group)
        try:
            check_group(RULES[name], group)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every group by its rule. Returns what ``closure`` returned, which is called with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["rule"] != "adamw":  # torch's kernel looks for itself
                self._blank([p.grad for p in group["params"]])
            RULES[group["rule"]].update(group, self.state, self.found_inf)
        return loss

    def _blank(self, grads: Iterable[Tensor | None]) -> None:
        """Zeros for what is not to be applied: no factor makes NaN into 0."""
        if self.found_inf is not None:
            for grad in grads:
                if grad is not None:
                    grad.masked_fill_(self.found_inf > 0, 0.0)

    def _sophia_groups(self) -> list[Group]:
        return [group for group in self.param_groups if group["rule"] == "sophia"]

    def hessian_params(self) -> list[Tensor]:
        """The parameters whose curvature is wanted: those of Sophia's groups, in order."""
        return [p for group in self._sophia_groups() for p in group["params"]]

    @torch.no_grad()
    def update_hessian(self, ghats: Sequence[Tensor | None]) -> None:
        """Take in one estimate, a gradient on sampled labels for each of :meth:`hessian_params`; None leaves one out.

        Every group's ``bs`` must be the number of predictions that the gradient is a mean over.
        """
        groups = self._sophia_groups()
        if len(ghats) != (wanted := sum(len(group["params"]) for group in groups)):
            raise ValueError(f"{len(ghats)} estimates for {wanted} parameters: must be one for each, or None")
        self._blank(ghats)
        rest = iter(ghats)
        for group in groups:
            absorb_estimate(group, self.state, itertools.islice(rest, len(group["params"])), self.found_inf)


class _OneRule(MixedOptimizer):
    """Every group follows the class's rule; its hyperparameters can be given for all groups at once."""

    rule: ClassVar[str]

    def __init__(self, params: Iterable[Tensor] | Iterable[Group], **hyperparameters):
        known = RULES[self.rule].defaults
        for name, value in hyperparameters.items():
            if name not in known:
                raise ValueError(f"{name} = {value!r}: {RULES[self.rule].name} has only {', '.join(known)}")
        super().__init__(params, rule=self.rule, **hyperparameters)


class Muon(_OneRule):
    """Muon for matrices [out, in] and stacks of matrices [E, in, out].

    ``lr`` 0.02, ``weight_decay`` 0.0 (decoupled, by the rate without its scale), ``momentum`` 0.95 (Nesterov);
    ``scale`` "original" or "match_rms_adamw" (:func:`~moe_core.optim.muon.update_scale`); ``ns_dtype``
    "bfloat16", "float32" or "float64", of the Newton-Schulz steps; ``starved`` "reference", or "skip", which
    leaves weights and momentum of an expert alone while its gradient is zero.
    """

    rule = "muon"


class SophiaG(_OneRule):
    """SophiaG for any parameters.

    ``bs``, which must be given, is the number of predictions averaged in one Hessian pass (batch x sequence);
    ``lr`` 1e-3, ``weight_decay`` 0.2 (decoupled), ``betas`` (0.965, 0.99), of momentum and curvature; ``rho``
    0.1; ``eps`` 1e-15 as published. The caller makes the passes: :meth:`update_hessian`.
    """

    rule = "sophia"
