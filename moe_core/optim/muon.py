"""Muon: momentum, orthogonalised (Jordan et al. 2024; the second scale rule is Liu et al.'s, 2025).

A matrix is [out, in], as ``nn.Linear`` stores it; a stack is [E, in, out], as :class:`~moe_core.model.Experts`
stores its own, and each of its E matrices is orthogonalised by itself. All matrices of one shape, tall or
wide, go through the same batched products.

Shapes: E experts; N matrices of R rows and C >= R columns in a batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from moe_core.optim.rule import Group, Rule, State, tensor_state, with_gradient

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0; singular values end around 1, not at it
STEPS = 5
EPS = 1e-7  # added to the Frobenius norm
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

# Elements in one batched product. A CPU is quickest when they stay in its cache: two matrices of 512 x 1408.
_BATCH_ELEMENTS_CPU, _BATCH_ELEMENTS = 1 << 21, 1 << 25


def newton_schulz(x_NRC: Tensor) -> Tensor:
    """Push the singular values of each matrix to around 1, in the dtype of ``x_NRC``; quickest where R <= C.

    They must be at most 1, which dividing by the Frobenius norm ensures. In exact arithmetic those above
    0.002 end in [0.68, 1.21]; smaller ones grow by a factor of up to 485.
    """
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram_NRR = x_NRC @ x_NRC.mT
        poly_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, poly_NRR, x_NRC, beta=a)
    return x_NRC


def update_scale(p: Tensor, rule: str) -> float:
    """What an orthogonalised update of ``p`` is multiplied by, beside the rate.

    "original" is ``sqrt(max(1, fan_out / fan_in))``. "match_rms_adamw" is ``0.2 sqrt(max(fan_out, fan_in))``:
    updates as large as AdamW's usually are, so that AdamW's rate and decay can be kept.
    """
    fan_out, fan_in = p.shape if p.ndim == 2 else (p.shape[2], p.shape[1])
    if rule == "original":
        return math.sqrt(max(1.0, fan_out / fan_in))
    return 0.2 * math.sqrt(max(fan_out, fan_in))


def _oriented(x: Tensor) -> Tensor:
    """A view [N, R, C] with R <= C of a matrix or of a stack."""
    x = x.unsqueeze(0) if x.ndim == 2 else x
    return x if x.shape[1] <= x.shape[2] else x.mT


def _limit(p: Tensor) -> int:
    return _BATCH_ELEMENTS_CPU if p.device.type == "cpu" else _BATCH_ELEMENTS


def _packs(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters that can share a batch, up to their device's limit, or one by one where they are larger."""
    open_packs, packs = defaultdict(list), []
    for p in params:
        pack = open_packs[(*_oriented(p).shape[1:], p.dtype, p.device)]
        if pack and sum(q.numel() for q in pack) + p.numel() > _limit(p):
            packs.append(pack.copy())
            pack.clear()
        pack.append(p)
    return packs + list(open_packs.values())


def _orthogonalised(directions: list[Tensor], dtype: torch.dtype, limit: int) -> list[Tensor]:
    """Every matrix of one pack orthogonalised in ``dtype``, oriented: [N, R, C] of each parameter."""
    parts = [_oriented(u) for u in directions]
    x_NRC = parts[0] if len(parts) == 1 else torch.cat(parts)
    x_NRC = x_NRC / (torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True) + EPS)
    x_NRC = x_NRC.to(dtype, memory_format=torch.contiguous_format)
    for batch in x_NRC.split(max(1, limit // x_NRC[0].numel())):
        batch.copy_(newton_schulz(batch))
    return list(x_NRC.split([len(part) for part in parts]))


def _update(group: Group, state: State) -> None:
    lr, decay, mu = group["lr"], group["weight_decay"], group["momentum"]
    for pack in _packs(p for p, _ in with_gradient("Muon", group)):
        directions, awake = [], []
        for p in pack:
            (momentum,) = tensor_state(state, p, "momentum")
            # Per expert 1 or 0, as a factor: to branch on it, the host would have to wait for the device.
            skips = group["starved"] == "skip" and p.ndim == 3
            awake.append(p.grad.flatten(1).any(1).to(p.dtype)[:, None, None] if skips else 1.0)
            momentum.lerp_(p.grad, (1 - mu) * awake[-1])
            directions.append(p.grad.lerp(momentum, mu))
        updates = _orthogonalised(directions, DTYPES[group["ns_dtype"]], _limit(pack[0]))
        for p, x_NRC, moves in zip(pack, updates, awake, strict=True):
            if isinstance(moves, Tensor):
                x_NRC.mul_(moves)
            p.mul_(1 - lr * decay * moves)
            _oriented(p).add_(x_NRC, alpha=-lr * update_scale(p, group["scale"]))


def _check_parameter(p: Tensor) -> None:
    if p.ndim not in (2, 3):
        raise ValueError(f"Muon: a parameter of shape {list(p.shape)}: must be a matrix [out, in] "
                         "or a stack of matrices [E, in, out]")


MUON = Rule(
    name="Muon",
    defaults={"lr": 0.02, "weight_decay": 0.0, "momentum": 0.95, "scale": "original", "ns_dtype": "bfloat16",
              "starved": "reference"},
    choices={"scale": ("original", "match_rms_adamw"), "ns_dtype": tuple(DTYPES),
             "starved": ("reference", "skip")},
    update=_update,
    check_parameter=_check_parameter,
)
