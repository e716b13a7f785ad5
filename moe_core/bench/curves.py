"""Whether ways to compute that should agree do: loss curves from the same weights, batches and noise."""

from __future__ import annotations

import math

import torch

from moe_core.config import ConfigError, RunConfig
from moe_core.data import open_data
from moe_core.knobs import Knobs
from moe_core.trainer import Trainer

STEPS = 50
AHEAD = "asked ahead"  # each step before the one in front of it is read
# Nats, the largest difference of train/ce at any step. Rounding sends a token to another expert, and from
# there two runs drift apart, in bfloat16 from the first step on.
WITHIN = {torch.float32: 0.01, torch.bfloat16: 0.1}


def table(config: RunConfig, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """A row for each way. Raises ValueError where one is off by more than WITHIN, after the table."""
    config = config.replace(device=device.type, compute_dtype=str(dtype).removeprefix("torch."), eval_interval=0,
                            compile=False)
    ways = {"eager": {}, "eager again": {}, AHEAD: {}, "activation_checkpointing": {"activation_checkpointing": True},
            "compiled": {"compile": True}}
    if config.model.n_experts:
        ways["loop"] = {"experts_impl": "loop"}
    curves, rows = {}, []
    print(f"\n{STEPS} steps of train/ce{'':24s} {'last':>8s} {'largest difference':>19s}  at most {WITHIN[dtype]}")
    for name, changes in ways.items():
        try:
            curve, said = _curve(config.replace(**changes), device, ahead=name == AHEAD)
        except ConfigError as error:
            print(f"{name:40s} left out, {error}")
            continue
        curves[name] = curve
        off = max(abs(a - b) for a, b in zip(curve, curves["eager"], strict=True))
        rows.append({"name": name, "last": curve[-1], "difference": off, "said": said})
        print(f"{name:40s} {curve[-1]:8.4f} {off:19.2e}  {said}")
    far = [row["name"] for row in rows if not row["difference"] <= WITHIN[dtype]]
    if far:
        raise ValueError(f"{', '.join(far)}: not the numbers of eager within {WITHIN[dtype]} nats")
    return rows


def _curve(config: RunConfig, device: torch.device, ahead: bool) -> tuple[list[float], str]:
    data = open_data(config, pin=device.type == "cuda", say=lambda line: None)
    trainer = Trainer(config, Knobs(config, device), data.train, [])
    trainer.runs_ahead = ahead
    records = [trainer.step(more=step < STEPS) for step in range(1, STEPS + 1)]
    losses = [record.metrics["train/ce"] for record in records]
    return (losses if all(map(math.isfinite, losses)) else [math.nan] * STEPS,
            "; ".join(alert for record in records for alert in record.alerts))
