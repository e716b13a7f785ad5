"""Which of the forms in ``transformers`` a model is, and its weights under their names, both ways.

==============  ==============================================================  =====================================
form            attention                                                       router
==============  ==============================================================  =====================================
Mixtral         plain                                                           K weights divided by their sum
Qwen3-MoE       per-head QK-norm                                                plain or divided; dense blocks first
Qwen3-Next      per-head QK-norm, sigmoid gate on its output, full everywhere   plain or divided; dense blocks first
==============  ==============================================================  =====================================

All have rotary positions, RMSNorm, SwiGLU, no biases and softmax scores. A router's temperature goes into its weight.
Qwen3-Next multiplies by 1 + w in its norms and has a shared expert behind a sigmoid gate. Here the gate's weight is 0,
so that it passes one half, and the down matrix is doubled, exactly; without shared experts the one there is is zero.

Shapes: D model width, F expert width, E experts, H query heads, C head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_core.config import ConfigError, ModelConfig, RunConfig

MIXTRAL, QWEN3_MOE, QWEN3_NEXT = "mixtral", "qwen3_moe", "qwen3_next"
SHARED = 8  # width of the shared expert that Qwen3-Next must have, where the model has none
HALF = 0.5  # what a gate of weight 0 passes
NORMS = ("attn_norm", "mlp_norm", "attn.q_norm", "attn.k_norm")
THEIR_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


def form_of(config: RunConfig) -> str:
    """The form that holds the config's model. Raises ConfigError with the field that none holds."""
    model, router = config.model, config.router

    def refused(name: str, value, why: str) -> ConfigError:
        return ConfigError(f"{name} = {value!r}: no Hugging Face form holds it; {why}")
    if not model.n_experts:
        raise refused("n_experts", 0, "those known here are mixtures of experts")
    if not model.use_rope:
        raise refused("use_rope", False, "they have rotary positions, not learned ones")
    if router.routing != "token":
        raise refused("routing", router.routing, "their tokens choose the experts")
    if router.router_scores != "softmax":
        raise refused("router_scores", router.router_scores, "their scores are 'softmax'")
    if model.bias:
        raise refused("bias", True, "their experts have no biases")
    if model.qk_norm and model.qk_norm_eps != model.norm_eps:
        raise refused("qk_norm_eps", model.qk_norm_eps, f"all norms there share one, norm_eps = {model.norm_eps}")
    if model.skip_first_n_moe and model.mlp != "swiglu":
        raise refused("mlp", model.mlp, "their dense blocks are 'swiglu'")
    next_form = model.qk_norm and model.attn_gate == "sigmoid_head"
    if model.n_shared_experts and not next_form:
        raise refused("n_shared_experts", model.n_shared_experts, "the one with such, Qwen3-Next, has qk_norm and "
                      "attn_gate = 'sigmoid_head'")
    if model.qk_norm:
        return QWEN3_NEXT if next_form else QWEN3_MOE
    if model.attn_gate != "none":
        raise refused("attn_gate", model.attn_gate, "the one with a gate, Qwen3-Next, has QK-norm too")
    if not router.norm_topk_prob:
        raise refused("norm_topk_prob", False, "the one without QK-norm, Mixtral, divides the weights by their sum")
    if model.skip_first_n_moe:
        raise refused("skip_first_n_moe", model.skip_first_n_moe, "the one without QK-norm, Mixtral, is routed in "
                      "every block")
    return MIXTRAL


def refuse_weights(state: Mapping[str, Tensor]) -> None:
    """Raise ConfigError where a weight does something that no form can, whatever the config says."""
    for name, value in state.items():
        if name.endswith("router.bias") and not torch.equal(value, value[:1].expand_as(value)):
            raise ConfigError(f"router_bias = True: no Hugging Face form holds {name}, up to {value.abs().max():.3g}; "
                              "Run.create(..., config.replace(router_bias=False), init_from=run) goes on without it, "
                              "to be trained some more and exported")
        if name == "balance_bias" and not torch.equal(value, value[:, :1].expand_as(value)):
            raise ConfigError(f"balance bias: no Hugging Face form holds one beside softmax scores, and here it is up "
                              f"to {value.abs().max():.3g}; balance = 'aux' or 'none' trains without")


