"""The same weights give the same logits as Hugging Face's model of the same architecture.

Every weight is random and of a size that makes the logits of order 1: fresh models, with their norms at 1 and
small matrices, would agree to 1e-5 whatever they compute.
"""

import pytest
import torch
import transformers

from moe_core.config import RunConfig
from moe_core.model import Transformer

SHAPE = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True)
OURS = RunConfig().replace(vocab_size=97, d_model=32, n_layer=3, n_head=4, n_kv_heads=2, block_size=64,
                           n_experts=4, expert_width=24, norm_eps=1e-5, qk_norm_eps=1e-5, rope_theta=5000.0)


def randomise(hf, seed):
    """Norm weights anywhere in 1 +- 0.5 or 0 +- 0.5, matrices [..., out, in] with a gain of 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.dim() == 1:
                p.add_(torch.rand(p.shape, generator=generator) - 0.5)
            else:
                scale = 0.3 if "embed" in name else p.shape[-1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return hf.float().eval()


def weights_for_ours(hf, norm_offset=0.0, gated=False):
    """Our state dict from Hugging Face's; ``norm_offset`` 1 for norms that multiply by 1 + w."""
    theirs, ours = hf.state_dict(), {"embed.weight": hf.model.embed_tokens.weight,
                                     "norm.weight": hf.model.norm.weight + norm_offset}
    for layer in range(SHAPE["num_hidden_layers"]):
        def their(name, layer=layer):
            return theirs[f"model.layers.{layer}.{name}"]

        def put(name, tensor, layer=layer):
            ours[f"blocks.{layer}.{name}"] = tensor

        put("attn_norm.weight", their("input_layernorm.weight") + norm_offset)
        put("mlp_norm.weight", their("post_attention_layernorm.weight") + norm_offset)
        q = their("self_attn.q_proj.weight")
        if gated:  # [H * 2C, D]: each head's C query rows, then its C gate rows
            q, gate = (t.flatten(0, 1) for t in q.unflatten(0, (-1, 2, SHAPE["head_dim"])).unbind(1))
            put("attn.gate_proj.weight", gate)
            for norm in ("q_norm", "k_norm"):
                put(f"attn.{norm}.weight", their(f"self_attn.{norm}.weight") + norm_offset)
        put("attn.q_proj.weight", q)
        for name in ("k_proj", "v_proj", "o_proj"):
            put(f"attn.{name}.weight", their(f"self_attn.{name}.weight"))
        router = their("mlp.gate.weight")
        put("mlp.router.weight", router)
        put("mlp.router.bias", torch.zeros(len(router)))
        gate, up = their("mlp.experts.gate_up_proj").chunk(2, dim=1)  # [E, 2F, D]
        put("mlp.experts.w_gate", gate.mT)
        put("mlp.experts.w_up", up.mT)
        put("mlp.experts.w_down", their("mlp.experts.down_proj").mT)
    return ours


def assert_same_logits(hf, config, state, seed, impl):
    model = Transformer(config.model, config.router, experts_impl=impl).eval()
    model.load_state_dict(state)
    tokens = torch.randint(97, (2, 50), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, actual = hf(tokens).logits, model(tokens).logits_BSV
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_mixtral(seed, impl):
    """Top-2 with normalised weights, grouped-query attention, rotary positions."""
    hf = randomise(transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **SHAPE, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0})), seed)
    assert_same_logits(hf, OURS.replace(top_k=2, norm_topk_prob=True), weights_for_ours(hf), seed, impl)


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_qwen3_next_with_full_attention(seed, impl):
    """Top-1 with its plain probability, per-head QK-norm, sigmoid gate on the attention output."""
    hf = randomise(transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(
        **SHAPE, moe_intermediate_size=24, shared_expert_intermediate_size=8, num_experts=4,
        num_experts_per_tok=1, norm_topk_prob=False, layer_types=["full_attention"] * 3,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0})), seed)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.mlp.shared_expert.down_proj.weight.zero_()
    config = OURS.replace(top_k=1, qk_norm=True, attn_gate="sigmoid_head")
    assert_same_logits(hf, config, weights_for_ours(hf, norm_offset=1.0, gated=True), seed, impl)
