"""A pre-norm decoder-only transformer, MoE or dense: tokens -> loss terms and router statistics.

Shapes: B batch, S sequence, T = B * S tokens, D model width, F width of an expert or of a dense MLP,
E experts, K picks of a token, V vocabulary, L routed blocks (the first few blocks may be dense),
N places where dropout acts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_core.config import ModelConfig, RouterConfig
from moe_core.model.attention import Attention
from moe_core.model.cache import LayerCache
from moe_core.model.cross_entropy import linear_cross_entropy
from moe_core.model.experts import Experts
from moe_core.model.linear import Embedding, Linear, side_by_side
from moe_core.model.norm import RMSNorm
from moe_core.model.rope import Tables, rope_tables
from moe_core.model.router import Router, RouterControls, RouterStats, Routing, draw_noise
from moe_core.model.size import count_params, flops_per_token

TERMS = ("balance", "sequence", "z")  # losses of a router, in Output's order


@dataclass(frozen=True)
class Output:
    """What one forward gives. The total to minimise is ``ce + alpha * balance + z_coef * z``, and where the config
    asks for them ``sequence_alpha * sequence`` and ``mtp_coef * mtp``.
    """

    losses: dict[str, Tensor]  # 0-D float32: "ce" with targets; "balance", "sequence", "z", means over L, for a MoE;
    # "mtp", the mean over the heads for tokens further on, while training them
    balance_L: Tensor | None  # detached, of each layer; None when dense, as all below
    sequence_L: Tensor | None
    z_L: Tensor | None
    stats: RouterStats | None  # each tensor with a leading L
    router_logits: tuple[Tensor, ...] | None  # of each layer, raw, detached: float32 [T, E], not copied together
    logits_BSV: Tensor | None  # in the compute dtype; None where targets are given and nobody asked
    mtp_N: Tensor | None = None  # detached, float32, the cross-entropy of each head for tokens further on
    mtp_logits: tuple[Tensor, ...] = ()  # of the k-th of them, [B, S - k, V], while training without targets


class MLP(nn.Module):
    """A feed-forward part that every token meets: SwiGLU (Shazeer 2020) or GELU, of the config's ``kind``."""

    def __init__(self, config: ModelConfig, width_F: int, kind: str):
        super().__init__()
        width_D = config.d_model
        self.up_proj = Linear(width_D, width_F, config.bias)
        self.gate_proj = Linear(width_D, width_F, config.bias) if kind == "swiglu" else None
        self.down_proj = Linear(width_F, width_D, config.bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x_BSD)))
        gate_BSF, up_BSF = side_by_side(x_BSD, (self.gate_proj, self.up_proj))
        return self.down_proj(F.silu(gate_BSF) * up_BSF)


class MoE(nn.Module):
    """The feed-forward part of a MoE block: a router, and the experts it sends each token to.

    ``shared`` (Dai et al. 2024, DeepSeekMoE) is what every token meets besides, whatever the router says of it: the
    config's shared experts side by side, which is one SwiGLU of their widths together. None where there are none.
    """

    def __init__(self, model: ModelConfig, router: RouterConfig, experts_impl: str):
        super().__init__()
        self.router = Router(model.d_model, model.n_experts, router, model.router_bias)
        self.experts = Experts(model.n_experts, model.d_model, model.ff_width, experts_impl, model.bias)
        self.shared = MLP(model, model.shared_width, "swiglu") if model.n_shared_experts else None

    def forward(self, x_BSD: Tensor, controls: RouterControls, noise_TE: Tensor | None,
                bias_E: Tensor | None) -> tuple[Tensor, Routing]:
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD, controls, noise_TE, bias_E, len(x_BSD))
        y_BSD = self.experts(x_TD, routing).view_as(x_BSD)
        return y_BSD if self.shared is None else y_BSD + self.shared(x_BSD), routing


class Block(nn.Module):
    """Attention, then experts or a dense MLP, each on the normed residual stream and added to it."""

    def __init__(self, model: ModelConfig, router: RouterConfig, experts_impl: str, routed: bool):
        super().__init__()
        self.dropout = model.dropout
        self.attn_norm = RMSNorm(model.d_model, model.norm_eps)
        self.attn = Attention(model)
        self.mlp_norm = RMSNorm(model.d_model, model.norm_eps)
        self.mlp = MoE(model, router, experts_impl) if routed else MLP(
            model, model.dense_width, model.mlp)

    def forward(self, x_BSD: Tensor, rope: Tables | None, controls: RouterControls | None,
                noise_TE: Tensor | None, bias_E: Tensor | None, kept_2BSD: Tensor | None,
                cache: LayerCache | None = None) -> tuple[Tensor, Routing | None]:
        """``kept_2BSD``: what dropout leaves of the two additions; None is all. ``cache``: of the attention."""
        kept_attn, kept_mlp = (None, None) if kept_2BSD is None else kept_2BSD
        x_BSD = x_BSD + _dropped(self.attn(self.attn_norm(x_BSD), rope, cache), kept_attn, self.dropout)
        routing, x_mlp = None, self.mlp_norm(x_BSD)
        if isinstance(self.mlp, MLP):
            y_BSD = self.mlp(x_mlp)
        else:
            y_BSD, routing = self.mlp(x_mlp, controls, noise_TE, bias_E)
        return x_BSD + _dropped(y_BSD, kept_mlp, self.dropout), routing


