"""What stops a step before it is applied: numbers that are not finite, and a device whose memory is full.

Both leave the run as it was before the step. What is worked out here costs only when that happens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_core.config import RunConfig
from moe_core.model import RouterControls, Transformer
from moe_core.model.transformer import MoE

TERMS = ("train/ce", "train/mtp", "router/aux_mean", "router/seq_aux_mean", "router/z_mean", "grad/norm",
         "the Hessian estimate")


class NonFiniteError(ArithmeticError):
    """A loss term or the gradient of a step is not finite. The step was not applied.

    ``step``; ``term``, the name of what was not finite; ``where``, the first place in the model that was not.
    """

    def __init__(self, step: int, term: str, value: float, where: str):
        super().__init__(f"step {step}: {term} is {value}; the step was not applied. First not finite: {where}")
        self.step, self.term, self.where = step, term, where


class MemoryLimitError(RuntimeError):
    """A step did not fit in the device's memory; a smaller one can go on in this process.

    It was not applied, unless the message says that its update was cut short.
    """


def nonfinite_term(metrics: Mapping[str, float]) -> str | None:
    """The first of a step's loss terms, then its gradients, that is not finite; None where all are."""
    return next((name for name in TERMS if not math.isfinite(metrics.get(name, 0.0))), None)


# ---- where ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def first_in_forward(model: Transformer, batches: Sequence[tuple[Tensor, Tensor]],
                     controls: RouterControls | None) -> str | None:
    """The first part whose output is not finite when a step's micro-batches are passed through again.

    ``batches``: tokens [B, S + 1] and the state of the noise generator before each. None where all parts are
    finite. The model is left in training mode.
    """
    model.train()
    for number, (window, noise) in enumerate(batches, 1):
        own = torch.Generator(window.device)  # never the run's
        own.set_state(noise)
        # Positions are added by their row, so they have no call to look at.
        seen = {} if model.positions is None else {
            "the learned positions": _finite(model.positions.weight[: window.shape[1] - 1])}
        hooks = [module.register_forward_hook(_noting(seen, place)) for place, module in _parts(model)]
        try:
            out = model(window[:, :-1], window[:, 1:], controls=controls, generator=own, return_logits=True)
        finally:
            for hook in hooks:
                hook.remove()
        seen |= {"the logits": _finite(out.logits_BSV), "the losses": _finite(out.losses)}
        finite = torch.stack(list(seen.values())).tolist()
        if not all(finite):
            place = list(seen)[finite.index(False)]
            return place if len(batches) == 1 else f"{place}, in micro-batch {number} of {len(batches)}"
    return None


def _noting(seen: dict[str, Tensor], place: str) -> Callable:
    calls = itertools.count()

    def note(module: nn.Module, args: tuple, output) -> None:
        if next(calls) == 0:  # the final norm is called again, by the heads for tokens further on
            seen[place] = _finite(output) & seen.get(place, torch.tensor(True, device=args[0].device))
    return note


def _parts(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """The modules to look at and what each is called; an inner one answers before the one around it."""
    yield "the embedding", model.embed
    for i, block in enumerate(model.blocks):
        layer = "" if not model.n_dense or i < model.n_dense else f" (layer {i - model.n_dense} of the metrics)"
        yield from _parts_of(block, f"block {i}{layer}")
    yield "the final norm", model.norm
    for k, head in enumerate(model.mtp, 1):
        yield from _parts_of(head, f"head {k} for tokens further on")


def _parts_of(block: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    routed = isinstance(block.mlp, MoE)
    yield f"{name}, attention", block.attn_norm
    yield f"{name}, attention", block.attn
    yield f"{name}, {'router' if routed else 'MLP'}", block.mlp_norm
    if routed:
        yield f"{name}, router", block.mlp.router
        yield f"{name}, experts", block.mlp.experts
        if block.mlp.shared is not None:
            yield f"{name}, shared experts", block.mlp.shared
    else:
        yield f"{name}, MLP", block.mlp
    yield f"{name}, residual stream", block


def _finite(value) -> Tensor:
    """Whether every floating-point tensor in a module's output is finite, as a 0-D bool."""
    return torch.stack([t.isfinite().all() for t in _tensors(value) if t.is_floating_point()]).all()


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(vars(value))


def first_in_backward(named: Iterable[tuple[str, Tensor | None]]) -> str:
    """The first gradient that is not finite, the model's last parameters first, as a backward pass meets them."""
    last_first = [(name, grad) for name, grad in named if grad is not None][::-1]
    finite = torch.stack([grad.isfinite().all() for _, grad in last_first]).tolist()
    if all(finite):
        return "no single gradient, only the norm of all of them"
    return f"the gradient of {last_first[finite.index(False)][0]}"


# ---- memory ---------------------------------------------------------------------------------------------------

def memory_limit(step: str, config: RunConfig, device: torch.device) -> MemoryLimitError:
    """What to say of a step that did not fit: the peak, and what to lower. It lets go of what the device caches."""
    peak = ""
    if device.type == "cuda":
        gib = 1 / (1 << 30)
        peak = (f" at a peak of {torch.cuda.max_memory_allocated(device) * gib:.1f} GiB "
                f"(the device has {torch.cuda.get_device_properties(device).total_memory * gib:.1f})")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # so that the next one tells of its own
    batch, steps, lower = config.optim.batch_size, config.optim.gradient_accumulation_steps, []
    if batch > 1:
        factor = next(n for n in range(2, batch + 1) if batch % n == 0)
        lower.append(f"batch_size = {batch} to {batch // factor} with gradient_accumulation_steps = {steps} raised to "
                     f"{steps * factor}, which leaves a step its tokens")
    lower.append(f"block_size = {config.model.block_size}")
    also = "" if config.activation_checkpointing else ", or set activation_checkpointing = True"
    return MemoryLimitError(f"{step}: out of memory{peak}. Lower {', or '.join(lower)}{also}; "
                            "run.fork(path, batch_size=...) goes on from here")
