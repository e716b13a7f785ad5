"""Muon: momentum, orthogonalised (Jordan et al. 2024; the second scale rule is Liu et al.'s, 2025).

A matrix is [out, in], as ``nn.Linear`` stores it; a stack is [E, in, out], as :class:`~moe_core.model.Experts`
stores its own, and each of its E matrices is orthogonalised by itself. All matrices of one shape go through
the same batched products.

Shapes: E experts; N matrices of R rows and C columns in a batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_core.optim.rule import Group, Rule, State, tensor_state, unless, with_gradient

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0; singular values end around 1, not at it
STEPS = 5
EPS = 1e-7  # added to the Frobenius norm
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

# Elements in one batched product. A CPU is quickest when they stay in its cache: two matrices of 512 x 1408.
_BATCH_ELEMENTS_CPU, _BATCH_ELEMENTS = 1 << 21, 1 << 25


def newton_schulz(x_NRC: Tensor) -> Tensor:
    """Push the singular values of each matrix to around 1, in the dtype of ``x_NRC``.

    They must be at most 1, which dividing by the Frobenius norm ensures. In exact arithmetic those above
    0.002 end in [0.68, 1.21]; smaller ones grow by a factor of up to 485.
    """
    a, b, c = COEFFICIENTS
    wide = x_NRC.shape[1] <= x_NRC.shape[2]
    for _ in range(STEPS):
        gram = x_NRC @ x_NRC.mT if wide else x_NRC.mT @ x_NRC  # the smaller of the two
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        # aI goes into the small matrix: to add aX to the product would cost a copy of X.
        poly.diagonal(dim1=1, dim2=2).add_(a)
        x_NRC = poly @ x_NRC if wide else x_NRC @ poly
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


class _Piece(NamedTuple):
    """Some matrices of one parameter: views of it, of its gradient and of its momentum, each [N, R, C]."""

    p: Tensor
    grad: Tensor
    momentum: Tensor
    scale: float
    moves: Tensor | float  # 1, or 0 for what is skipped: 0-D, or [N, 1, 1] for each expert


def _pieces(group: Group, state: State, found_inf: Tensor | None) -> Iterator[_Piece]:
    applies = unless(found_inf, 1.0, 0.0)
    for p, g in with_gradient("Muon", group):
        (momentum,) = tensor_state(state, p, "momentum")
        views = [x.detach().view(-1, *p.shape[-2:]) for x in (p, g, momentum)]
        at_once = max(1, _limit(p) // views[0][0].numel())
        for part in zip(*(view.split(at_once) for view in views), strict=True):
            moves = applies
            if group["starved"] == "skip" and p.ndim == 3:
                # A factor: to branch on it, the host would have to wait for the device. NaN is unequal to 0, and the
                # gradient of a step that is withheld is 0.
                norm = torch.linalg.vector_norm(part[1], math.inf, dim=(1, 2), keepdim=True)
                moves = (norm != 0).to(p.dtype)
            yield _Piece(*part, update_scale(p, group["scale"]), moves)


def _limit(p: Tensor) -> int:
    return _BATCH_ELEMENTS_CPU if p.device.type == "cpu" else _BATCH_ELEMENTS


def _packs(pieces: Iterable[_Piece]) -> list[list[_Piece]]:
    """Pieces of one matrix shape together, up to the limit of their device."""
    open_packs, packs = defaultdict(list), []
    for piece in pieces:
        pack = open_packs[(*piece.p.shape[1:], piece.p.dtype, piece.p.device)]
        if pack and sum(other.p.numel() for other in (*pack, piece)) > _limit(piece.p):
            packs.append(pack.copy())
            pack.clear()
        pack.append(piece)
    return packs + list(open_packs.values())


def _update(group: Group, state: State, found_inf: Tensor | None) -> None:
    lr, decay, mu = group["lr"], group["weight_decay"], group["momentum"]
    for pack in _packs(_pieces(group, state, found_inf)):
        directions = []
        for piece in pack:
            piece.momentum.lerp_(piece.grad, (1 - mu) * piece.moves)
            directions.append(piece.grad.lerp(piece.momentum, mu))
        x_NRC = directions[0] if len(pack) == 1 else torch.cat(directions)
        x_NRC = x_NRC.div_(torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True) + EPS)
        x_NRC = newton_schulz(x_NRC.to(DTYPES[group["ns_dtype"]]))
        for piece, update in zip(pack, x_NRC.split([len(piece.p) for piece in pack]), strict=True):
            piece.p.mul_(1 - lr * decay * piece.moves)
            update = update.to(piece.p.dtype)  # adding across dtypes is slower than this
            if isinstance(piece.moves, Tensor):
                update = update * piece.moves
            piece.p.add_(update, alpha=-lr * piece.scale)


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
