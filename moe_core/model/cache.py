"""Keys and values of earlier tokens, kept for each block, so that a new token costs no more than itself.

Shapes: B rows, G key and value heads, S positions, N new tokens, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one block's tokens, [B, G, S, C] each: what grouped-query attention shares is kept once."""

    def __init__(self, rows: int, heads: int, length: int, head_dim: int, like: Tensor, dtype: torch.dtype):
        shape = rows, heads, length, head_dim
        self.k_BGSC, self.v_BGSC = (like.new_zeros(shape, dtype=dtype) for _ in range(2))
        self.at_B: Tensor | None = None  # where the one new token of each row goes; None: a prompt, from 0
        self.upto = 0  # positions that any row has by then

    def extend(self, k_BGNC: Tensor, v_BGNC: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take new keys and values in; returns all that a query may look at, and the mask bool [B, 1, 1, S] where
        causality alone does not say which.
        """
        if self.at_B is None:
            self.k_BGSC[:, :, : k_BGNC.shape[2]], self.v_BGSC[:, :, : k_BGNC.shape[2]] = k_BGNC, v_BGNC
            return k_BGNC, v_BGNC, None
        rows = torch.arange(len(k_BGNC), device=k_BGNC.device)
        self.k_BGSC[rows, :, self.at_B], self.v_BGSC[rows, :, self.at_B] = k_BGNC[:, :, 0], v_BGNC[:, :, 0]
        # What stands beyond a row's own position is padding of its prompt, or nothing yet.
        seen_BS = torch.arange(self.upto, device=k_BGNC.device) <= self.at_B[:, None]
        return self.k_BGSC[:, :, : self.upto], self.v_BGSC[:, :, : self.upto], seen_BS[:, None, None]
