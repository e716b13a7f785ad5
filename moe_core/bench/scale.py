"""Tokens a second and memory against experts, picks, width and sequence, one changed at a time."""

from __future__ import annotations

import torch

from moe_core.bench.harness import built, interleave
from moe_core.bench.sides import ours
from moe_core.config import ConfigError, RunConfig

AXES = {"n_experts": (4, 8, 16, 32, 64), "top_k": (1, 2, 4), "d_model": (64, 128, 256, 512),
        "block_size": (128, 256, 512)}


def table(config: RunConfig, device: torch.device, dtype: torch.dtype, rounds: int, seconds: float) -> list[dict]:
    """A row for each value of each axis; the tokens of a step stay the same."""
    rows, tokens = [], config.tokens_per_step
    for axis, values in AXES.items():
        makers = {}
        for value in values:
            try:
                changed = config.replace(**{axis: value}, **({"expert_width": None} if axis == "d_model" else {}))
                changed = changed.replace(batch_size=max(1, tokens // changed.model.block_size))
            except ConfigError as error:
                print(f"{axis} = {value}: left out, {error}")
                continue
            name = f"{axis} = {value}"
            makers[name] = lambda changed=changed, name=name: ours(changed, device, dtype, name=name)
        sides = interleave(built(makers, device, warmup=2), rounds, seconds, device)
        print(f"\n{axis:20s} {'tokens/s':>10s} {'GFLOP/s':>9s} {'peak MB':>9s}")
        for side in sides:
            flops = side.flops_per_token * side.tok_s
            print(f"{side.name:20s} {side.tok_s:10,.0f} {flops / 1e9:9,.0f} {side.peak_bytes / 1e6:9,.0f}")
            rows.append({"name": side.name, "tokens_s": side.tok_s, "flops_s": flops, "peak_bytes": side.peak_bytes})
    return rows
