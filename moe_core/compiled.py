"""The model under ``torch.compile``: one graph for each kind of pass, and a way to tell the compiler's failures."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Every model of this process shares the compiled code of one function. Each config has a graph to train with, one
# to validate and one for Hessian passes, and torch would give up at 8 in all.
RECOMPILE_LIMIT = 64


def compiled(compute: Callable) -> Callable:
    """``compute`` as one whole graph for each set of shapes; a second model of the same config uses the first's."""
    from torch._dynamo import config  # takes a second, which only this needs

    run = torch.compile(compute, fullgraph=True, dynamic=False)

    def call(*args):
        with config.patch(recompile_limit=RECOMPILE_LIMIT):  # of this thread; the user keeps theirs
            return run(*args)
    return call


def is_compilers(error: BaseException | None) -> bool:
    """Whether torch's compiler raised this, and not the model."""
    while error is not None:
        if any(kind.__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "triton"))
               for kind in type(error).__mro__):
            return True
        error = error.__cause__
    return False
