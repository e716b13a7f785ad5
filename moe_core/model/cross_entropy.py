"""Cross-entropy of a linear head without ever holding all its logits.

The head's gradient needs the logits once, right after they are made; so each chunk of rows is turned from logits
into its part of both gradients and forgotten. No product is computed twice. (Wijmans et al. 2024, "Cut Your Losses";
Hsu et al. 2024, "Liger Kernel" do the same in kernels of their own.)

N rows, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of a chunk's logits, at most. On a CPU they should stay in its cache: of a vocabulary of 4096, 128 rows in
# float32 and 256 in bfloat16 took two thirds and half of the time of all 4096 at once. Compiled code passes over them
# less often and is as quick with four times as many; a compiler lays out every chunk anew, and took 24 s for the 32
# chunks of 4096 rows, 6 s for 8. A GPU wants products large enough to fill it.
CPU_CHUNK, COMPILED_CPU_CHUNK, CUDA_CHUNK = 1 << 21, 1 << 23, 1 << 28
LEAST_ROWS = 128


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Mean cross-entropy, float32 and in nats, of ``x_ND @ weight_VD.T`` against int64 ``targets_N``.

    The product is in the dtype of ``x_ND``, everything after it in float32 at least; the gradient of the weight is
    summed in the weight's own dtype.
    """
    if not torch.is_grad_enabled():  # of which a torch.autograd.Function knows nothing
        x_ND, weight_VD = x_ND.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N)


def rows_of_a_chunk(vocab_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows whose logits are held at a time."""
    on_cpu = COMPILED_CPU_CHUNK if torch.compiler.is_compiling() else CPU_CHUNK
    most = CUDA_CHUNK if device.type == "cuda" else on_cpu
    return max(LEAST_ROWS, most // (vocab_size * dtype.itemsize))


def is_one_kernel(x_ND: Tensor) -> bool:
    """Whether all between a chunk's products becomes one kernel, as a compiler makes it for a GPU. On a CPU the
    exponential, which it takes twice then, costs more than memory: compiled, float32 steps of nano were 4 % longer.
    """
    return x_ND.is_cuda and torch.compiler.is_compiling()


def _in_place(logits_RV: Tensor, target_R1: Tensor, n: int, wants: bool) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of some rows of ``n``; where wanted the mean's gradient, in the memory of the logits."""
    top_R1 = logits_RV.amax(-1, keepdim=True)
    picked_R1 = logits_RV.gather(1, target_R1)
    p_RV = logits_RV.sub_(top_R1).exp_()
    sum_R1 = p_RV.sum(-1, keepdim=True)
    loss = (sum_R1.log() + top_R1 - picked_R1).sum()
    if not wants:
        return loss, None
    p_RV.mul_(1.0 / (n * sum_R1))  # (softmax - one-hot) / n
    return loss, p_RV.scatter_add_(1, target_R1, torch.full_like(picked_R1, -1.0 / n))  # one target a row


def _in_one_kernel(logits_RV: Tensor, target_R1: Tensor, n: int, wants: bool) -> tuple[Tensor, Tensor]:
    """:func:`_in_place` in a form that reads the logits and writes the gradient, in the dtype that this is cast to. A
    scatter would want the gradient in float32 between passes of their own: by the compiler's count of bytes for
    ``moe-203m``, 4.0 GB a chunk of 4,096 rows in place of 1.6.
    """
    is_target_RV = target_R1 == torch.arange(logits_RV.shape[1], device=logits_RV.device)
    picked_R1 = torch.where(is_target_RV, logits_RV, 0.0).sum(-1, keepdim=True)
    lse_R1 = logits_RV.logsumexp(-1, keepdim=True)
    return (lse_R1 - picked_R1).sum(), ((logits_RV - lse_R1).exp() - is_target_RV.to(logits_RV.dtype)) / n


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        n, wants = len(x_ND), any(ctx.needs_input_grad)
        w_VD = weight_VD.to(x_ND.dtype)
        grad_x_ND = torch.empty_like(x_ND) if wants else None
        grad_w_VD = torch.zeros_like(weight_VD) if wants else None
        total = torch.zeros((), device=x_ND.device, dtype=torch.promote_types(x_ND.dtype, torch.float32))
        rows = rows_of_a_chunk(len(weight_VD), x_ND.device, x_ND.dtype)
        of_chunk = _in_one_kernel if is_one_kernel(x_ND) else _in_place
        for start in range(0, n, rows):
            x_RD, target_R1 = x_ND[start : start + rows], targets_N[start : start + rows, None]
            loss, g_RV = of_chunk((x_RD @ w_VD.T).to(total.dtype), target_R1, n, wants)
            total += loss
            if wants:
                g_RV = g_RV.to(x_ND.dtype)
                grad_x_ND[start : start + rows] = g_RV @ w_VD
                if weight_VD.dtype == g_RV.dtype:
                    grad_w_VD.addmm_(g_RV.T, x_RD)
                else:
                    grad_w_VD += g_RV.T @ x_RD
        ctx.save_for_backward(grad_x_ND, grad_w_VD)
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        return grad_x_ND * grad.to(grad_x_ND.dtype), grad_w_VD * grad.to(grad_w_VD.dtype), None