def _dropped(x: Tensor, kept: Tensor | None, rate: float) -> Tensor:
    return x if kept is None else torch.where(kept, x, 0.0) / (1.0 - rate)


class Transformer(nn.Module):
    """The model. Parameters are float32 masters; activations are in ``compute_dtype``, the router in float32.

    ``seed`` fills the weights from a generator of their own, the same on every device; None takes a fresh
    one. ``experts_impl`` is "grouped" or "loop". With ``activation_checkpointing`` a training pass keeps each
    block's input alone and computes the rest again in its backward. ``balance_bias`` [L, E] float32 is the
    bias on the selection, moved by whoever trains (:mod:`moe_core.model.balance`); None where the config
    balances without. Built under ``torch.device("meta")`` the model holds shapes only.
    """

    balance_bias: Tensor | None

    def __init__(self, model: ModelConfig, router: RouterConfig, *,
                 compute_dtype: torch.dtype = torch.float32, experts_impl: str = "grouped",
                 activation_checkpointing: bool = False, seed: int | None = None):
        super().__init__()
        self.config, self.router_config, self.compute_dtype = model, router, compute_dtype
        self.activation_checkpointing = activation_checkpointing
        self.n_dense = model.n_layer - model.n_moe_layer  # blocks before the first routed one
        self.embed = Embedding(model.vocab_size, model.d_model)
        self.positions = None if model.use_rope else Embedding(model.block_size, model.d_model)
        self.blocks = nn.ModuleList(Block(model, router, experts_impl, routed=i >= self.n_dense)
                                    for i in range(model.n_layer))
        self.norm = RMSNorm(model.d_model, model.norm_eps)
        # Gloeckle et al. 2024: each head is a block on what the trunk ends with, under the same norm and head.
        self.mtp = nn.ModuleList(Block(model, router, experts_impl, routed=False) for _ in range(model.n_mtp))
        has_bias = model.n_experts and router.uses_bias
        self.register_buffer("balance_bias", torch.zeros(model.n_moe_layer, model.n_experts) if has_bias else None)
        self._place_rope()
        if not self.embed.weight.is_meta:
            initialise(self, seed)

    def _place_rope(self) -> None:
        """The tables of all positions, where the weights are. No buffer: ``model.bfloat16()`` would cast it; and not
        made in a forward: a compiler would work out the cosine of each angle anew wherever it is used.
        """
        c = self.config
        self.rope = rope_tables(c.block_size, c.head_dim, c.rope_theta, self.embed.weight.device,
                                self.compute_dtype) if c.use_rope else None

    def _apply(self, fn, recurse=True):
        bias = self.balance_bias
        super()._apply(fn, recurse)
        self._place_rope()
        if bias is not None and self.balance_bias.dtype != torch.float32:
            # model.bfloat16() means the activations; steps of a thousandth would be lost in it.
            self.balance_bias = bias.to(self.balance_bias.device)
        return self

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None, *,
                controls: RouterControls | None = None, generator: torch.Generator | None = None,
                return_logits: bool = False) -> Output:
        """Loss terms of int64 ``tokens_BS`` against ``targets_BS`` (the tokens moved up by one).

        ``controls`` None is plain inference: the router's final temperature, no noise. ``generator`` is
        :meth:`draw`'s. Raises ValueError for a sequence longer than ``block_size``.
        """
        return self.compute(tokens_BS, targets_BS, controls, *self.draw(tokens_BS, generator), return_logits)

    def draw(self, tokens_BS: Tensor, generator: torch.Generator | None) -> tuple[Tensor | None, Tensor | None]:
        """The random numbers of one training pass: selection noise, float32 [L, T, E], and what dropout leaves.

        The latter is bool [N, B, S, D]: of the embedding, then of the two halves of each block; a byte an
        activation. Both come from ``generator`` (on the model's device; None is torch's global one), before
        anything is compiled or computed twice. The noise is drawn whatever its scale, so that a turned knob
        leaves later random numbers where they were. None in eval mode and where the config has none.
        """
        noise_LTE = kept_NBSD = None
        config, device = self.config, tokens_BS.device
        if self.training and config.n_experts:
            shape = (config.n_moe_layer, tokens_BS.numel(), config.n_experts)
            noise_LTE = draw_noise(self.router_config.router_noise_type, shape, generator, device)
        if self.training and config.dropout:
            shape = (1 + 2 * config.n_layer, *tokens_BS.shape, config.d_model)
            kept_NBSD = torch.empty(shape, dtype=torch.bool, device=device)
            kept_NBSD.bernoulli_(1.0 - config.dropout, generator=generator)
        return noise_LTE, kept_NBSD

    def compute(self, tokens_BS: Tensor, targets_BS: Tensor | None, controls: RouterControls | None,
                noise_LTE: Tensor | None, kept_NBSD: Tensor | None = None, return_logits: bool = False) -> Output:
        """:meth:`forward` with its random numbers given: a function of its arguments, one graph under compile."""
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
            rope = tuple(table[:length] for table in self.rope)
        x_BSD = _dropped(x_BSD, None if kept_NBSD is None else kept_NBSD[0], config.dropout).to(self.compute_dtype)
        routings = []
        for i, block in enumerate(self.blocks):
            noise_TE, bias_E = (of_LE[i - self.n_dense] if of_LE is not None and i >= self.n_dense else None
                                for of_LE in (noise_LTE, self.balance_bias))
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                # Nothing random happens inside, so there is no state to keep; counts are values, not side effects.
                block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            x_BSD, routing = block(x_BSD, rope, controls, noise_TE, bias_E,
                                   None if kept_NBSD is None else kept_NBSD[1 + 2 * i : 3 + 2 * i])
            if routing is not None:
                routings.append(routing)
        trunk_BSD, x_BSD, logits_BSV, mtp_N, mtp_logits = x_BSD, self.norm(x_BSD), None, None, ()
        if return_logits or targets_BS is None:
            logits_BSV = F.linear(x_BSD, self.embed.weight.to(x_BSD.dtype))

        losses, of_layers, stats, router_logits = {}, [None] * 3, None, None
        if targets_BS is not None:
            targets = targets_BS.flatten()
            losses["ce"] = (linear_cross_entropy(x_BSD.flatten(0, 1), self.embed.weight, targets)
                            if logits_BSV is None else F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets))
            if self.mtp and self.training:
                mtp_N = torch.stack([
                    linear_cross_entropy(x.flatten(0, 1), self.embed.weight, targets_BS[:, k:].flatten())
                    for k, x in enumerate(self._further(trunk_BSD, rope), 1)])
                losses["mtp"], mtp_N = mtp_N.mean(), mtp_N.detach()
        elif self.training:
            mtp_logits = tuple(F.linear(x, self.embed.weight.to(x.dtype)) for x in self._further(trunk_BSD, rope))
        if routings:
            # Each layer has its own product, then the mean: pooled demand would hide layers that collapse
            # on different experts.
            of_layers = [torch.stack([getattr(r, f"{name}_loss") for r in routings]) for name in TERMS]
            losses |= {name: term_L.mean() for name, term_L in zip(TERMS, of_layers, strict=True)}
            of_layers = [term_L.detach() for term_L in of_layers]
            stats = RouterStats.stack([r.stats for r in routings])
            router_logits = tuple(r.logits_TE for r in routings)
        return Output(losses, *of_layers, stats, router_logits, logits_BSV, mtp_N, mtp_logits)

    def _further(self, trunk_BSD: Tensor, rope: Tables | None) -> list[Tensor]:
        """What the k-th head guesses the token k places after the next one from, [B, S - k, D]: the text ends there."""
        return [self.norm(head(trunk_BSD, rope, None, None, None, None)[0][:, :-k])
                for k, head in enumerate(self.mtp, 1)]

    def num_params(self) -> int:
        """Every parameter once (the output head is the embedding), from the structure alone."""
        return count_params(self.config)

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Of forward and backward, at ``seq_len`` tokens (None: ``block_size``); see :mod:`moe_core.model.size`."""
        return flops_per_token(self.config, self.router_config.top_k, seq_len)


OUTPUTS, OUTPUT_GAIN = ("o_proj", "down_proj"), 0.02


@torch.no_grad()
def initialise(model: Transformer, seed: int | None) -> None:
    """Fill every weight, from one CPU generator of its own. Normal with mean 0 and the std of this table:

    =====================================================  ====================
    embedding (tied with the head), learned positions      0.25 / sqrt(D)
    q, k, v, attention gate; gate and up of MLP, experts   1 / sqrt(D)
    attention output; down of MLP, experts                 0.02 / sqrt(fan-in)
    router weight                                          0.5 / sqrt(D)
    biases                                                 0
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
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, Experts):
            # [E, in, out], whose fans nn.init would read from the wrong axes.
            for weight, gain in zip(module.weights(), (1.0, 1.0, OUTPUT_GAIN), strict=True):
                normal(weight, gain, weight.shape[1])
            for bias in module.biases():
                bias.zero_()
        elif isinstance(module, Attention | MLP):
            for name, linear in module.named_children():
                if isinstance(linear, Linear):
                    normal(linear.weight, OUTPUT_GAIN if name in OUTPUTS else 1.0, linear.in_features)
                    if linear.bias is not None:
                        linear.bias.zero_()
