"""Root-mean-square norm (Zhang and Sennrich 2019), with a gradient in closed form for the CPU.

Shapes: D the last dimension, * those before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last dimension, times a weight of its size.

    The statistics of bfloat16 input are accumulated in float32.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        # A GPU has one kernel for it, and a compiler makes one; on a CPU torch composes it of a dozen passes.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _ClosedForm.apply(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class _ClosedForm(torch.autograd.Function):
    """``y = x r w`` with ``r = (mean(x^2) + eps) ** -0.5``; ``dx = r (g w - n mean(g w n))`` and ``dw = sum(g n)``
    with ``n = x r``.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w_D: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w_D, r)
        return (x * r).mul_(w_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, w_D, r = ctx.saved_tensors
        n = x * r
        grad_w = grad * n
        mean = (grad_w @ w_D.to(n.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        grad_w_D = grad_w.flatten(0, -2).sum(0).to(w_D.dtype)
        grad_x = (grad * w_D).to(n.dtype).sub_(n.mul_(mean)).mul_(r)
        return grad_x.to(x.dtype), grad_w_D, None
