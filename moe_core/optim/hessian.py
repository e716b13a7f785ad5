"""Sophia's curvature pass: the gradient on labels that the model itself would give, and when it is due.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core.config import OptimConfig
from moe_core.model import Output, RouterControls


def hessian_due(config: OptimConfig, steps_done: int) -> bool:
    """Whether a pass is due after ``steps_done`` optimizer steps, before the next.

    After every ``sophia_k`` steps; once ``sophia_k_switch_step`` has passed, every ``sophia_k_after``.
    """
    if "sophia" not in config.optimizer or not steps_done:
        return False
    switched = config.sophia_k_switch_step is not None and steps_done > config.sophia_k_switch_step
    return steps_done % (config.sophia_k_after if switched else config.sophia_k) == 0


def sample_labels(logits_BSV: Tensor, generator: torch.Generator) -> Tensor:
    """One label for every position, [B, S] int64, from the softmax of its float32 logits."""
    # One uniform number a position, looked up in its cumulative probabilities: on a CPU thirteen times as quick
    # as a random number for every logit, which is what multinomial and Gumbel noise draw.
    cdf_BSV = logits_BSV.softmax(-1).cumsum_(-1)
    drawn_BS1 = torch.rand((*logits_BSV.shape[:-1], 1), generator=generator, device=logits_BSV.device)
    labels_BS1 = torch.searchsorted(cdf_BSV, drawn_BS1 * cdf_BSV[..., -1:], right=True)
    return labels_BS1.squeeze(-1).clamp_max_(logits_BSV.shape[-1] - 1)  # a product may round up to the total


def sampled_gradients(model: Callable[..., Output], tokens_BS: Tensor, controls: RouterControls | None,
                      generator: torch.Generator, params: Sequence[Tensor], mtp_coef: float = 0.0
                      ) -> list[Tensor | None]:
    """Gradients of the mean cross-entropy on sampled labels: at every position, without the router's losses.

    B * S times their squares are, in the mean over labels, the Gauss-Newton diagonal of that cross-entropy, and of
    ``mtp_coef`` times the mean one of the heads for tokens further on, each on labels of its own.
    Labels, and in training mode the router's noise and dropout, come from ``generator``. Nothing else is touched: no
    ``.grad``, no counter, no other random stream. None where a parameter has no part in the loss.
    """
    out = model(tokens_BS, controls=controls, generator=generator, return_logits=True)
    loss = _on_sampled(out.logits_BSV, generator)
    for logits in out.mtp_logits if mtp_coef else ():
        # A term's weight and its number of predictions enter its curvature once, and a gradient's square twice.
        share = mtp_coef / len(out.mtp_logits) * logits.shape[1] / tokens_BS.shape[1]
        loss = loss + share**0.5 * _on_sampled(logits, generator)
    return list(torch.autograd.grad(loss, list(params), allow_unused=True))


def _on_sampled(logits_BSV: Tensor, generator: torch.Generator) -> Tensor:
    logits_BSV = logits_BSV.float()
    labels_BS = sample_labels(logits_BSV.detach(), generator)
    return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
