"""How large a model is and what a token costs, from its structure alone."""

from __future__ import annotations

from moe_core.config import ModelConfig


def _attention_weights(model: ModelConfig) -> int:
    D, width_kv = model.d_model, model.kv_heads * model.head_dim
    return (2 + (model.attn_gate != "none")) * D * D + 2 * D * width_kv


def _dense_weights(model: ModelConfig) -> int:
    return (3 if model.mlp == "swiglu" else 2) * model.d_model * model.dense_width


def _block_weights(model: ModelConfig, n_experts: int) -> int:
    """Weights in the matrices of all blocks, with ``n_experts`` of a layer's experts (those held, or those met).

    A head for tokens further on is a dense block.
    """
    D = model.d_model
    routed = D * model.n_experts + 3 * D * (n_experts * model.ff_width + model.shared_width)
    n_dense = model.n_layer - model.n_moe_layer + model.n_mtp
    return ((model.n_layer + model.n_mtp) * _attention_weights(model) + n_dense * _dense_weights(model)
            + model.n_moe_layer * routed)


def _vectors(model: ModelConfig) -> int:
    """Norms and biases of all blocks."""
    D, n_dense = model.d_model, model.n_layer - model.n_moe_layer + model.n_mtp
    count = (model.n_layer + model.n_mtp) * (2 * D + 2 * model.head_dim * model.qk_norm)
    count += model.n_moe_layer * model.n_experts * model.router_bias
    if model.bias:
        attention = (2 + (model.attn_gate != "none")) * D + 2 * model.kv_heads * model.head_dim
        dense = (2 if model.mlp == "swiglu" else 1) * model.dense_width + D
        routed = model.n_experts * (2 * model.ff_width + D)
        if model.n_shared_experts:
            routed += 2 * model.shared_width + D
        count += (model.n_layer + model.n_mtp) * attention + n_dense * dense + model.n_moe_layer * routed
    return count


def count_params(model: ModelConfig) -> int:
    """The number of parameters of a :class:`~moe_core.model.Transformer` of this shape, without building one."""
    embeddings = (model.vocab_size + (0 if model.use_rope else model.block_size)) * model.d_model
    return embeddings + _block_weights(model, model.n_experts) + _vectors(model) + model.d_model


def flops_per_token(model: ModelConfig, top_k: int, seq_len: int | None = None) -> int:
    """Forward and backward, in the PaLM convention (Chowdhery et al. 2022, appendix B).

    Six for each matrix weight that a token meets (K experts of E, shared ones, the tied head, no norms), and 12 D S in
    each block for attention, not halved for causality. ``seq_len`` None is ``block_size``. Each head for tokens
    further on counts as a dense block and one more product with the tied head.
    """
    attention = 12 * (model.n_layer + model.n_mtp) * model.d_model * (seq_len or model.block_size)
    return 6 * (_block_weights(model, top_k) + (1 + model.n_mtp) * model.vocab_size * model.d_model) + attention
