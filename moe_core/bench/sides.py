"""What is compared: this project's ways to compute a model, the same model dense, and Hugging Face's of the same shape.

Every side takes the same step: forward, the gradient of its training loss, clipping at 1, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_core.bench.harness import Side
from moe_core.compiled import compiled
from moe_core.config import RunConfig
from moe_core.data import Batches
from moe_core.knobs import Knobs
from moe_core.model import RouterControls, Transformer
from moe_core.optim import build_optimizer
from moe_core.trainer import Trainer

PEERS = {"Qwen3-MoE": "Qwen3Moe", "Mixtral": "Mixtral", "OLMoE": "Olmoe", "Qwen3 dense": "Qwen3"}


def dense_twin(config: RunConfig) -> RunConfig:
    """The dense model that spends as much on a token: an MLP as wide as the experts that it meets together."""
    return config.replace(n_experts=0, n_shared_experts=0, mlp="swiglu", top_k=1, norm_topk_prob=False,
                          expert_width=None,
                          mlp_width=config.router.top_k * config.model.ff_width + config.model.shared_width)


def ours(config: RunConfig, device: torch.device, dtype: torch.dtype, impl: str = "grouped", *,
         compile: bool = False, name: str = "") -> Side:
    """This project's model, a bare loop around it: no metrics, no store."""
    model = Transformer(config.model, config.router, compute_dtype=dtype, experts_impl=impl, seed=0).to(device)
    if compile:
        model.compute = compiled(model.compute)
    optimizer, tokens = build_optimizer(config.optim, model), _tokens(config, device)
    controls, noise = None, torch.Generator(device).manual_seed(0)
    alpha, z = config.router.load_balance_alpha, config.router.router_z_loss_coef
    if config.model.n_experts:
        controls = RouterControls.constant(1.5, 0.5, config.router.capacity_factor, device)
    model.train()

    def step():
        optimizer.zero_grad()
        losses = model(tokens[:, :-1], tokens[:, 1:], controls=controls, generator=noise).losses
        loss = losses["ce"]
        if "balance" in losses:
            loss = loss + alpha * losses["balance"] + z * losses["z"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return Side(name or impl, step, tokens[:, 1:].numel(), model.flops_per_token())


def with_metrics(config: RunConfig, device: torch.device, dtype: torch.dtype, *, compile: bool = False,
                 name: str) -> Side:
    """The stepwise trainer itself: every metric of a step on the host, and no update that is not finite."""
    config = config.replace(eval_interval=0, gradient_accumulation_steps=1, device=device.type,
                            compile=compile, compute_dtype=str(dtype).removeprefix("torch."))
    ids = torch.randint(0, config.model.vocab_size, (64 * config.tokens_per_step + 1,)).int().numpy()
    batches = Batches(ids, config.model.block_size, config.optim.batch_size, seed=0, pin=device.type == "cuda")
    trainer = Trainer(config, Knobs(config, device), batches, [])
    return Side(name, lambda: trainer.step(validate=False, more=True), config.tokens_per_step,
                trainer.model.flops_per_token(), batch=lambda: batches.next().to(device, non_blocking=True))


def peer_model(family: str, config: RunConfig, impl: str = ""):
    """Hugging Face's model of the same shape; with experts its own router loss, and ``impl``, how it computes them."""
    import transformers

    m, prefix = config.model, PEERS[family]
    shape = dict(
        vocab_size=m.vocab_size, hidden_size=m.d_model, num_hidden_layers=m.n_layer, num_attention_heads=m.n_head,
        num_key_value_heads=m.kv_heads, head_dim=m.head_dim, max_position_embeddings=m.block_size,
        intermediate_size=m.ff_width, tie_word_embeddings=True, use_cache=False, eos_token_id=None)
    if m.n_experts:
        shape |= dict(num_experts_per_tok=config.router.top_k, output_router_logits=True,
                      router_aux_loss_coef=config.router.load_balance_alpha)
        shape |= dict(num_local_experts=m.n_experts) if prefix == "Mixtral" else dict(
            num_experts=m.n_experts, norm_topk_prob=False)
        if prefix == "Qwen3Moe":
            shape |= dict(moe_intermediate_size=m.ff_width)
    settings = getattr(transformers, f"{prefix}Config")(**shape)
    if impl:
        settings._experts_implementation = impl
    return getattr(transformers, f"{prefix}ForCausalLM")(settings)


def peer(family: str, config: RunConfig, device: torch.device, dtype: torch.dtype, impl: str = "", *,
         compile: bool = False, name: str) -> Side:
    """:func:`peer_model`, with its weights in ``dtype``."""
    model = peer_model(family, config, impl).to(device)
    mixed = dtype is not torch.float32
    if mixed:  # autocast does not reach grouped_mm: the weights themselves are cast, as its users do
        model = model.to(dtype)
    run = torch.compile(model, dynamic=False) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = _tokens(config, device)[:, :-1].contiguous()

    def step():
        optimizer.zero_grad()
        run(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return Side(name, step, tokens.numel())


def makers(config: RunConfig, device: torch.device, dtype: torch.dtype, also_compiled: bool,
           ) -> dict[str, Callable[[], Side]]:
    """Every side by name, to be built one by one."""
    made: dict[str, Callable[[], Side]] = {}

    def add(name: str, make: Callable[..., Side], *args, **options) -> None:
        made[name] = lambda: make(*args, name=name, **options)
    dense, muon = dense_twin(config), config.replace(optimizer="muon_adamw")
    add("ours grouped", ours, config, device, dtype)  # what matters most comes first, for want of time
    add("ours grouped again", ours, config, device, dtype)
    add("Qwen3-MoE grouped_mm", peer, "Qwen3-MoE", config, device, dtype, "grouped_mm")
    if also_compiled:
        add("ours compiled", ours, config, device, dtype, compile=True)
        add("ours dense compiled", ours, dense, device, dtype, compile=True)
        add("Qwen3-MoE grouped_mm compiled", peer, "Qwen3-MoE", config, device, dtype, "grouped_mm", compile=True)
        add("Qwen3 dense compiled", peer, "Qwen3 dense", dense, device, dtype, compile=True)
        add("ours trainer compiled", with_metrics, config, device, dtype, compile=True)
        add("ours Muon + AdamW compiled", ours, muon, device, dtype, compile=True)
    add("ours dense", ours, dense, device, dtype)
    add("Qwen3 dense", peer, "Qwen3 dense", dense, device, dtype)
    add("ours trainer", with_metrics, config, device, dtype)
    add("ours Muon + AdamW", ours, muon, device, dtype)
    add("Qwen3-MoE eager", peer, "Qwen3-MoE", config, device, dtype, "eager")
    for family in ("Mixtral", "OLMoE"):
        add(f"{family} grouped_mm", peer, family, config, device, dtype, "grouped_mm")
    add("ours loop", ours, config, device, dtype, "loop")
    if device.type == "cuda":  # it copies an expert's weights for every token: gigabytes, and minutes on a CPU
        add("Qwen3-MoE batched_mm", peer, "Qwen3-MoE", config, device, dtype, "batched_mm")
    return made


def _tokens(config: RunConfig, device: torch.device) -> Tensor:
    shape = (config.optim.batch_size, config.model.block_size + 1)
    return torch.randint(0, config.model.vocab_size, shape, device=device)
