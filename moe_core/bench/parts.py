"""Where a step's time goes: each part alone, forward and gradient, at the shapes that it has in the step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from moe_core.bench.harness import wait
from moe_core.bench.sides import ours, with_metrics
from moe_core.config import RunConfig
from moe_core.model import RouterControls, Transformer
from moe_core.model.cross_entropy import linear_cross_entropy
from moe_core.model.rope import rope_tables
from moe_core.optim import build_optimizer


def table(config: RunConfig, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict]:
    """A row a part: milliseconds and share of the trainer's step."""
    m, batch = config.model, config.optim.batch_size
    model = Transformer(m, config.router, compute_dtype=dtype, experts_impl="grouped", seed=0).to(device)
    optimizer = build_optimizer(config.optim, model)
    x_BSD = torch.randn(batch, m.block_size, m.d_model, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, m.vocab_size, (batch * m.block_size,), device=device)
    rope = rope_tables(m.block_size, m.head_dim, m.rope_theta, device, dtype) if m.use_rope else None
    block = model.blocks[-1]
    routed = bool(m.n_experts)

    def both(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def work():
            out = forward()
            out.backward(torch.ones_like(out))
            x_BSD.grad = None
        return work
    timed = {
        "attention": (m.n_layer, both(lambda: block.attn(block.attn_norm(x_BSD), rope))),
        "cross-entropy": (1, both(lambda: linear_cross_entropy(
            model.norm(x_BSD).flatten(0, 1), model.embed.weight, targets))),
    }
    if routed:
        controls = RouterControls.constant(1.5, 0.0, config.router.capacity_factor, device)
        x_TD = x_BSD.detach().flatten(0, 1).requires_grad_()
        routing = block.mlp.router(x_TD, controls, None)
        fixed = routing.__class__(**{**routing.__dict__, "weights_TK": routing.weights_TK.detach()})
        timed["router"] = (m.n_moe_layer, both(lambda: block.mlp.router(x_TD, controls, None).weights_TK))
        timed["experts with their dispatch"] = (m.n_moe_layer, both(lambda: block.mlp.experts(x_TD, fixed)))
    else:
        timed["mlp"] = (m.n_layer, both(lambda: block.mlp(block.mlp_norm(x_BSD))))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    timed["optimizer"] = (1, optimizer.step)
    bare, whole = ours(config, device, dtype), with_metrics(config, device, dtype, name="trainer")
    timed |= {"the bare step": (1, bare.step), "the trainer's step": (1, whole.step)}

    took: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(-2, rounds):
        for name, (_, work) in timed.items():
            wait(device)
            began = time.perf_counter()
            work()
            wait(device)
            if turn >= 0:
                took[name].append(time.perf_counter() - began)
    ms = {name: 1e3 * times * statistics.median(took[name]) for name, (times, _) in timed.items()}
    step, inside = ms.pop("the trainer's step"), ms.pop("the bare step")
    ms["embedding, norms, residuals, clipping, host"] = inside - sum(ms.values())
    ms["data, metrics, checks"] = step - inside
    print(f"\n{'part':44s} {'ms':>9s}  of a step of {step:.1f} ms")
    for name, value in ms.items():
        print(f"{name:44s} {value:9.2f}  {value / step:6.1%}")
    return [{"part": name, "ms": value, "share": value / step} for name, value in ms.items()]
