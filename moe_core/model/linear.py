"""Linear layers and embeddings that leave the global random stream alone and keep float32 masters.

The weights are left uninitialised: :class:`~moe_core.model.Transformer` fills every one from one private generator,
and torch's default would consume the global random stream, which is the user's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """``nn.Linear`` that computes in its input's dtype; weight and bias stay float32 masters."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self):
        """Draws nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    """``nn.Embedding`` whose weight is left uninitialised."""

    def reset_parameters(self):
        """Draws nothing."""


def is_one_product(x: Tensor) -> bool:
    """Whether layers of one input go quicker as one product, their weights put together anew each time.

    The input is read once, and so is what comes back of its gradient. In float32 a CPU multiplies as fast either way
    and the copies are lost; in bfloat16 four layers of 128 x 128 took 0.7 of the time.
    """
    return x.device.type != "cpu" or x.dtype in (torch.bfloat16, torch.float16)


def side_by_side(x: Tensor, layers: Sequence[Linear]) -> Sequence[Tensor]:
    """What each of several layers makes of one ``x``; all of them have a bias, or none."""
    if not is_one_product(x):
        return [layer(x) for layer in layers]
    weight = torch.cat([layer.weight for layer in layers]).to(x.dtype)
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]).to(x.dtype)
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], -1)
