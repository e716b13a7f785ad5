"""Where a step's time goes: each part alone, forward and gradient, at the shapes that it has in the step."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_core.bench.harness import wait
from moe_core.bench.sides import ours, with_metrics
from moe_core.config import RunConfig
from moe_core.model import RouterControls, Transformer
from moe_core.model.cross_entropy import linear_cross_entropy
from moe_core.model.experts import dispatched
from moe_core.optim import build_optimizer

REST = "embedding, norms, residuals, clipping"


def table(config: RunConfig, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict]:
    """A row a part: milliseconds and share of the trainer's step, medians of ``rounds`` turns. Eager throughout.

    ``host`` is no share of its own: how long Python needs to ask a GPU for a bare step. Where it is as long as the
    step, the GPU waits for it. On a CPU it cannot be told from the rest.
    """
    timed = _parts(config, device, dtype)
    bare, whole = ours(config, device, dtype), with_metrics(config, device, dtype, name="trainer")
    timed |= {"data": (1, whole.batch), "the bare step": (1, bare.step), "the trainer's step": (1, whole.step)}
    took, asked = ({name: [] for name in timed} for _ in range(2))
    for turn in range(-2, rounds):
        for name, (_, work) in timed.items():
            wait(device)
            began = time.perf_counter()
            work()
            returned = time.perf_counter()
            wait(device)
            if turn >= 0:
                took[name].append(time.perf_counter() - began)
                asked[name].append(returned - began)
    ms = {name: 1e3 * times * statistics.median(took[name]) for name, (times, _) in timed.items()}
    step, inside, data = (ms.pop(name) for name in ("the trainer's step", "the bare step", "data"))
    if "dispatch" in ms:
        ms["experts"] -= ms["dispatch"]
    ms |= {REST: inside - sum(ms.values()), "data": data, "metrics and checks": step - inside - data}
    print(f"\n{'part':44s} {'ms':>9s}  of a step of {step:.1f} ms")
    for name, value in ms.items():
        print(f"{name:44s} {value:9.2f}  {value / step:6.1%}")
    rows = [{"part": name, "ms": value, "share": value / step} for name, value in ms.items()]
    if device.type == "cuda":
        host = 1e3 * statistics.median(asked["the bare step"])
        print(f"{'host, meanwhile':44s} {host:9.2f}  {host / inside:6.1%} of the bare step")
        rows.append({"part": "host", "ms": host, "share": host / inside})
    return rows


def _parts(config: RunConfig, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[int, Callable[[], object]]]:
    """How often a step does a part, and the part; ``experts`` has the ``dispatch`` in it."""
    m, batch = config.model, config.optim.batch_size
    model = Transformer(m, config.router, compute_dtype=dtype, experts_impl="grouped", seed=0).to(device)
    optimizer = build_optimizer(config.optim, model)
    x_BSD = torch.randn(batch, m.block_size, m.d_model, device=device, dtype=dtype, requires_grad=True)
    x_TD = x_BSD.detach().flatten(0, 1).requires_grad_()
    targets = torch.randint(0, m.vocab_size, (batch * m.block_size,), device=device)
    block = model.blocks[-1]

    def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def work():
            out = forward()
            out.backward(torch.ones_like(out))
            x_BSD.grad = x_TD.grad = None
        return work
    timed = {
        "attention": (m.n_layer, both(lambda: block.attn(block.attn_norm(x_BSD), model.rope))),
        "cross-entropy": (1, both(lambda: linear_cross_entropy(
            model.norm(x_BSD).flatten(0, 1), model.embed.weight, targets))),
    }
    if m.n_experts:
        controls = RouterControls.constant(1.5, 0.0, config.router.capacity_factor, device)
        routing = block.mlp.router(x_TD, controls, None)
        routing = dataclasses.replace(routing, weights_TK=routing.weights_TK.detach())
        timed |= {"router": (m.n_moe_layer, both(lambda: block.mlp.router(x_TD, controls, None).weights_TK)),
                  "experts": (m.n_moe_layer, both(lambda: block.mlp.experts(x_TD, routing)))}
        if routing.tokens_EC is None:
            timed["dispatch"] = m.n_moe_layer, both(
                lambda: dispatched(x_TD, routing, m.n_experts, lambda rows_MD, order: rows_MD))
    else:
        timed["mlp"] = (m.n_layer, both(lambda: block.mlp(block.mlp_norm(x_BSD))))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    timed["optimizer"] = (1, optimizer.step)
    return timed
