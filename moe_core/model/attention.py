"""Causal self-attention with the choices of its config, and the small layers that every block shares.

Grouped-query attention (Ainslie et al. 2023), rotary positions (Su et al. 2021), per-head QK-norm (Henry et
al. 2020), an element-wise sigmoid gate on the attention output (Qiu et al. 2025, "Gated Attention").

Shapes: B batch, S sequence, D model width, H query heads, G key and value heads, C head width (D = H * C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_core.config import ModelConfig
from moe_core.model.cache import LayerCache


class Linear(nn.Linear):
    """``nn.Linear`` that computes in its input's dtype; weight and bias stay float32 masters.

    Both are left uninitialised: :class:`~moe_core.model.Transformer` fills every weight from one private
    generator.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self):
        """Draws nothing: torch's default would consume the global random stream, which is the user's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    """``nn.Embedding`` whose weight is left uninitialised, as :class:`Linear`'s is."""

    def reset_parameters(self):
        """Draws nothing: see :meth:`Linear.reset_parameters`."""


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last dimension (Zhang and Sennrich 2019), times a weight of its size.

    The statistics of bfloat16 input are accumulated in float32.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [S, C/2] float32, of position times ``theta ** (-2i/C)``.

    Made anew for each forward: they cost nothing beside a layer, and a buffer would be cast by ``model.to``.
    """
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(position, 1.0 / theta**exponent)
    return angle.cos(), angle.sin()


def apply_rope(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Rotate each pair (i, i + C/2) of a head by its angle: the half-split layout, as Hugging Face's."""
    a, b = x_BHSC.chunk(2, dim=-1)
    return torch.cat((a * cos_SC - b * sin_SC, b * cos_SC + a * sin_SC), dim=-1).to(x_BHSC.dtype)


class Attention(nn.Module):
    """Causal attention, [B, S, D] -> [B, S, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.is_grouped = config.kv_heads < config.n_head
        width_D, width_kv = config.d_model, config.kv_heads * config.head_dim
        self.q_proj = Linear(width_D, width_D, config.bias)
        self.k_proj = Linear(width_D, width_kv, config.bias)
        self.v_proj = Linear(width_D, width_kv, config.bias)
        self.o_proj = Linear(width_D, width_D, config.bias)
        self.gate_proj = Linear(width_D, width_D, config.bias) if config.attn_gate == "sigmoid_head" else None
        self.q_norm = RMSNorm(self.head_dim, config.qk_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.qk_norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor] | None, cache: LayerCache | None = None) -> Tensor:
        """``rope`` holds the tables of :func:`rope_tables`; None where positions are learned. ``cache``: keys and
        values of earlier tokens, which this adds to; None is a sequence by itself.
        """
        q_BSHC, k_BSGC, v_BSGC = (
            proj(x_BSD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q_BSHC, k_BSGC = self.q_norm(q_BSHC), self.k_norm(k_BSGC)
        q_BHSC, k_BGSC, v_BGSC = (t.transpose(1, 2) for t in (q_BSHC, k_BSGC, v_BSGC))
        if rope is not None:
            q_BHSC, k_BGSC = apply_rope(q_BHSC, *rope), apply_rope(k_BGSC, *rope)
        mask = None
        if cache is not None:
            k_BGSC, v_BGSC, mask = cache.extend(k_BGSC, v_BGSC)
        y_BHSC = F.scaled_dot_product_attention(
            q_BHSC, k_BGSC, v_BGSC, attn_mask=mask, is_causal=mask is None, enable_gqa=self.is_grouped
        )
        y_BSD = y_BHSC.transpose(1, 2).flatten(-2)
        if self.gate_proj is not None:
            y_BSD = y_BSD * self.gate_proj(x_BSD).sigmoid()
        return self.o_proj(y_BSD)
