"""Small models of every architecture, with batches for them, and what two steps are compared by."""

import math

import torch

from moe_core.model import Transformer
from moe_core.presets import preset

TINY = preset("nano", n_layer=3, d_model=32, n_head=4, expert_width=24, n_experts=4, vocab_size=61,
              block_size=16)
VARIANTS = {
    "gated top-1": {},
    "top-2 GQA": dict(top_k=2, norm_topk_prob=True, n_kv_heads=2, attn_gate="none", qk_norm=False),
    "learned positions, capacity": dict(use_rope=False, dropless=False, capacity_factor=0.8),
    "dense swiglu": dict(n_experts=0),
    "dense gelu": dict(n_experts=0, mlp="gelu", use_rope=False, n_kv_heads=1),
    "one dense block first, biases": dict(skip_first_n_moe=1, mlp_width=40, bias=True, n_kv_heads=2, top_k=2),
    "two dense gelu blocks first, bias balancing": dict(skip_first_n_moe=2, mlp="gelu", balance="bias"),
    "no router bias": dict(router_bias=False),
    "sigmoid scores": dict(router_scores="sigmoid", top_k=2, balance="bias"),
    "expert choice, capacity": dict(routing="expert", dropless=False, balance="none", n_shared_experts=1),
    "shared experts": dict(n_shared_experts=2, skip_first_n_moe=1, mlp="gelu"),
    "shared expert, biases, capacity": dict(n_shared_experts=1, bias=True, dropless=False, capacity_factor=0.5),
    "tokens further on": dict(n_mtp=2, bias=True),
    "dense, tokens further on": dict(n_experts=0, n_mtp=1, mlp="gelu"),
    "dense gelu, biases": dict(n_experts=0, mlp="gelu", bias=True, attn_gate="none"),
}


def build(config=TINY, seed=0, **how):
    return Transformer(config.model, config.router, seed=seed, **how)


def lively(config=TINY, seed=0, **how):
    """A model whose branches, which start near zero, weigh as much as the residual stream."""
    model = build(config, seed, **how)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down" in name:
                p.mul_(50)
    return model


def batch(config=TINY, seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    shape = (size, config.model.block_size + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def total(output):
    return sum(output.losses.values())


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def measured(record, *but):
    """A step's metrics without its speed, the validation of steps that had none, and what is named."""
    return {name: value for name, value in record.metrics.items()
            if not (name.startswith("perf/") or name in but or math.isnan(value))}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def rows(run, branch=None):
    """Every number of every row of a run but its speed."""
    return run.metrics(branch, per_layer=True).filter(regex="^(?!perf/)")
