"""The grouped path held against the loop, and the loop against the formula."""

import pytest
import torch
import torch.nn.functional as F

from moe_core.model import experts
from moe_core.model.experts import Biases, Experts, dispatched, experts_grouped, experts_loop
from moe_core.model.router import RouterControls, Routing, route

D, WIDTH_F = 16, 24
CONTROLS = RouterControls.constant(temp=1.0, noise_std=0.0, capacity_factor=0.5)


def inputs(seed, T, E, K, favourite=None, dropless=True, dtype=torch.float32):
    """Random tokens, routing and weights; ``favourite`` experts get all the first choices there are."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator)
    if favourite is not None:
        logits[:, favourite] += 100
    routing = route(logits, CONTROLS, top_k=K, dropless=dropless)
    routing = with_weights(routing, torch.rand(T, K, generator=generator) + 0.1)
    x = torch.randn(T, D, generator=generator, dtype=dtype)
    weights = [torch.randn(E, *shape, generator=generator, dtype=dtype) / shape[0] ** 0.5
               for shape in ((D, WIDTH_F), (D, WIDTH_F), (WIDTH_F, D))]
    return x, routing, weights


def with_weights(routing: Routing, weights_TK) -> Routing:
    return Routing(**{**vars(routing), "weights_TK": weights_TK})


def output_and_gradients(function, x, routing, weights, seed=7):
    leaves = [t.detach().clone().requires_grad_() for t in (x, routing.weights_TK, *weights)]
    y = function(leaves[0], with_weights(routing, leaves[1]), *leaves[2:])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


NAMES = ("output", "d input", "d routing weights", "d w_gate", "d w_up", "d w_down")
BIAS_NAMES = ("d b_gate", "d b_up", "d b_down")
CASES = [(1, 1), (2, 1), (2, 2), (8, 1), (8, 2)]


@pytest.mark.parametrize("E, K", CASES)
@pytest.mark.parametrize("T, favourite, dropless", [
    (33, None, True),  # an odd number of tokens
    (3, None, True),  # fewer tokens than experts: some are empty
    (20, 0, True),  # all to one, the first
    (20, -1, True),  # all to one, the last
    (33, None, False),  # half of the room that is needed
    (20, 0, False),  # most of the tokens are dropped
])
def test_grouped_equals_loop(E, K, T, favourite, dropless):
    """Output and the gradients of input, routing weights and all expert weights, in float32."""
    case = inputs(11 * E + K + T, T, E, K, favourite, dropless)
    loop, grouped = output_and_gradients(experts_loop, *case), output_and_gradients(experts_grouped, *case)
    for name, expected, actual in zip(NAMES, loop, grouped, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class Undefined(torch.autograd.Function):
    """Leaves nothing but NaN behind an expert's last row, in values and gradients: grouped_mm leaves what was there."""

    @staticmethod
    def forward(ctx, rows, ends_E):
        ctx.end = int(ends_E[-1])
        return rows.index_fill(0, torch.arange(ctx.end, len(rows)), torch.nan)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_fill(0, torch.arange(ctx.end, len(grad)), torch.nan), None


@pytest.fixture
def filled_up(monkeypatch):
    """Each expert's rows filled up to a multiple of 32, as bfloat16 on a CPU has it, here in float32."""
    grouped_mm = experts._grouped_mm
    monkeypatch.setattr(experts, "alignment", lambda x_TD: 32)
    monkeypatch.setattr(experts, "_grouped_mm", lambda rows, w, ends_E: Undefined.apply(
        grouped_mm(Undefined.apply(rows, ends_E), w, ends_E), ends_E))