def hf_config(config: RunConfig, form: str, end_of_text: int | None):
    """The ``transformers`` configuration of a model."""
    import transformers

    m, r = config.model, config.router
    common = dict(
        vocab_size=m.vocab_size, hidden_size=m.d_model, num_hidden_layers=m.n_layer, num_attention_heads=m.n_head,
        num_key_value_heads=m.kv_heads, head_dim=m.head_dim, max_position_embeddings=m.block_size,
        rms_norm_eps=m.norm_eps, tie_word_embeddings=True, num_experts_per_tok=r.top_k, hidden_act="silu",
        # No padding here: an embedding's padding row would have no gradient where the model is trained on.
        bos_token_id=None, eos_token_id=end_of_text, pad_token_id=None, dtype="float32",
        router_aux_loss_coef=r.load_balance_alpha if r.uses_aux_loss else 0.0)
    rope = {"rope_type": "default", "rope_theta": m.rope_theta}
    if form == MIXTRAL:
        return transformers.MixtralConfig(**common, intermediate_size=m.ff_width, num_local_experts=m.n_experts,
                                          rope_parameters=rope)
    qwen = common | dict(
        num_experts=m.n_experts, moe_intermediate_size=m.ff_width, norm_topk_prob=r.norm_topk_prob,
        mlp_only_layers=list(range(m.skip_first_n_moe)), intermediate_size=m.dense_width)
    if form == QWEN3_MOE:
        return transformers.Qwen3MoeConfig(**qwen, rope_parameters=rope)
    return transformers.Qwen3NextConfig(
        **qwen, shared_expert_intermediate_size=m.shared_width or SHARED, layer_types=["full_attention"] * m.n_layer,
        rope_parameters=rope | {"partial_rotary_factor": 1.0})


