"""What a key-value cache buys: ``python tests/bench/generate.py``.

New tokens a second of greedy generation, of fresh weights, with the cache and with everything read again for each
token, by length of the text. The sides take turns, in rounds, in one process; the cached side a second time is the
null control. Ratios are medians over rounds, with quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from moe_core import preset
from moe_core.bench.harness import wait
from moe_core.model import Transformer
from moe_core.model.generate import LayerCache, generate


def cache_bytes(model: Transformer, rows: int, length: int) -> int:
    config = model.config
    one = LayerCache(1, config.kv_heads, 1, config.head_dim, model.embed.weight, model.compute_dtype)
    return rows * length * config.n_layer * (one.k_BGSC.nbytes + one.v_BGSC.nbytes)


def measure(model: Transformer, rows: int, prompt: int, new: int, rounds: int) -> None:
    device = model.embed.weight.device
    prompts = torch.randint(0, model.config.vocab_size, (rows, prompt)).tolist()
    sides = {"cached": True, "cached again": True, "uncached": False}
    took: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(-1, rounds):  # the first round warms up
        for name in names[turn % 3 :] + names[: turn % 3]:
            wait(device)
            began = time.perf_counter()
            generate(model, prompts, new, temperature=0, use_cache=sides[name])
            wait(device)
            if turn >= 0:
                took[name].append(time.perf_counter() - began)
    rate = {name: rows * new / statistics.median(times) for name, times in took.items()}
    print(f"  {rows} x ({prompt:4d} + {new:4d})  cached {rate['cached']:8.1f} tok/s  uncached {rate['uncached']:8.1f}"
          f"  ratio {_ratio(took, 'uncached')}, null {_ratio(took, 'cached again')}"
          f"  cache {cache_bytes(model, rows, prompt + new) / 1e6:.2f} MB")


def _ratio(took: dict[str, list[float]], name: str) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(took[name], took["cached"], strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="nano", help="a preset")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--device", default="cpu", type=torch.device)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = preset(args.model)
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    model = Transformer(config.model, config.router, compute_dtype=dtype, seed=0).to(args.device).eval()
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.model} in "
          f"{str(dtype).removeprefix('torch.')}, {args.rounds} rounds; new tokens a second")
    size = config.model.block_size
    for rows in args.rows:
        for prompt, new in ((size // 8, size // 8), (size // 2, size // 4), (size // 8, size - size // 8)):
            measure(model, rows, prompt, new, args.rounds)


if __name__ == "__main__":
    main()
