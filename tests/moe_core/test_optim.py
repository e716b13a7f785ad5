"""What every optimizer of ours owes as a ``torch.optim.Optimizer``."""

import copy
import io

import pytest
import torch
from torch import nn

from moe_core.optim import MixedOptimizer, Muon, SophiaG


class Small(nn.Module):
    """Two matrices, a stack and a vector, and a loss in which ``unused`` has no part."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def new(*shape):
            return nn.Parameter(torch.randn(shape, generator=generator))
        self.tall, self.wide, self.stack = new(6, 4), new(4, 6), new(3, 4, 6)
        self.vector, self.unused = new(6), new(4, 4)

    def loss(self, step: int) -> torch.Tensor:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(100 + step))
        y = torch.tanh(x @ self.tall.T + self.vector) @ self.wide.T
        return ((x @ self.stack) ** 2).mean() + (y - x).square().mean()


def build(kind: str, model: Small, **changes) -> MixedOptimizer:
    matrices, rest = [model.tall, model.wide, model.stack, model.unused], [model.vector]
    if kind == "Muon":
        return Muon(matrices, **{"weight_decay": 0.1, **changes})
    if kind == "SophiaG":
        return SophiaG(matrices + rest, bs=5, **changes)
    return MixedOptimizer([
        {"params": [model.stack, model.unused], "rule": "muon", "starved": "skip", **changes},
        {"params": [model.tall, model.vector], "rule": "sophia", "bs": 5, **changes},
        {"params": [model.wide], "rule": "adamw", "fused": True, **changes}])


KINDS = ("Muon", "SophiaG", "mixed")


def train(model: Small, optimizer: MixedOptimizer, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` with a curvature estimate after every third."""
    for step in range(first, last + 1):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
        if step % 3 == 0 and (wanted := optimizer.hessian_params()):
            optimizer.update_hessian(torch.autograd.grad(model.loss(-step), wanted, allow_unused=True))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_saved_in_the_middle_of_a_hessian_cycle_goes_on_to_the_bit(kind):
    """Through a file that only weights_only loads, into an optimizer with other rates: the same 8 steps."""
    model, twin = Small(), Small(seed=1)
    optimizer, other = build(kind, model), build(kind, twin, lr=0.5)
    train(model, optimizer, 1, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5, 8)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    train(twin, other, 5, 8)
    assert same(model, twin)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_goes_its_own_way_from_the_same_point(kind):
    """Copied with its model it takes the same steps, and the original is not moved by them."""
    model = Small()
    optimizer = build(kind, model)
    train(model, optimizer, 1, 4)
    before = copy.deepcopy(model)
    twin, other = copy.deepcopy((model, optimizer))
    train(twin, other, 5, 7)
    assert same(model, before)
    train(model, optimizer, 5, 7)
    assert same(model, twin) and not same(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_gradients_and_what_has_none_alone(kind):
    """p.grad keeps its bits; a parameter without one keeps its weights and gets no state; zero_grad frees all."""
    model = Small()
    optimizer = build(kind, model)
    train(model, optimizer, 1, 3)
    model.loss(4).backward()
    grads = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    unused = model.unused.detach().clone()
    optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in grads.items())
    assert torch.equal(model.unused, unused) and not optimizer.state[model.unused]
    optimizer.zero_grad()
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("kind", KINDS)
def test_found_inf_withholds_a_step_and_an_estimate_from_weights_and_state(kind):
    """1 leaves every bit of both, whatever the gradients are; 0 goes the way of an optimizer that has none."""
    model, twin = Small(), Small()
    optimizer, other = build(kind, model), build(kind, twin)
    optimizer.found_inf = torch.zeros(())
    train(model, optimizer, 1, 6)
    train(twin, other, 1, 6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)

    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    optimizer.found_inf = torch.ones(())
    for value in (float("nan"), float("inf"), 1.0):
        for p in model.parameters():
            p.grad = None if p is model.unused else torch.full_like(p, value)
        optimizer.step()
        if wanted := optimizer.hessian_params():
            optimizer.update_hessian([None if p is model.unused else torch.full_like(p, value) for p in wanted])
    torch.testing.assert_close((model.state_dict(), {**optimizer.state_dict()["state"]}), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_is_evaluated_with_gradients_and_its_value_returned(kind):
    """step(closure) is the closure's backward and then a step."""
    model, twin = Small(), Small()
    optimizer, other = build(kind, model), build(kind, twin)

    def closure():
        optimizer.zero_grad()
        loss = model.loss(1)
        loss.backward()
        return loss
    value = optimizer.step(closure)
    assert value.item() == twin.loss(1).item()
    train(twin, other, 1, 1)
    assert same(model, twin)


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_moves_by_its_own_rate(kind):
    """Without decay a group of a third of the rate moves a third as far, from the same point."""
    moved = []
    for lr in (3e-3, 1e-3):
        model = Small()
        before = copy.deepcopy(model)
        optimizer = build(kind, model, weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = lr
        train(model, optimizer, 1, 1)
        moved.append(before.stack.detach() - model.stack.detach())
    torch.testing.assert_close(moved[0], 3 * moved[1], rtol=1e-3, atol=1e-6)
    assert moved[0].any()


def test_the_adamw_of_a_mix_is_torchs_to_the_bit():
    """Six steps, fused, with decay and one gradient missing."""
    model, twin = Small(), Small()
    known = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    ours = MixedOptimizer([{"params": list(model.parameters()), "rule": "adamw", **known}])
    theirs = torch.optim.AdamW(twin.parameters(), **known)
    for step in range(6):
        for m, o in ((model, ours), (twin, theirs)):
            o.zero_grad()
            m.loss(step).backward()
            if step == 3:
                m.tall.grad = None
            o.step()
    assert same(model, twin)
    theirs.load_state_dict(ours.state_dict())  # the names of its state are torch's too


def decaying(optimizer, steps, closure):
    """``steps`` steps at rates that fall linearly to zero."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (1 - step / steps)
        closure()
        optimizer.step()


@pytest.mark.parametrize("kind", ["muon", "sophia"])
def test_converges_on_a_quadratic(kind):
    """|A (W - W*)|^2 with curvatures from 0.1 to 10: the distance to W* falls below a hundredth."""
    generator = torch.Generator().manual_seed(0)
    target, scales = torch.randn(6, 4, generator=generator), torch.logspace(-0.5, 0.5, 6)[:, None]
    w = nn.Parameter(torch.zeros(6, 4))
    optimizer = Muon([w], lr=0.2, ns_dtype="float32") if kind == "muon" else SophiaG(
        [w], lr=0.1, bs=1, rho=1.0, weight_decay=0.0)

    def closure():
        w.grad = scales.square() * (w.detach() - target)
        if kind == "sophia":
            optimizer.update_hessian([scales.expand(6, 4)])
    decaying(optimizer, 400, closure)
    assert (w - target).norm() < 0.01 * target.norm()


@pytest.mark.parametrize("kind", ["muon", "sophia"])
def test_converges_on_rosenbrocks_valley(kind):
    """From (-1.2, 1) to within 0.05 of (1, 1), along the bent valley."""
    w = nn.Parameter(torch.tensor([[-1.2, 1.0]]))
    optimizer = Muon([w], lr=0.05, momentum=0.9, ns_dtype="float32") if kind == "muon" else SophiaG(
        [w], lr=0.05, bs=1, rho=0.01, weight_decay=0.0, betas=(0.9, 0.9))

    def closure():
        optimizer.zero_grad()
        x, y = w[0]
        ((1 - x) ** 2 + 100 * (y - x**2) ** 2).backward()
        if kind == "sophia":  # the Gauss-Newton diagonal of this sum of squares
            x = float(w.detach()[0, 0])
            optimizer.update_hessian([torch.tensor([[2 + 800 * x**2, 200.0]]).sqrt()])
    decaying(optimizer, 1500, closure)
    assert (w - 1).abs().max() < 0.05


def test_compiled_equals_eager():
    """Four steps of all three rules under torch.compile, rates changing: the weights of eager ones in float32."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, twin = Small(), Small()
    optimizer, other = build("mixed", model), build("mixed", twin)
    for o in (optimizer, other):
        o.param_groups[0]["ns_dtype"] = "float32"
    compiled = torch.compile(other.step)
    for step in range(4):
        for m, o, do in ((model, optimizer, optimizer.step), (twin, other, compiled)):
            for group in o.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            o.zero_grad()
            m.loss(step).backward()
            do()
    assert torch._dynamo.utils.counters["frames"]["ok"]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


REFUSED = [
    (lambda p: Muon(p, lr=0.0), "Muon: lr = 0.0: must be a number more than 0"),
    (lambda p: Muon(p, momentum=1.0), "Muon: momentum = 1.0: must be a number, at least 0 and less than 1"),
    (lambda p: Muon(p, scale="rms"), "Muon: scale = 'rms': must be one of 'original', 'match_rms_adamw'"),
    (lambda p: Muon(p, ns_dtype="half"), "Muon: ns_dtype = 'half': must be one of 'bfloat16', 'float32', 'float64'"),
    (lambda p: Muon(p, decay=0.1), "decay = 0.1: Muon has only lr, weight_decay, momentum, scale, ns_dtype, starved"),
    (lambda p: Muon([nn.Parameter(torch.zeros(3))]), "Muon: a parameter of shape [3]: must be a matrix [out, in] or"),
    (lambda p: SophiaG(p), "SophiaG: bs = None: must be the number of predictions averaged in a Hessian pass"),
    (lambda p: SophiaG(p, bs=8, lr=-1), "SophiaG: lr = -1: must be a number more than 0"),
    (lambda p: SophiaG(p, bs=8, betas=(0.9, 1.0)), "SophiaG: betas = (0.9, 1.0): must be two numbers, each at least 0"),
    (lambda p: SophiaG(p, bs=8, rho=0), "SophiaG: rho = 0: must be a number more than 0"),
    (lambda p: SophiaG([nn.Parameter(torch.zeros(3, dtype=torch.complex64))], bs=8),
     "SophiaG: a parameter of torch.complex64, torch.strided: must be real, floating-point and dense"),
    (lambda p: MixedOptimizer([{"params": p, "rule": "lion"}]),
     "rule = 'lion': must be one of 'adamw', 'muon', 'sophia'"),
]


@pytest.mark.parametrize("make, line", REFUSED, ids=[line[:24] for _, line in REFUSED])
def test_a_wrong_hyperparameter_is_refused_in_one_line(make, line):
    with pytest.raises(ValueError) as refused:
        make([nn.Parameter(torch.zeros(3, 3))])
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)


def test_a_refused_group_is_not_added():
    optimizer = build("Muon", Small())
    with pytest.raises(ValueError, match="must be a matrix"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_gradient_is_refused(kind):
    model = Small()
    optimizer = build(kind, model)
    model.stack.grad = torch.zeros_like(model.stack).to_sparse()
    with pytest.raises(RuntimeError, match=r"a gradient of torch.sparse_coo: must be dense"):
        optimizer.step()
