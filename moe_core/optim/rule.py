"""What an update rule is: its hyperparameters, what each may be, and the update of one parameter group.

A rule keeps nothing of its own. All it knows lies in the group (numbers and names) and in the optimizer's
state (tensors of each parameter), which is what ``state_dict`` saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_core.checked import is_integer, is_number

Group = dict[str, Any]
State = MutableMapping[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Rule:
    """``update(group, state, found_inf)`` moves a group's parameters; ``defaults`` are the group's hyperparameters.

    ``found_inf`` is 0-D, or None: where it is 1, parameters and state are to stay as they are. Muon's and SophiaG's
    gradients are then zeros.
    """

    name: str
    defaults: Mapping[str, Any]
    update: Callable[[Group, State, Tensor | None], None]
    check_parameter: Callable[[Tensor], None] = lambda p: None
    choices: Mapping[str, tuple] = field(default_factory=dict)


# Ranges of the hyperparameters, by name: the same in every rule.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda v: is_number(v) and v > 0, "a number more than 0"),
    "weight_decay": (lambda v: is_number(v) and v >= 0, "a number, at least 0"),
    "betas": (lambda v: isinstance(v, tuple | list) and len(v) == 2 and all(is_number(b) and 0 <= b < 1 for b in v),
              "two numbers, each at least 0 and less than 1"),
    "momentum": (lambda v: is_number(v) and 0 <= v < 1, "a number, at least 0 and less than 1"),
    "eps": (lambda v: is_number(v) and v > 0, "a number more than 0"),
    "rho": (lambda v: is_number(v) and v > 0, "a number more than 0"),
    "bs": (lambda v: is_integer(v, 1),
           "the number of predictions averaged in a Hessian pass (batch x sequence), an integer, at least 1"),
}


def check_group(rule: Rule, group: Group) -> None:
    """Refuse hyperparameters and parameters that ``rule`` cannot take. Raises ValueError, one line."""
    for name in rule.defaults:
        value = group[name]
        if name in rule.choices:
            if value not in rule.choices[name]:
                raise ValueError(f"{rule.name}: {name} = {value!r}: must be one of "
                                 f"{', '.join(map(repr, rule.choices[name]))}")
        elif not _RANGES[name][0](value):
            raise ValueError(f"{rule.name}: {name} = {value!r}: must be {_RANGES[name][1]}")
    for p in group["params"]:
        if not p.is_floating_point() or p.is_sparse:
            raise ValueError(f"{rule.name}: a parameter of {p.dtype}, {p.layout}: "
                             "must be real, floating-point and dense")
        rule.check_parameter(p)


def with_gradient(rule: str, group: Group) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameter and gradient where there is one. Raises RuntimeError for a sparse gradient."""
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise RuntimeError(f"{rule}: a gradient of {p.grad.layout}: must be dense")
        yield p, p.grad


def unless(found_inf: Tensor | None, value: float, otherwise: float) -> Tensor | float:
    """``value``, or ``otherwise`` where ``found_inf`` is 1: a factor, so that the host need not wait to know."""
    return value if found_inf is None else torch.where(found_inf > 0, otherwise, value)


def tensor_state(state: State, p: Tensor, *names: str) -> list[Tensor]:
    """The named state tensors of ``p``, each of its shape, zeros when new."""
    own = state[p]
    for name in names:
        if name not in own:
            own[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return [own[name] for name in names]
