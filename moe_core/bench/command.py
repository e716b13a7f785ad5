"""``moe bench``: one table a command, its figures to JSON.

    moe bench                                   nano on a CPU, moe-203m on a GPU, against every peer installed
    moe bench --compiled --dtype bfloat16       compiled sides too
    moe bench --only "ours,Qwen3-MoE grouped_mm"  some of the sides
    moe bench --scale                           against experts, picks, width and sequence
    moe bench --profile                         where a step's time goes
    moe bench --curves                          whether the ways to compute give the same losses
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from moe_core.bench import curves, profile, scale
from moe_core.bench.harness import Side, built, ceilings, interleave, machine, ratio
from moe_core.bench.sides import makers
from moe_core.config import RunConfig
from moe_core.presets import preset
from moe_core.trainer import resolve_device

# bfloat16 FLOP/s that the maker states, without sparsity; the first name that is in the card's.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a preset (default: nano on a CPU, moe-203m on a GPU)")
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", help="float32 or bfloat16, of the computation (default: float32 on a CPU)")
    parser.add_argument("--batch-size", type=int, help="sequences (default: the preset's; 32 on a GPU)")
    parser.add_argument("--block-size", type=int, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each side in each round")
    parser.add_argument("--minutes", type=float, default=6.0 if torch.cuda.is_available() else math.inf,
                        help="after which no further side is begun (default: 6 on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--only", default="", help="sides whose name has one of these texts, with commas")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                        help="torch.compile too, ours and the peer's (default: on a GPU)")
    parser.add_argument("--scale", action="store_true", help="how speed and memory change with the shape")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    parser.add_argument("--curves", action="store_true", help="loss curves of the ways to compute, side by side")
    parser.add_argument("--json", type=Path, help="write the figures here")


def main(args: argparse.Namespace) -> None:
    """Print the table that ``args`` ask for."""
    device = resolve_device(RunConfig(device=args.device))
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    else:
        torch.set_float32_matmul_precision("high")
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    config = preset(args.model or ("nano" if device.type == "cpu" else "moe-203m"), gradient_accumulation_steps=1)
    batch = args.batch_size or (32 if device.type == "cuda" else config.optim.batch_size)
    config = config.replace(batch_size=batch, block_size=args.block_size or config.model.block_size)
    about = machine(device) | {"dtype": str(dtype).removeprefix("torch.")}
    about |= {name: round(value / 1e9, 1) for name, value in ceilings(device, dtype).items()}
    print(", ".join(f"{key} {value}" for key, value in about.items()), "(ceilings in 1e9 a second)")
    print(f"a step is {batch} x {config.model.block_size} tokens")
    if args.profile:
        found = profile.table(config, device, dtype, args.rounds)
    elif args.curves:
        found = curves.table(config, device, dtype)
    elif args.scale:
        found = scale.table(config, device, dtype, args.rounds, args.seconds)
    else:
        found = compare(args, config, device, dtype, about)
    rows = []
    for row in found:
        rows.append(row)
        if args.json:  # each time: whatever ends this early, the rows so far are there
            draft = args.json.with_name(f".{args.json.name}.{os.getpid()}")
            draft.write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
            draft.replace(args.json)


def compare(args, config, device, dtype, about) -> Iterator[dict]:
    """A row a side, as soon as it is timed. Each is there beside the first alone: a GPU has no room for all of them."""
    words = [word for word in args.only.split(",") if word]
    known = makers(config, device, dtype, args.compiled)
    wanted = {name: make for name, make in known.items() if not words or any(word in name for word in words)}
    if not wanted:
        raise ValueError(f"--only {args.only!r}: no side has that in its name; there are {', '.join(known)}")
    known_peaks = PEAK if dtype is torch.bfloat16 else {}
    peak = next((value for name, value in known_peaks.items() if name in str(about["device"])), None)
    stated, peak = ("the maker's", peak) if peak else ("the measured matmul", about["matmul_flops"] * 1e9)
    print(f"\nMFU: FLOPs in the PaLM convention over {stated} {peak / 1e12:.2f} TFLOP/s; "
          f"ratio: tokens for tokens over the first row, with which it took turns, quartiles of {args.rounds} rounds;\n"
          "dense: of equal active size; trainer: the stepwise trainer with all its metrics, the others a bare loop")
    print(f"{'':34s} {'ready, s':>8s} {'tokens/s':>10s} {'MFU':>6s} {'peak MB':>9s}  ratio")
    ends, first = time.monotonic() + 60 * args.minutes, None
    for name, make in wanted.items():
        if first is not None and time.monotonic() > ends:
            print(f"{name}: left out, the {args.minutes:g} minutes are over")
        elif side := built({name: make}, device, warmup=3):
            both = ([] if first is None else [dataclasses.replace(first, seconds=[])]) + side
            turns = interleave(both, args.rounds, args.seconds, device)
            if len(turns) == len(both):
                first = first or turns[0]
                yield _row(turns[-1], turns[0], peak)
            del side, both, turns
    if first is None:
        raise ValueError("no side took all its steps")


def _row(side: Side, base: Side, peak: float) -> dict:
    low, middle, high = ratio(side, base)
    mfu = None if side.flops_per_token is None else side.flops_per_token * side.tok_s / peak
    print(f"{side.name:34s} {side.ready:8.1f} {side.tok_s:10,.0f} {'' if mfu is None else f'{mfu:.1%}':>6s} "
          f"{side.peak_bytes / 1e6:9,.0f}  {middle:.2f} ({low:.2f} to {high:.2f})")
    return {"name": side.name, "ready_s": side.ready, "tokens_s": side.tok_s, "mfu": mfu,
            "peak_bytes": side.peak_bytes, "ratio": middle, "ratio_low": low, "ratio_high": high,
            "seconds": side.seconds}
