"""Timing that can be believed: all sides in one process, in turns, with a null control and the machine's own ceilings.

A side that fails is said and left out; the others go on.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_core.provenance import gather


@dataclass
class Side:
    """One entry of a table: ``step()`` does one whole optimizer step over ``tokens`` tokens."""

    name: str
    step: Callable[[], object]
    tokens: int
    flops_per_token: int | None = None
    ready: float | None = None  # seconds until it had taken its first steps, compiling included
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)  # a step, by round
    batch: Callable[[], object] | None = None  # what its step takes first, where it reads data

    @property
    def tok_s(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def built(makers: Mapping[str, Callable[[], Side]], device: torch.device, warmup: int,
          say: Callable[[str], None] = print) -> list[Side]:
    """The sides that can be made and take ``warmup`` steps here; of the others ``say`` hears why not."""
    sides = []
    for name, make in makers.items():
        gc.collect()  # the side before this one; of one that failed, the error held on to it
        if device.type == "cuda":
            torch.cuda.empty_cache()
        began = time.perf_counter()
        try:
            held = held_bytes(device)
            side = make()
            for _ in range(warmup):
                side.step()
            wait(device)
            side.ready = time.perf_counter() - began
            side.peak_bytes = peak_bytes(side.step, device, held)
        except Exception as error:  # whatever an optional peer raises, the table goes on without it
            say(f"{name}: left out, {_why(error)}")
            continue
        sides.append(side)
    return sides


def interleave(sides: list[Side], rounds: int, seconds: float, device: torch.device,
               say: Callable[[str], None] = print) -> list[Side]:
    """Time every side in every round, the one that goes first changing; about ``seconds`` a side and round. Those
    that got through are given back; of one that fails on the way ``say`` hears why.
    """
    steps: dict[str, int] = {}

    def timed(side: Side, times: int) -> float | None:
        try:
            wait(device)
            began = time.perf_counter()
            for _ in range(times):
                side.step()
            wait(device)
            return (time.perf_counter() - began) / times
        except Exception as error:
            say(f"{side.name}: given up, {_why(error)}")
            return None
    kept = list(sides)
    for turn in range(-1, rounds):  # the first only to see how long a step takes
        at = max(turn, 0) % max(len(kept), 1)
        for side in kept[at:] + kept[:at]:
            took = timed(side, steps.get(side.name, 1))
            if took is None:
                kept.remove(side)
            elif turn < 0:
                steps[side.name] = max(1, round(seconds / took))
            else:
                side.seconds.append(took)
    return kept


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:150]}"


def ratio(side: Side, base: Side) -> tuple[float, float, float]:
    """Quartiles over rounds of how much faster ``side`` is than ``base``, tokens for tokens."""
    pairs = [(b / base.tokens) / (a / side.tokens) for a, b in zip(side.seconds, base.seconds, strict=True)]
    return tuple(statistics.quantiles(pairs, n=4)) if len(pairs) > 1 else (pairs[0],) * 3


def held_bytes(device: torch.device) -> int:
    """Bytes in use on a GPU now; 0 on a CPU, where torch does not count."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(step: Callable[[], object], device: torch.device, held: int = 0) -> int:
    """Bytes at the highest point: on CUDA over what was there before the side; on a CPU over the lowest point, where
    there are weights and optimizer state alone.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - held
    with _quiet(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                          profile_memory=True) as profile:
        step()  # what it frees of the step before may go unseen
        step()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [e["args"]["Bytes"] for e in sorted(
        (e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])]
    levels = list(itertools.accumulate(changes, initial=0))
    return max(levels) - min(levels)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's native chatter goes nowhere."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does at best, measured: FLOP/s of a square matrix product, bytes/s of a copy."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    # Float32, written once before: memory that nobody has touched is handed out page by page, which took a CPU three
    # times as long as the copy itself.
    big, target = torch.ones(2, (1 << 28) if device.type == "cuda" else (1 << 25), device=device)
    product, copy = (_best(work, device) for work in (lambda: a @ b, lambda: target.copy_(big)))
    return {"matmul_flops": 2 * n**3 / product, "copy_bytes": 2 * big.nbytes / copy}


def _best(work: Callable[[], object], device: torch.device, times: int = 7) -> float:
    took = []
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        took.append(time.perf_counter() - began)
    return min(took)


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": gather(device)["versions"].get("transformers", "none"), "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d")}
