"""The same weights give the same logits as Hugging Face's model of the same architecture.

Every weight is random and of a size that makes the logits of order 1: fresh models, with their norms at 1 and
small matrices, would agree to 1e-5 whatever they compute.
"""

import pytest
import torch
import transformers

from moe_core.config import RunConfig
from moe_core.hf.forms import MIXTRAL, QWEN3_MOE, QWEN3_NEXT, fields_of, form_of, from_hf, to_hf
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


def assert_same_logits(hf, config, form, seed, impl):
    """Ours from theirs, to 1e-5; and theirs from ours again, which computes the same to the bit."""
    config = config.replace(router_bias=False)
    assert form_of(config) == form
    ours = from_hf(hf.state_dict(), config.model, form)
    model = Transformer(config.model, config.router, experts_impl=impl).eval()
    model.load_state_dict(ours)
    tokens = torch.randint(97, (2, 50), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, actual = hf(tokens).logits, model(tokens).logits_BSV
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert fields_of(hf.config).items() <= {**config.to_dict()["model"], **config.to_dict()["router"]}.items()
    shared = {name: value for name, value in hf.state_dict().items() if "shared_expert" in name}
    hf.load_state_dict(to_hf(ours, config.model, form, temp=1.0) | shared)
    with torch.no_grad():
        assert torch.equal(hf(tokens).logits, expected)


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_mixtral(seed, impl):
    """Top-2 with normalised weights, grouped-query attention, rotary positions."""
    hf = randomise(transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **SHAPE, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0})), seed)
    assert_same_logits(hf, OURS.replace(top_k=2, norm_topk_prob=True), MIXTRAL, seed, impl)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_qwen3_moe(seed, norm):
    """Top-2, with plain and with normalised weights, per-head QK-norm, one dense block first."""
    hf = randomise(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=24, intermediate_size=40, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=norm, mlp_only_layers=[0],
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0})), seed)
    config = OURS.replace(top_k=2, norm_topk_prob=norm, qk_norm=True, skip_first_n_moe=1, mlp_width=40)
    assert_same_logits(hf, config, QWEN3_MOE, seed, "grouped")


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
    assert_same_logits(hf, config, QWEN3_NEXT, seed, impl)
