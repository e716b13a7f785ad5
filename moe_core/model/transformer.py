"""A pre-norm decoder-only transformer, MoE or dense: tokens -> loss terms and router statistics.

Shapes: B batch, S sequence, T = B * S tokens, D model width, F width of an expert or of a dense MLP,
E experts, K picks of a token, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_core.config import ModelConfig, RouterConfig
from moe_core.model.attention import Attention, Embedding, Linear, RMSNorm, rope_tables
from moe_core.model.experts import Experts
from moe_core.model.router import Router, RouterControls, RouterStats, Routing, draw_noise


@dataclass(frozen=True)
class Output:
    """What one forward gives. The total to minimise is ``ce + alpha * balance + z_coef * z``."""

    losses: dict[str, Tensor]  # 0-D float32: "ce" with targets; "balance" and "z", means over L, for a MoE
    balance_L: Tensor | None  # detached, of each layer; None when dense, as the two below
    z_L: Tensor | None
    stats: RouterStats | None  # each tensor with a leading L
    router_logits: tuple[Tensor, ...] | None  # of each layer, raw, detached: float32 [T, E], not copied together
    logits_BSV: Tensor | None  # in the compute dtype; None where targets are given and nobody asked


class MLP(nn.Module):
    """The feed-forward part of a dense block, without biases: SwiGLU (Shazeer 2020) or GELU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.d_model, config.ff_width)
        self.gate_proj = Linear(config.d_model, config.ff_width) if config.mlp == "swiglu" else None
        self.down_proj = Linear(config.ff_width, config.d_model)

    def forward(self, x_BSD: Tensor) -> Tensor:
        up_BSF = self.up_proj(x_BSD)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(up_BSF))
        return self.down_proj(F.silu(self.gate_proj(x_BSD)) * up_BSF)


class MoE(nn.Module):
    """The feed-forward part of a MoE block: a router, and the experts it sends each token to."""

    def __init__(self, model: ModelConfig, router: RouterConfig, experts_impl: str):
        super().__init__()
        self.router = Router(model.d_model, model.n_experts, router)
        self.experts = Experts(model.n_experts, model.d_model, model.ff_width, experts_impl)

    def forward(self, x_BSD: Tensor, controls: RouterControls,
                noise_TE: Tensor | None) -> tuple[Tensor, Routing]:
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD, controls, noise_TE)
        return self.experts(x_TD, routing).view_as(x_BSD), routing


class Block(nn.Module):
    """Attention, then experts or a dense MLP, each on the normed residual stream and added to it."""

    def __init__(self, model: ModelConfig, router: RouterConfig, experts_impl: str):
        super().__init__()
        self.attn_norm = RMSNorm(model.d_model, model.norm_eps)
        self.attn = Attention(model)
        self.mlp_norm = RMSNorm(model.d_model, model.norm_eps)
        self.mlp = MoE(model, router, experts_impl) if model.n_experts else MLP(model)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor] | None, controls: RouterControls | None,
                noise_TE: Tensor | None) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), rope)
        if isinstance(self.mlp, MLP):
            return x_BSD + self.mlp(self.mlp_norm(x_BSD)), None
        y_BSD, routing = self.mlp(self.mlp_norm(x_BSD), controls, noise_TE)
        return x_BSD + y_BSD, routing


