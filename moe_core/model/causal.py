"""Causal softmax attention: torch's own kernel, and block by block where a CPU is quicker so.

torch's kernel passes over bfloat16 on a CPU element by element: 8 x 128 tokens of 4 heads took it two to four times as
long as plain products do. In blocks of queries half of the scores, those that the mask would hide, are never computed.

Shapes: B batch, H query heads, G key and value heads, S sequence, C head width, N = B * H, R queries of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries of a block
LONGEST = 512  # tokens; from 1,024 on torch's kernel won


def causal_attention(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor) -> Tensor:
    """``softmax(q k' / sqrt(C)) v`` where a query sees its own and earlier positions: [B, H, S, C].

    Each of the G key and value heads serves H / G query heads side by side.
    """
    if q_BHSC.device.type == "cpu" and q_BHSC.dtype is torch.bfloat16 and q_BHSC.shape[2] <= LONGEST:
        return attention_in_blocks(q_BHSC, k_BGSC, v_BGSC)
    return F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSC, is_causal=True,
                                          enable_gqa=k_BGSC.shape[1] < q_BHSC.shape[1])


def attention_in_blocks(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor) -> Tensor:
    """:func:`causal_attention`, BLOCK queries at a time. In bfloat16 the scores are rounded to it before the softmax;
    torch's kernel holds them in float32. The probabilities are kept for the backward, S * S / 2 a head.
    """
    (B, H), G = q_BHSC.shape[:2], k_BGSC.shape[1]
    k_BHSC, v_BHSC = (t if G == H else t.repeat_interleave(H // G, 1) for t in (k_BGSC, v_BGSC))
    y_NSC = _Blockwise.apply(*(t.flatten(0, 1) for t in (q_BHSC, k_BHSC, v_BHSC)))
    return y_NSC.unflatten(0, (B, H))


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_NSC: Tensor, k_NSC: Tensor, v_NSC: Tensor) -> Tensor:
        S, C = q_NSC.shape[1:]
        blocks, probs = [], []
        for start in range(0, S, BLOCK):
            end = min(S, start + BLOCK)
            later_RS = q_NSC.new_full((end - start, end), -torch.inf).triu_(1 + start)
            scores_NRS = torch.baddbmm(later_RS, q_NSC[:, start:end], k_NSC[:, :end].mT, alpha=C**-0.5)
            probs.append(scores_NRS.softmax(-1))
            blocks.append(torch.bmm(probs[-1], v_NSC[:, :end]))
        ctx.save_for_backward(q_NSC, k_NSC, v_NSC, *probs)
        return torch.cat(blocks, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NSC: Tensor):
        q_NSC, k_NSC, v_NSC, *probs = ctx.saved_tensors
        S, C = q_NSC.shape[1:]
        grad_k_NSC, grad_v_NSC, grads_q = torch.zeros_like(k_NSC), torch.zeros_like(v_NSC), []
        for i, p_NRS in enumerate(probs):
            start, end = i * BLOCK, min(S, (i + 1) * BLOCK)
            grad_NRC = grad_NSC[:, start:end]
            grad_v_NSC[:, :end].baddbmm_(p_NRS.mT, grad_NRC)
            grad_p_NRS = torch.bmm(grad_NRC, v_NSC[:, :end].mT)
            grad_s_NRS = torch.ops.aten._softmax_backward_data(grad_p_NRS, p_NRS, -1, p_NRS.dtype)
            grads_q.append(torch.bmm(grad_s_NRS, k_NSC[:, :end]))
            grad_k_NSC[:, :end].baddbmm_(grad_s_NRS.mT, q_NSC[:, start:end], alpha=C**-0.5)
        return torch.cat(grads_q, 1).mul_(C**-0.5), grad_k_NSC, grad_v_NSC
