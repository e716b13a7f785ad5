"""Rotary positions (Su et al. 2021) in the half-split layout, which is Hugging Face's too.

Shapes: S positions, C head width, * whatever stands before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tables = tuple[Tensor, Tensor]


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device,
                dtype: torch.dtype = torch.float32) -> Tables:
    """Cosine and signed sine of position times ``theta ** (-2i/C)``, each [S, 1, C]; the first half's sine is negated.

    The angles are float32 whatever the ``dtype`` of the tables.
    """
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(position, 1.0 / theta**exponent).unsqueeze(1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def apply_rope(x: Tensor, tables: Tables) -> Tensor:
    """Rotate each pair (i, i + C/2) of every head's row in [*, S, heads, C] by the angle of its position."""
    return _Rotation.apply(x, *tables)


def _halves_swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((second, first), -1)


class _Rotation(torch.autograd.Function):
    """Linear in x: its backward needs the tables alone, and takes fewer passes than autograd would."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, _halves_swapped(x), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return grad * cos + _halves_swapped(grad * sin), None, None
