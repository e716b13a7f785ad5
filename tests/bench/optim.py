"""What an optimizer step costs: ``python tests/bench/optim.py``.

Muon's batched products against one ``torch.optim.Muon`` over the same matrices split up, and each optimizer
against AdamW on a whole model: time of the update, time of a Hessian pass, memory. The sides take turns, in
rounds, in one process, and the side that goes first changes; AdamW a second time is the null control. Ratios
are medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_core import preset
from moe_core.bench.harness import held_bytes, peak_bytes, wait
from moe_core.model import Transformer
from moe_core.optim import Muon, build_optimizer, measured_step, sampled_gradients

STACKS = {  # [E, in, out]
    "8 experts of 512 x 1408": (8, 512, 1408),
    "8 experts of 1408 x 512": (8, 1408, 512),
    "64 experts of 128 x 352": (64, 128, 352),
    "64 experts of 64 x 176": (64, 64, 176),
    "64 experts of 32 x 88": (64, 32, 88),
}


def interleaved(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, by side, paired by round."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(-1, rounds):  # the first round warms up
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            wait(device)
            began = time.perf_counter()
            sides[name]()
            wait(device)
            if turn >= 0:
                took[name].append(time.perf_counter() - began)
    return took


def ratio(took: dict[str, list[float]], name: str, base: str) -> str:
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(took[name], took[base], strict=True)], n=4)
    return f"{middle:6.3f} ({low:.3f} to {high:.3f})"


def parameter(weight: Tensor) -> nn.Parameter:
    p = nn.Parameter(weight)
    p.grad = torch.randn_like(p)
    return p


def against_torch(rounds: int, device: torch.device) -> None:
    print("Muon, torch's time over ours, of the whole step (quartiles)")
    for what, shape in STACKS.items():
        stack = torch.randn(shape, device=device)
        ours = Muon([parameter(stack.clone())])
        again = Muon([parameter(stack.clone())])
        theirs = torch.optim.Muon([parameter(w.T.contiguous()) for w in stack], lr=0.02)
        took = interleaved({"ours": ours.step, "ours again": again.step, "torch": theirs.step}, rounds, device)
        print(f"  {what:24s} {ratio(took, 'torch', 'ours')}, null {ratio(took, 'ours again', 'ours')}; "
              f"ours {statistics.median(took['ours']) * 1e3:.2f} ms")


def megabytes(optimizer: torch.optim.Optimizer) -> float:
    state = [v for own in optimizer.state.values() for v in own.values() if isinstance(v, Tensor)]
    return sum(v.numel() * v.itemsize for v in state) / 1e6


def against_adamw(model_name: str, rounds: int, device: torch.device) -> None:
    base = preset(model_name)
    batch = base.optim.batch_size
    tokens = torch.randint(0, base.model.vocab_size, (batch, base.model.block_size), device=device)

    def new(optimizer: str, **changes) -> tuple[Transformer, torch.optim.Optimizer]:
        config = preset(model_name, optimizer=optimizer, **changes)
        model = Transformer(config.model, config.router, seed=0).to(device)
        model(tokens, tokens).losses["ce"].backward()
        return model, build_optimizer(config.optim, model)

    kinds = {"adamw": {}, "adamw again": {}, "muon_adamw": {}, "muon_adamw, starved skip": {"starved_experts": "skip"},
             "muon_adamw, float32": {"muon_dtype": "float32"}, "muon_sophia": {}, "sophia": {}}
    built = {kind: new(kind.split(",")[0].removesuffix(" again"), **changes) for kind, changes in kinds.items()}
    sides: dict[str, Callable] = {kind: optimizer.step for kind, (_, optimizer) in built.items()}
    sides["adamw, update sizes too"] = lambda: measured_step(built["adamw again"][1])
    took = interleaved(sides, rounds, device)
    weights = sum(p.numel() for p in built["adamw"][0].parameters()) * 4 / 1e6
    print(f"{model_name}: {weights:.1f} MB of weights; update, as a ratio to AdamW's (quartiles); memory")
    for kind in sides:
        line = f"  {kind:26s} {ratio(took, kind, 'adamw')}  {statistics.median(took[kind]) * 1e3:8.2f} ms"
        if kind in built:
            optimizer = built[kind][1]
            line += (f"  state {megabytes(optimizer):7.1f} MB, "
                     f"during a step {peak_bytes(optimizer.step, device, held_bytes(device)) / 1e6:6.1f} more")
        print(line)

    # A micro-batch's forward and backward, and the same with a Hessian pass's labels and chosen parameters.
    generator = torch.Generator(device).manual_seed(0)
    passes: dict[str, Callable] = {}
    model = built["adamw"][0]
    passes["forward and backward"] = lambda: model(tokens, tokens, generator=generator).losses["ce"].backward()
    for kind in ("muon_sophia", "sophia"):
        own, optimizer = built[kind]
        passes[f"Hessian pass of {kind}"] = (
            lambda own=own, optimizer=optimizer: optimizer.update_hessian(
                sampled_gradients(own, tokens, None, generator, optimizer.hessian_params())))
    took = interleaved(passes, max(3, rounds // 4), device)
    step = statistics.median(took["forward and backward"])
    print(f"  one forward and backward: {step * 1e3:.1f} ms; as a ratio to it")
    for kind in list(passes)[1:]:
        print(f"  {kind:26s} {ratio(took, kind, 'forward and backward')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="nano", help="a preset")
    parser.add_argument("--device", default="cpu", type=torch.device)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    against_torch(args.rounds, args.device)
    against_adamw(args.model, args.rounds, args.device)


if __name__ == "__main__":
    main()