@pytest.mark.parametrize("E, K", CASES)
@pytest.mark.parametrize("T, favourite, dropless", [(33, None, True), (64, 0, True), (3, -1, True), (33, None, False)])
def test_filled_up_rows_change_nothing(E, K, T, favourite, dropless, filled_up):
    """Values and gradients are the loop's; what lies behind the last expert's rows reaches neither."""
    case = inputs(5 * E + K + T, T, E, K, favourite, dropless)
    loop = output_and_gradients(experts_loop, *case)
    for name, expected, actual in zip(NAMES, loop, output_and_gradients(experts_grouped, *case), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("T, favourite", [(33, None), (3, None), (20, -1)])
def test_gate_and_up_in_one_product_are_the_two(T, favourite, monkeypatch):
    """What a GPU does, here: values and all gradients."""
    case = inputs(T, T, 8, 2, favourite)
    loop = output_and_gradients(experts_loop, *case)
    monkeypatch.setattr(experts, "is_one_product", lambda rows_MD: True)
    for name, expected, actual in zip(NAMES, loop, output_and_gradients(experts_grouped, *case), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_expert_without_rows_has_no_gradient_whatever_a_product_leaves_there():
    """Some GPUs leave what was in memory, NaN too; values and the gradients of all others are as they were."""
    weights = torch.randn(4, D, WIDTH_F, requires_grad=True)
    came_back = torch.randn(4, D, WIDTH_F)
    came_back[[0, 2]] = torch.nan
    same = experts.of_used(weights, torch.tensor([0, 3, 3, 9], dtype=torch.int32))
    same.backward(came_back)
    assert torch.equal(same, weights)
    assert torch.equal(weights.grad, came_back.nan_to_num(0.0))


def with_biases(seed, E):
    """(x, routing, weights) -> the same with random biases behind the weights, as leaves of one call."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(E, size, generator=generator) for size in (WIDTH_F, WIDTH_F, D)]


@pytest.mark.parametrize("E, K", CASES)
@pytest.mark.parametrize("T, favourite, dropless", [(33, None, True), (3, None, True), (20, 0, False)])
def test_grouped_equals_loop_with_biases_too(E, K, T, favourite, dropless):
    """Output and all gradients, those of the biases included; a dropped assignment adds no bias either."""
    x, routing, weights = inputs(13 * E + K + T, T, E, K, favourite, dropless)
    six = [*weights, *with_biases(E + T, E)]

    def on(path):
        return lambda x, routing, *six: path(x, routing, *six[:3], Biases(*six[3:]))
    loop, grouped = (output_and_gradients(on(path), x, routing, six) for path in (experts_loop, experts_grouped))
    for name, expected, actual in zip((*NAMES, *BIAS_NAMES), loop, grouped, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert not grouped[0][~routing.kept_TK.any(-1)].any()


@pytest.mark.parametrize("T, favourite, dropless", [(33, None, True), (3, None, True), (20, 0, False)])
def test_filled_up_rows_change_nothing_with_biases_either(T, favourite, dropless, filled_up):
    """The gradients of the biases too are sums over the rows that are an expert's."""
    test_grouped_equals_loop_with_biases_too(8, 2, T, favourite, dropless)


@pytest.mark.parametrize("E, K", CASES)
def test_loop_equals_the_formula_token_by_token(E, K):
    """y_t is the weighted sum over the kept picks of t, and of nothing else."""
    x, routing, (w_gate, w_up, w_down) = inputs(E + K, 9, E, K, dropless=False)
    b = Biases(*with_biases(K, E))
    expected = torch.zeros_like(x)
    for t in range(9):
        for k in range(K):
            e, weight = routing.experts_TK[t, k], routing.weights_TK[t, k]
            if routing.kept_TK[t, k]:
                hidden = F.silu(x[t] @ w_gate[e] + b.gate[e]) * (x[t] @ w_up[e] + b.up[e])
                expected[t] += weight * (hidden @ w_down[e] + b.down[e])
    torch.testing.assert_close(experts_loop(x, routing, w_gate, w_up, w_down, b), expected)


@pytest.mark.parametrize("dropless", [True, False])
def test_loop_passes_gradcheck_in_float64(dropless):
    """Analytic and numeric gradients agree for the input, the routing weights and the expert weights."""
    x, routing, weights = inputs(3, 5, 3, 2, dropless=dropless, dtype=torch.float64)
    leaves = [t[..., :4].clone().requires_grad_() for t in (x, routing.weights_TK.double())]
    leaves += [w[:, :4, :4].clone().requires_grad_() for w in weights]

    def loop(x, weights_TK, *weights):
        return experts_loop(x, with_weights(routing, weights_TK), *weights)

    assert torch.autograd.gradcheck(loop, leaves)


@pytest.mark.parametrize("function", [experts_loop, experts_grouped])
def test_a_dropped_assignment_adds_nothing(function):
    """A token that no expert had room for gets exactly 0, and neither it nor its weights get a gradient."""
    x, routing, weights = inputs(5, 20, 8, 2, favourite=0, dropless=False)
    y, dx, dw_TK, *_ = output_and_gradients(function, x, routing, weights)
    lost = ~routing.kept_TK.any(-1)
    assert lost.any()
    assert not y[lost].any() and not dx[lost].any() and not dw_TK[~routing.kept_TK].any()
    assert (y[~lost].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("function", [experts_loop, experts_grouped])
def test_capacity_equals_dropless_when_nothing_drops(function):
    """With room for all, outputs and gradients are those of dropless routing to the bit."""
    x, _, weights = inputs(6, 30, 4, 2)
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(6))
    free = route(logits, CONTROLS, top_k=2)
    roomy = route(logits, CONTROLS._replace(capacity_factor=torch.tensor(4.0)), top_k=2, dropless=False)
    pairs = zip(output_and_gradients(function, x, free, weights),
                output_and_gradients(function, x, roomy, weights), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_bfloat16_products_come_near_the_float32_ones():
    """Both paths in bfloat16, from float32 masters, lie within its rounding of the float32 loop."""
    x, routing, weights = inputs(8, 64, 4, 2)
    exact = experts_loop(x, routing, *weights)
    for impl in ("loop", "grouped"):
        experts = Experts(4, D, WIDTH_F, impl)
        for parameter, weight in zip((experts.w_gate, experts.w_up, experts.w_down), weights, strict=True):
            parameter.data = weight
        y = experts(x.bfloat16(), routing)
        assert y.dtype == torch.bfloat16
        assert (y.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("E, K", CASES)
def test_what_is_added_up_is_added_in_float32(E, K):
    """Rows in bfloat16: a token's sum is rounded once, and its weights' gradient is as exact as float32."""
    x, routing, _ = inputs(9 * E + K, 33, E, K, dtype=torch.bfloat16)
    weights = routing.weights_TK.requires_grad_()
    y = dispatched(x, routing, E, lambda rows, order: rows)
    assert torch.equal(y, (x.float().unsqueeze(1) * weights.unsqueeze(-1)).sum(1).bfloat16())
    grad = torch.randn(y.shape).bfloat16()
    (actual,) = torch.autograd.grad(y, weights, grad)
    torch.testing.assert_close(actual, (x.float() * grad.float()).sum(-1, keepdim=True).expand(-1, K))


def test_what_the_grouped_path_cannot_do_is_refused():
    """float64, widths off the 16 bytes that grouped_mm needs, and unknown implementations, each by name."""
    x, routing, weights = inputs(0, 4, 2, 1)
    with pytest.raises(ValueError, match=r"float64.*'loop'"):
        experts_grouped(x.double(), routing, *(w.double() for w in weights))
    with pytest.raises(ValueError, match=r"multiples of 4, not 14 x 24.*'loop'"):
        experts_grouped(x[:, :14], routing, weights[0][:, :14], weights[1][:, :14], weights[2][..., :14])
    with pytest.raises(ValueError, match="multiples of 4, not 16 x 22"):
        experts_grouped(x, routing, weights[0][..., :22], weights[1][..., :22], weights[2][:, :22])
    with pytest.raises(ValueError, match=r"experts_impl = 'fast'.*'loop', 'grouped'"):
        Experts(2, 8, 8, "fast")
