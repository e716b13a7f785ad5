"""Causal self-attention with the choices of its config.

Grouped-query attention (Ainslie et al. 2023), rotary positions (Su et al. 2021), per-head QK-norm (Henry et
al. 2020), an element-wise sigmoid gate on the attention output (Qiu et al. 2025, "Gated Attention").

Shapes: B batch, S sequence, D model width, H query heads, G key and value heads, C head width (D = H * C).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe_core.config import ModelConfig
from moe_core.model.cache import LayerCache
from moe_core.model.causal import causal_attention
from moe_core.model.linear import Linear, side_by_side
from moe_core.model.norm import RMSNorm
from moe_core.model.rope import Tables, apply_rope


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

    def forward(self, x_BSD: Tensor, rope: Tables | None, cache: LayerCache | None = None) -> Tensor:
        """``rope`` holds the tables of :func:`~moe_core.model.rope.rope_tables`; None where positions are learned.
        ``cache``: keys and values of earlier tokens, which this adds to; None is a sequence by itself.
        """
        layers = [self.q_proj, self.k_proj, self.v_proj] + ([] if self.gate_proj is None else [self.gate_proj])
        q, k, v, *gate = side_by_side(x_BSD, layers)
        q_BSHC, k_BSGC, v_BSGC = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.q_norm is not None:
            q_BSHC, k_BSGC = self.q_norm(q_BSHC), self.k_norm(k_BSGC)
        if rope is not None:
            q_BSHC, k_BSGC = apply_rope(q_BSHC, rope), apply_rope(k_BSGC, rope)
        q_BHSC, k_BGSC, v_BGSC = (t.transpose(1, 2) for t in (q_BSHC, k_BSGC, v_BSGC))
        mask = None
        if cache is not None:
            k_BGSC, v_BGSC, mask = cache.extend(k_BGSC, v_BGSC)
        if mask is None:
            y_BHSC = causal_attention(q_BHSC, k_BGSC, v_BGSC)
        else:
            y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSC, mask, enable_gqa=self.is_grouped)
        y_BSD = y_BHSC.transpose(1, 2).flatten(-2)
        if gate:
            y_BSD = y_BSD * gate[0].sigmoid()
        return self.o_proj(y_BSD)