def fields_of(theirs) -> dict[str, Any]:
    """Our fields, by name, of a ``transformers`` configuration. Raises ConfigError with the field that has none."""
    t = theirs
    if t.model_type not in (MIXTRAL, QWEN3_MOE, QWEN3_NEXT):
        raise ConfigError(f"model_type = {t.model_type!r}: must be one of {MIXTRAL}, {QWEN3_MOE}, {QWEN3_NEXT}")
    rope, skipped = t.rope_parameters, list(getattr(t, "mlp_only_layers", None) or [])
    for name, value, wanted in (
            ("tie_word_embeddings", t.tie_word_embeddings, True), ("hidden_act", t.hidden_act, "silu"),
            ("attention_bias", getattr(t, "attention_bias", False), False),
            ("sliding_window", getattr(t, "sliding_window", None), None),
            ("decoder_sparse_step", getattr(t, "decoder_sparse_step", 1), 1),
            ("rope_type", rope.get("rope_type", "default"), "default"),
            ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
            ("layer_types", set(getattr(t, "layer_types", None) or ["full_attention"]), {"full_attention"}),
            ("mlp_only_layers", skipped, list(range(len(skipped)))),
            ("head_dim", getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads,
             t.hidden_size // t.num_attention_heads)):
        if value != wanted:
            raise ConfigError(f"{name} = {value!r} in the folder: must be {wanted!r} for a model of this kind")
    mixtral, shared = t.model_type == MIXTRAL, 0
    if t.model_type == QWEN3_NEXT and t.shared_expert_intermediate_size % t.moe_intermediate_size == 0:
        shared = t.shared_expert_intermediate_size // t.moe_intermediate_size
    return dict(
        vocab_size=t.vocab_size, d_model=t.hidden_size, n_layer=t.num_hidden_layers, n_head=t.num_attention_heads,
        n_kv_heads=t.num_key_value_heads, block_size=t.max_position_embeddings, norm_eps=t.rms_norm_eps,
        qk_norm_eps=t.rms_norm_eps, use_rope=True, rope_theta=float(rope["rope_theta"]), bias=False,
        qk_norm=not mixtral, attn_gate="sigmoid_head" if t.model_type == QWEN3_NEXT else "none",
        n_experts=t.num_local_experts if mixtral else t.num_experts, top_k=t.num_experts_per_tok,
        expert_width=t.intermediate_size if mixtral else t.moe_intermediate_size,
        norm_topk_prob=mixtral or t.norm_topk_prob, n_shared_experts=shared, skip_first_n_moe=len(skipped),
        **({"mlp": "swiglu", "mlp_width": t.intermediate_size} if skipped else {}))


# ---- weights -------------------------------------------------------------------------------------------------

def to_hf(ours: Mapping[str, Tensor], model: ModelConfig, form: str, temp: float) -> dict[str, Tensor]:
    """The state of the ``transformers`` model, from ours; the router's temperature goes into its weight."""
    offset = 1.0 if form == QWEN3_NEXT else 0.0
    theirs = {"model.embed_tokens.weight": ours["embed.weight"], "lm_head.weight": ours["embed.weight"],
              "model.norm.weight": ours["norm.weight"] - offset}
    for layer in range(model.n_layer):
        own, put = _of_layer(ours, f"blocks.{layer}."), _into(theirs, f"model.layers.{layer}.")
        for name, their in zip(NORMS, THEIR_NORMS, strict=True):
            if model.qk_norm or "attn." not in name:
                put(f"{their}.weight", own(f"{name}.weight") - offset)
        for name in ("k_proj", "v_proj", "o_proj"):
            put(f"self_attn.{name}.weight", own(f"attn.{name}.weight"))
        q = own("attn.q_proj.weight")
        if form == QWEN3_NEXT:  # [H * 2C, D]: each head's C query rows, then its C gate rows
            heads = [t.unflatten(0, (-1, model.head_dim)) for t in (q, own("attn.gate_proj.weight"))]
            q = torch.stack(heads, 1).flatten(0, 2)
        put("self_attn.q_proj.weight", q)
        if layer < model.skip_first_n_moe:
            for name in ("gate_proj", "up_proj", "down_proj"):
                put(f"mlp.{name}.weight", own(f"mlp.{name}.weight"))
            continue
        put("mlp.gate.weight", own("mlp.router.weight") / temp)
        gate_up = [own(f"mlp.experts.{name}").mT for name in ("w_gate", "w_up")]
        put("mlp.experts.gate_up_proj", torch.cat(gate_up, 1))  # [E, 2F, D]
        put("mlp.experts.down_proj", own("mlp.experts.w_down").mT.contiguous())
        if form == QWEN3_NEXT:
            zeros = {"gate_proj": (SHARED, model.d_model), "up_proj": (SHARED, model.d_model),
                     "down_proj": (model.d_model, SHARED)}
            for name, shape in zeros.items():
                scale = 1 / HALF if name == "down_proj" else 1.0
                put(f"mlp.shared_expert.{name}.weight", own(f"mlp.shared.{name}.weight") * scale
                    if model.n_shared_experts else q.new_zeros(shape))
            put("mlp.shared_expert_gate.weight", q.new_zeros(1, model.d_model))
    return theirs


def from_hf(theirs: Mapping[str, Tensor], model: ModelConfig, form: str) -> dict[str, Tensor]:
    """Our state from that of the ``transformers`` model: routers without bias, at a temperature of 1.

    Raises ConfigError where the shared expert of Qwen3-Next does what none here can.
    """
    offset = 1.0 if form == QWEN3_NEXT else 0.0
    ours = {"embed.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"] + offset}
    for layer in range(model.n_layer):
        their, put = _of_layer(theirs, f"model.layers.{layer}."), _into(ours, f"blocks.{layer}.")
        for name, own in zip(THEIR_NORMS, NORMS, strict=True):
            if model.qk_norm or "attn." not in name:
                put(f"{own}.weight", their(f"{name}.weight") + offset)
        for name in ("k_proj", "v_proj", "o_proj"):
            put(f"attn.{name}.weight", their(f"self_attn.{name}.weight"))
        q = their("self_attn.q_proj.weight")
        if form == QWEN3_NEXT:
            q, gate = (t.flatten(0, 1) for t in q.unflatten(0, (-1, 2, model.head_dim)).unbind(1))
            put("attn.gate_proj.weight", gate)
        put("attn.q_proj.weight", q)
        if layer < model.skip_first_n_moe:
            for name in ("gate_proj", "up_proj", "down_proj"):
                put(f"mlp.{name}.weight", their(f"mlp.{name}.weight"))
            continue
        put("mlp.router.weight", their("mlp.gate.weight"))
        gate, up = their("mlp.experts.gate_up_proj").chunk(2, dim=1)
        for name, value in (("w_gate", gate), ("w_up", up), ("w_down", their("mlp.experts.down_proj"))):
            put(f"mlp.experts.{name}", value.mT)
        if model.n_shared_experts:
            if their("mlp.shared_expert_gate.weight").any():
                raise ConfigError(f"gate of the shared expert of layer {layer} in the folder: must be zero, those of a "
                                  "model of this kind pass whole")
            for name in ("gate_proj", "up_proj", "down_proj"):
                scale = HALF if name == "down_proj" else 1.0
                put(f"mlp.shared.{name}.weight", their(f"mlp.shared_expert.{name}.weight") * scale)
        elif form == QWEN3_NEXT and their("mlp.shared_expert.down_proj.weight").any():
            raise ConfigError(f"shared expert of layer {layer} in the folder: must be zero, a model of this kind has "
                              "none")
    return {name: value.contiguous() for name, value in ours.items()}


def _of_layer(state: Mapping[str, Tensor], prefix: str) -> Callable[[str], Tensor]:
    return lambda name: state[prefix + name]


def _into(state: dict[str, Tensor], prefix: str) -> Callable[[str, Tensor], None]:
    return lambda name, value: state.__setitem__(prefix + name, value)
