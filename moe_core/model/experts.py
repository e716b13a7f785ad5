"""SwiGLU experts, stacked: a loop to read and to test against, and a grouped path to run.

Both compute ``y_t = sum_k w_tk * down_e(silu(gate_e(x_t)) * up_e(x_t))`` over the kept picks e of token t, where
gate, up and down are matrices, with a bias each where the config says so.

Shapes: T tokens, D model width, F expert width, E experts, K picks of a token, N = T * K assignments, M rows of
the grouped products (N, and those that fill up), C tokens that an expert took where experts choose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_core.model.router import Routing


class Biases(NamedTuple):
    """What each expert adds behind its products: ``gate`` and ``up`` [E, F], ``down`` [E, D]."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Order(NamedTuple):
    """The assignments sorted by expert, each expert's rows beginning at a multiple of ``align``.

    Assignment n = t * K + k. ``order_N``: which assignment is the i-th in the order of experts; ``row_N``: its row;
    ``place_N``: the row of each assignment; ``ends_E``: int32, the row behind each expert's last; M ``rows``.
    """

    order_N: Tensor
    row_N: Tensor | None  # None: the i-th is row i
    place_N: Tensor
    ends_E: Tensor
    rows: int

    @classmethod
    def of(cls, experts_TK: Tensor, n_experts: int, align: int) -> Order:
        sorted_N, order_N = experts_TK.flatten().sort(stable=True)
        n, experts_E = len(order_N), torch.arange(n_experts, device=order_N.device)
        ends_E = torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)
        at_N, row_N, rows = torch.arange(n, device=order_N.device), None, n
        if align > 1:
            sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
            room_E = (sizes_E + align - 1) // align * align
            aligned_E = room_E.cumsum(0, dtype=torch.int32)
            at_N = row_N = at_N + (aligned_E - room_E - ends_E + sizes_E)[sorted_N]
            ends_E, rows = aligned_E, -(-n // align) * align + n_experts * align
        return cls(order_N, row_N, torch.empty_like(order_N).scatter_(0, order_N, at_N), ends_E, rows)

    def spread(self, values_ND: Tensor) -> Tensor:
        """Values in the order of experts, each in its row: [N, D] -> [M, D]."""
        if self.row_N is None:
            return values_ND
        rows_MD = values_ND.new_zeros(self.rows, values_ND.shape[1])
        # In place it takes one pass less; torch 2.11, compiling, loses the gradient of a function that returns it so.
        place = rows_MD.index_copy if torch.compiler.is_compiling() else rows_MD.index_copy_
        return place(0, self.row_N, values_ND)


def experts_loop(x_TD: Tensor, routing: Routing, w_gate: Tensor, w_up: Tensor, w_down: Tensor,
                 biases: Biases | None = None) -> Tensor:
    """Expert by expert, in any dtype: [T, D] -> [T, D]. The reference; syncs with the device E times."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, routing.weights_TK.dtype))
    for e in range(w_gate.shape[0]):
        token, pick = torch.where((routing.experts_TK == e) & routing.kept_TK)
        b_gate, b_up, b_down = (0.0, 0.0, 0.0) if biases is None else (b[e] for b in biases)
        x = x_TD[token]
        out = (F.silu(x @ w_gate[e] + b_gate) * (x @ w_up[e] + b_up)) @ w_down[e] + b_down
        y_TD = y_TD.index_add(0, token, out * routing.weights_TK[token, pick].unsqueeze(-1))
    return y_TD.to(x_TD.dtype)


class _Dispatch(torch.autograd.Function):
    """Copy each token's row to its K places in the order of experts, [T, D] -> [M, D]; rows between are 0.

    Its backward reads each place back through the inverse permutation: a gather and a sum, where autograd's
    own backward of indexing adds with atomics, slower and in no fixed order.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, order: Order, K: int) -> Tensor:
        ctx.save_for_backward(order.place_N)
        ctx.K = K
        return order.spread(x_TD.index_select(0, order.order_N // K))

    @staticmethod
    def backward(ctx, grad_MD: Tensor):
        (place_N,) = ctx.saved_tensors
        grad_ND = grad_MD.index_select(0, place_N)
        return grad_ND if ctx.K == 1 else grad_ND.unflatten(0, (-1, ctx.K)).sum(1), None, None


class _Combine(torch.autograd.Function):
    """Bring the rows back from the order of experts to that of tokens, each times its weight, and add those of a
    token: [M, D], [T, K] -> [T, D]. Sums and the weights' gradient are float32 at least.
    """

    @staticmethod
    def forward(ctx, rows_MD: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(rows_MD, weights_TK, *order[:-1])
        ctx.rows = order.rows
        # Products in the memory of what was gathered: with the backward 0.7 of the time of new ones, on a CPU.
        parts_TKD = rows_MD.index_select(0, order.place_N).to(weights_TK.dtype).unflatten(0, weights_TK.shape)
        parts_TKD = parts_TKD.mul_(weights_TK.unsqueeze(-1))
        y_TD = parts_TKD.squeeze(1) if parts_TKD.shape[1] == 1 else parts_TKD.sum(1)
        # torch 2.11, compiling, makes the gradients 0 where a function like this returns a conversion to the same type.
        return y_TD if y_TD.dtype == rows_MD.dtype else y_TD.to(rows_MD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        rows_MD, weights_TK, *order = ctx.saved_tensors
        order = Order(*order, ctx.rows)
        grad_ND = grad_TD.index_select(0, order.order_N // weights_TK.shape[1]).to(weights_TK.dtype)
        own_ND = rows_MD if order.row_N is None else rows_MD.index_select(0, order.row_N)
        grad_weights_N = (own_ND * grad_ND).sum(-1)
        grad_weights_N = torch.empty_like(grad_weights_N).scatter_(0, order.order_N, grad_weights_N)
        grad_ND = grad_ND.mul_(weights_TK.flatten()[order.order_N].unsqueeze(-1))
        return order.spread(grad_ND.to(rows_MD.dtype)), grad_weights_N.view_as(weights_TK), None


@torch.library.custom_op("moe_core::grouped_mm_float32", mutates_args=())
def _opaque_grouped_mm(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """``F.grouped_mm`` as one closed operator: torch 2.13 cannot trace the open one in float32."""
    return F.grouped_mm(a, b, offs=ends_E)


@_opaque_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    # Rows times a stack of matrices, or two sets of rows, group by group, as the gradient of the stack is.
    return a.new_empty(a.shape[0], b.shape[2]) if b.ndim == 3 else a.new_empty(len(ends_E), a.shape[0], b.shape[1])


def _opaque_backward(ctx, grad: Tensor):
    rows, weight, ends_E = ctx.saved_tensors
    grad = grad.contiguous()
    return _opaque_grouped_mm(grad, weight.mT, ends_E), _opaque_grouped_mm(rows.t(), grad, ends_E), None


_opaque_grouped_mm.register_autograd(
    _opaque_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def _grouped_mm(rows_ND: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    if rows_ND.dtype is torch.float32 and torch.compiler.is_compiling():
        return _opaque_grouped_mm(rows_ND, w_EDF, ends_E)
    return F.grouped_mm(rows_ND, w_EDF, offs=ends_E)


def alignment(x_TD: Tensor) -> int:
    """To a multiple of how many rows each expert's are filled up with zeros.

    On a CPU the library behind bfloat16 products makes a kernel for each number of rows and keeps it: ever new
    numbers took twelve times as long as multiples of 32.
    """
    return 32 if x_TD.device.type == "cpu" and x_TD.dtype is not torch.float32 else 1


def is_one_product(rows_MD: Tensor) -> bool:
    """Whether gate and up go quicker as one grouped product, which reads the rows once; a CPU gains in neither type."""
    return rows_MD.is_cuda


def of_used(w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """The same weights; those of experts without a row get the gradient 0, whatever comes back for them.

    On Blackwell a product over no rows can leave anything there (github.com/pytorch/pytorch/issues/172439). Compiled,
    this is part of the conversions before and behind.
    """
    used_E = ends_E.diff(prepend=ends_E.new_zeros(1)) > 0
    return torch.where(used_E[:, None, None], w_EDF, w_EDF.detach())


def _experts_taken(x_TD: Tensor, routing: Routing, w_gate: Tensor, w_up: Tensor, w_down: Tensor,
                   biases: Biases | None) -> Tensor:
    """Where experts choose, each has C rows: one batched product per weight, [T, D] -> [T, D].

    A token's parts are added with ``index_add``, whose order is fixed on a CPU and not on CUDA.
    """
    token_N = routing.tokens_EC.flatten()
    rows_ECD = x_TD.index_select(0, token_N).unflatten(0, routing.tokens_EC.shape)
    gate_ECF, up_ECF = rows_ECD @ w_gate, rows_ECD @ w_up
    if biases is not None:
        gate_ECF, up_ECF = gate_ECF + biases.gate[:, None], up_ECF + biases.up[:, None]
    out_ECD = (F.silu(gate_ECF) * up_ECF) @ w_down
    if biases is not None:
        out_ECD = out_ECD + biases.down[:, None]
    # From the token's order of preference to that of the experts.
    weights_TE = torch.zeros_like(routing.weights_TK).scatter(1, routing.experts_TK, routing.weights_TK)
    weights_EC = weights_TE.t().gather(1, routing.tokens_EC)
    parts_ND = (out_ECD * weights_EC.unsqueeze(-1)).flatten(0, 1)
    return parts_ND.new_zeros(x_TD.shape).index_add(0, token_N, parts_ND).to(x_TD.dtype)


def experts_grouped(x_TD: Tensor, routing: Routing, w_gate: Tensor, w_up: Tensor, w_down: Tensor,
                    biases: Biases | None = None) -> Tensor:
    """Sort by expert, one grouped matrix product per weight, sort back: [T, D] -> [T, D].

    Shapes are fixed and nothing waits for the device. A dropped assignment is computed with its expert's
    others and weighted 0: that costs its share of the products, and leaves no row undefined (``grouped_mm``
    fills no row past its last offset, and the gradient of such rows is undefined too).

    Raises ValueError for float64 and for widths that are no multiple of 16 bytes, which ``grouped_mm``
    cannot do.
    """
    (_, D, width_F), dtype = w_gate.shape, x_TD.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"grouped experts cannot compute in {dtype}; experts_impl='loop' can")
    multiple = 16 // dtype.itemsize
    if D % multiple or width_F % multiple:
        raise ValueError(f"grouped experts in {dtype} need widths that are multiples of {multiple}, "
                         f"not {D} x {width_F}; experts_impl='loop' takes any")

    if routing.tokens_EC is not None:
        return _experts_taken(x_TD, routing, w_gate, w_up, w_down, biases)

    def products(rows_MD: Tensor, order: Order) -> Tensor:
        weights = w_gate, w_up, w_down
        gate_EDF, up_EDF, down_EFD = (of_used(w, order.ends_E) for w in weights) if rows_MD.is_cuda else weights
        if is_one_product(rows_MD):
            gate_MF, up_MF = _grouped_mm(rows_MD, torch.cat((gate_EDF, up_EDF), 2), order.ends_E).chunk(2, -1)
        else:
            gate_MF, up_MF = (_grouped_mm(rows_MD, w, order.ends_E) for w in (gate_EDF, up_EDF))
        if biases is not None:
            # A product, not a lookup, whose gradient would add with atomics. Of the N rows that are an expert's: what
            # lies between them is undefined in the gradient, and 0 times that is not always 0.
            own_N1 = routing.experts_TK.flatten()[order.order_N].unsqueeze(-1)
            own_NE = (own_N1 == torch.arange(len(w_gate), device=x_TD.device)).to(dtype)
            gate_MF = gate_MF + order.spread(own_NE @ biases.gate)
            up_MF = up_MF + order.spread(own_NE @ biases.up)
        rows_MD = _grouped_mm(F.silu(gate_MF) * up_MF, down_EFD, order.ends_E)
        return rows_MD if biases is None else rows_MD + order.spread(own_NE @ biases.down)
    return dispatched(x_TD, routing, len(w_gate), products)


def dispatched(x_TD: Tensor, routing: Routing, n_experts: int, work: Callable[[Tensor, Order], Tensor]) -> Tensor:
    """Each token's rows to its experts, through ``work`` [M, D] -> [M, D], and back, weighted and added: [T, D]."""
    order, K = Order.of(routing.experts_TK, n_experts, alignment(x_TD)), routing.experts_TK.shape[1]
    rows_MD = work(_Dispatch.apply(x_TD, order, K), order)
    return _Combine.apply(rows_MD, torch.where(routing.kept_TK, routing.weights_TK, 0.0), order)


IMPLEMENTATIONS = {"loop": experts_loop, "grouped": experts_grouped}


class Experts(nn.Module):
    """E SwiGLU MLPs: ``w_gate`` and ``w_up`` [E, D, F], ``w_down`` [E, F, D]; with ``bias`` ``b_gate`` and
    ``b_up`` [E, F], ``b_down`` [E, D]. Uninitialised.

    ``impl`` is "grouped" or "loop". Weights are float32 masters; the products are in the input's dtype.
    """

    def __init__(self, n_experts: int, d_model: int, width: int, impl: str = "grouped", bias: bool = False):
        super().__init__()
        if impl not in IMPLEMENTATIONS:
            known = ", ".join(map(repr, IMPLEMENTATIONS))
            raise ValueError(f"experts_impl = {impl!r}: must be one of {known}")
        self.impl = impl
        self.w_gate = nn.Parameter(torch.empty(n_experts, d_model, width))
        self.w_up = nn.Parameter(torch.empty(n_experts, d_model, width))
        self.w_down = nn.Parameter(torch.empty(n_experts, width, d_model))
        for name, size in (("b_gate", width), ("b_up", width), ("b_down", d_model)):
            self.register_parameter(name, nn.Parameter(torch.empty(n_experts, size)) if bias else None)

    def weights(self) -> list[nn.Parameter]:
        """The three stacks of matrices."""
        return [self.w_gate, self.w_up, self.w_down]

    def biases(self) -> list[nn.Parameter]:
        """The three stacks of biases; none where there are none."""
        return [] if self.b_gate is None else [self.b_gate, self.b_up, self.b_down]

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        weights, biases = ([p.to(x_TD.dtype) for p in own] for own in (self.weights(), self.biases()))
        return IMPLEMENTATIONS[self.impl](x_TD, routing, *weights, Biases(*biases) if biases else None)
