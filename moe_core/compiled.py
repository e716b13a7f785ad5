"""The model under ``torch.compile``: when, as what graphs, kept where, and without it where the compiler fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from moe_core.config import RunConfig
from moe_core.data.cache import cache_root
from moe_core.model import Output, RouterControls, Transformer

Got = TypeVar("Got")

# Every model of this process shares the compiled code of one function. Each config has a graph to train with, one
# to validate and one for Hessian passes, and torch would give up at 8 in all.
RECOMPILE_LIMIT = 64
LONG = 1e14  # FLOP of a whole run


def pays(config: RunConfig, device: torch.device, flops_per_token: int) -> bool:
    """Whether a run is to be compiled: as its config says; where that leaves it open, on CUDA always, and on a CPU if
    the planned steps are enough work to repay a minute or two of compiling.
    """
    if config.compile is not None or config.compile_obstacle:
        return bool(config.compile)
    return device.type == "cuda" or config.optim.max_iters * config.tokens_per_step * flops_per_token >= LONG


class Computing:
    """A model's forward, compiled while ``compiles`` is True. ``alerts``: what a person should hear of it."""

    def __init__(self, model: Transformer, compiles: bool):
        self.model, self.compiles, self.alerts = model, compiles, []
        self._compute = compiled(model.compute) if compiles else model.compute

    def __call__(self, tokens_BS: Tensor, targets_BS: Tensor | None = None, *, controls: RouterControls | None,
                 generator: torch.Generator | None = None, return_logits: bool = False) -> Output:
        """:meth:`Transformer.forward`."""
        return self._compute(tokens_BS, targets_BS, controls, *self.model.draw(tokens_BS, generator), return_logits)

    def or_eager(self, work: Callable[[], Got]) -> Got:
        """What ``work`` gives. Where the compiler fails in it, it is done again without, and so is all that follows."""
        try:
            return work()
        except Exception as error:
            if not self.compiles or not is_compilers(error):
                raise
            self._compute, self.compiles = self.model.compute, False
            self.alerts.append("compile: torch could not compile the model, so it runs without: "
                               f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return work()


def compiled(compute: Callable) -> Callable:
    """``compute`` as one whole graph for each set of shapes; a second model of the same config uses the first's."""
    _keep_code()
    from torch._dynamo import config  # takes a second, which only this needs

    run = torch.compile(compute, fullgraph=True, dynamic=False)

    def call(*args):
        with config.patch(recompile_limit=RECOMPILE_LIMIT):  # of this thread; the user keeps theirs
            return run(*args)
    return call


def _keep_code() -> None:
    """Have torch keep compiled code beside the prepared tokens: its default folder is lost when the machine restarts.

    A folder that the user named in ``TORCHINDUCTOR_CACHE_DIR`` is left alone; where ours cannot be written, torch's
    default stays.
    """
    folder = cache_root() / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def is_compilers(error: BaseException | None) -> bool:
    """Whether torch's compiler raised this, and not the model."""
    while error is not None:
        if any(kind.__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "triton"))
               for kind in type(error).__mro__):
            return True
        error = error.__cause__
    return False