class Transformer(nn.Module):
    """The model. Parameters are float32 masters; activations are in ``compute_dtype``, the router in float32.

    ``seed`` fills the weights from a generator of their own, the same on every device; None takes a fresh
    one. ``experts_impl`` is "grouped" or "loop". Built under ``torch.device("meta")`` it holds shapes only.
    """

    def __init__(self, model: ModelConfig, router: RouterConfig, *,
                 compute_dtype: torch.dtype = torch.float32, experts_impl: str = "grouped",
                 seed: int | None = None):
        super().__init__()
        self.config, self.router_config, self.compute_dtype = model, router, compute_dtype
        self.embed = Embedding(model.vocab_size, model.d_model)
        self.positions = None if model.use_rope else Embedding(model.block_size, model.d_model)
        self.blocks = nn.ModuleList(Block(model, router, experts_impl) for _ in range(model.n_layer))
        self.norm = RMSNorm(model.d_model, model.norm_eps)
        if not self.embed.weight.is_meta:
            initialise(self, seed)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None, *,
                controls: RouterControls | None = None, generator: torch.Generator | None = None,
                return_logits: bool = False) -> Output:
        """Loss terms of int64 ``tokens_BS`` against ``targets_BS`` (the tokens moved up by one).

        ``controls`` None is plain inference: the router's final temperature, no noise. In training mode the
        selection noise of all layers is drawn from ``generator`` (on the model's device; None is torch's
        global one), whatever its scale, so that a turned knob leaves later random numbers where they were;
        in eval mode none is drawn. Raises ValueError for a sequence longer than ``block_size``.
        """
        noise_LTE = None
        if self.training and self.config.n_experts:
            shape = (self.config.n_layer, tokens_BS.numel(), self.config.n_experts)
            noise_LTE = draw_noise(self.router_config.router_noise_type, shape, generator, tokens_BS.device)
        return self.compute(tokens_BS, targets_BS, controls, noise_LTE, return_logits)

    def compute(self, tokens_BS: Tensor, targets_BS: Tensor | None, controls: RouterControls | None,
                noise_LTE: Tensor | None, return_logits: bool = False) -> Output:
        """:meth:`forward` with the noise given: a function of its arguments, and one graph under compile."""
        config, length = self.config, tokens_BS.shape[1]
        if length > config.block_size:
            raise ValueError(f"a sequence of {length} tokens: must be at most "
                             f"block_size = {config.block_size}")
        if controls is None and config.n_experts:
            controls = RouterControls.constant(self.router_config.router_temp_final, 0.0,
                                               self.router_config.capacity_factor, tokens_BS.device)
        x_BSD, rope = self.embed(tokens_BS), None
        if self.positions is not None:
            x_BSD = x_BSD + self.positions.weight[:length]
        else:
            rope = rope_tables(length, config.head_dim, config.rope_theta, tokens_BS.device)
        x_BSD, routings = x_BSD.to(self.compute_dtype), []
        for layer, block in enumerate(self.blocks):
            noise_TE = None if noise_LTE is None else noise_LTE[layer]
            x_BSD, routing = block(x_BSD, rope, controls, noise_TE)
            routings.append(routing)
        logits_BSV = F.linear(self.norm(x_BSD), self.embed.weight.to(x_BSD.dtype))

        losses, balance_L, z_L, stats, router_logits = {}, None, None, None, None
        if targets_BS is not None:
            # In float32: a bfloat16 sum of this many terms is wrong in the first decimal.
            losses["ce"] = F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())
        if config.n_experts:
            # Each layer has its own product, then the mean: pooled demand would hide layers that collapse
            # on different experts.
            balance_L = torch.stack([r.balance_loss for r in routings])
            z_L = torch.stack([r.z_loss for r in routings])
            losses |= {"balance": balance_L.mean(), "z": z_L.mean()}
            balance_L, z_L = balance_L.detach(), z_L.detach()
            stats = RouterStats.stack([r.stats for r in routings])
            router_logits = tuple(r.logits_TE for r in routings)
        wants_logits = return_logits or targets_BS is None
        return Output(losses, balance_L, z_L, stats, router_logits, logits_BSV if wants_logits else None)

    def num_params(self) -> int:
        """Every parameter once (the output head is the embedding), from the structure alone."""
        return count_params(self.config)

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Forward and backward, in the PaLM convention (Chowdhery et al. 2022, appendix B).

        Six for each matrix weight that a token meets (K experts of E, the tied head, no norms), and
        12 L D S for attention, not halved for causality. ``seq_len`` None is ``block_size``.
        """
        model = self.config
        in_blocks = model.n_layer * _block_weights(model, self.router_config.top_k)
        attention = 12 * model.n_layer * model.d_model * (seq_len or model.block_size)
        return 6 * (in_blocks + model.vocab_size * model.d_model) + attention


def _block_weights(model: ModelConfig, n_experts: int) -> int:
    """Weights in the matrices of one block, with ``n_experts`` of its experts (those held, or those met)."""
    D, width_F = model.d_model, model.ff_width
    attention = (2 + (model.attn_gate != "none")) * D * D + 2 * D * model.kv_heads * model.head_dim
    if model.n_experts:
        return attention + D * model.n_experts + n_experts * 3 * D * width_F
    return attention + (3 if model.mlp == "swiglu" else 2) * D * width_F


def count_params(model: ModelConfig) -> int:
    """The number of parameters of a :class:`Transformer` of this shape, without building one."""
    # Two norms, two QK-norms, and the router's bias.
    vectors = 2 * model.d_model + 2 * model.head_dim * model.qk_norm + model.n_experts
    embeddings = (model.vocab_size + (0 if model.use_rope else model.block_size)) * model.d_model
    return embeddings + model.n_layer * (_block_weights(model, model.n_experts) + vectors) + model.d_model


OUTPUTS, OUTPUT_GAIN = ("o_proj", "down_proj"), 0.02


@torch.no_grad()
def initialise(model: Transformer, seed: int | None) -> None:
    """Fill every weight, from one CPU generator of its own. Normal with mean 0 and the std of this table:

    =====================================================  ====================
    embedding (tied with the head), learned positions      0.25 / sqrt(D)
    q, k, v, attention gate; gate and up of MLP, experts   1 / sqrt(D)
    attention output; down of MLP, experts                 0.02 / sqrt(fan-in)
    router weight                                          0.5 / sqrt(D)
    router bias                                            0
    norms                                                  1
    =====================================================  ====================

    The embedding is small because it is the head too. Its logits have a variance of D std^2, half of which
    adds to the first cross-entropy, and a token's own logit is up to sqrt(D) |e| = D std: at D = 512 the
    usual 0.02 starts 0.6 above ln V, this within 0.1. Beside so small a stream the branches must start small
    too, or they drown the token: on the nano preset an output gain of 0.3 is 0.27 behind in cross-entropy
    after 200 steps. Zero does as well as 0.02, and leaves the router without a gradient at the first step.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def normal(weight: Tensor, gain: float, fan_in: int) -> None:
        draw = torch.empty(weight.shape, device="cpu").normal_(0.0, gain * fan_in**-0.5, generator=generator)
        weight.copy_(draw)

    for module in model.modules():
        if isinstance(module, Embedding):
            normal(module.weight, 0.25, module.embedding_dim)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, Router):
            normal(module.weight, 0.5, module.weight.shape[1])
            module.bias.zero_()
        elif isinstance(module, Experts):
            # [E, in, out], whose fans nn.init would read from the wrong axes.
            for weight, gain in ((module.w_gate, 1.0), (module.w_up, 1.0), (module.w_down, OUTPUT_GAIN)):
                normal(weight, gain, weight.shape[1])
        elif isinstance(module, Attention | MLP):
            for name, linear in module.named_children():
                if isinstance(linear, Linear):
                    normal(linear.weight, OUTPUT_GAIN if name in OUTPUTS else 1.0, linear.in_features)
