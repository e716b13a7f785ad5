"""How far an optimizer step moves each group, relative to how large its weights are.

Any optimizer, without a second copy of the weights: the same elements are looked at before and after, evenly
strided through each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLES = 1 << 12  # of a group; the ratio is then off by about 2 %


def _strided(params: list[Tensor], stride: int) -> Tensor:
    return torch.cat([p.detach().reshape(-1)[::stride] for p in params]).float()


@torch.no_grad()
def measured_step(optimizer: torch.optim.Optimizer) -> None:
    """Step, and leave the RMS of the change over the RMS of the weights before it in ``group["update_size"]``.

    A 0-D float32 tensor for each group; nothing waits for the device.
    """
    looks = []
    for group in optimizer.param_groups:
        params = group["params"]
        # Odd, so that it meets every column of a matrix whose width is a power of two.
        stride = (sum(p.numel() for p in params) // SAMPLES) | 1
        looks.append((group, stride, _strided(params, stride)))
    optimizer.step()
    for group, stride, before in looks:
        moved = _strided(group["params"], stride) - before
        group["update_size"] = moved.norm() / before.norm()


def update_sizes(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """What the last measured step left, one float32 for each group, on ``device``; 0 before the first."""
    none = torch.zeros((), device=device)
    return torch.stack([group.get("update_size", none).to(device) for group in optimizer.param_groups])
