import math

import numpy as np
import pytest
import torch

from moe_core.optim import Muon
from moe_core.optim.muon import newton_schulz

STEPS = 20


@pytest.fixture(params=[0, 1])
def rng(request):
    return np.random.default_rng(request.param)


def spec_orthogonalise(u):
    """Newton-Schulz on one matrix, as written in the paper's appendix: no transposition, no batch."""
    x = u / (np.sqrt((u * u).sum()) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def spec_muon(p, gradients, rates, *, mu, decay, scale):
    """Muon on one matrix [fan_out, fan_in] in plain NumPy: the weights after each step."""
    p, m, path = p.copy(), np.zeros_like(p), []
    fan_out, fan_in = p.shape
    factor = math.sqrt(max(1, fan_out / fan_in)) if scale == "original" else 0.2 * math.sqrt(max(fan_out, fan_in))
    for g, lr in zip(gradients, rates, strict=True):
        m = mu * m + (1 - mu) * g
        u = mu * m + (1 - mu) * g
        p = p * (1 - lr * decay) - lr * factor * spec_orthogonalise(u)
        path.append(p.copy())
    return path


def leaf(array, dtype=torch.float64):
    return torch.nn.Parameter(torch.tensor(array, dtype=dtype))


def walk(optimizer, params, gradients, rates):
    """Step with the given gradients [step][parameter] and rates; the parameters after each step."""
    path = []
    for step, lr in enumerate(rates):
        for p, g in zip(params, gradients[step], strict=True):
            p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype).clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_twenty_steps_follow_the_specification(rng, scale):
    """Matrices tall, wide and square and stacks both ways round, in one optimizer: each to 1e-9 in float64."""
    shapes = [(12, 5), (5, 12), (12, 5), (7, 7), (3, 12, 5), (3, 5, 12), (2, 5, 12), (1, 7, 7)]
    start = [rng.normal(size=s) for s in shapes]
    gradients = [[rng.normal(size=s) * 10.0 ** rng.integers(-6, 3) for s in shapes] for _ in range(STEPS)]
    rates = rng.uniform(1e-3, 0.1, STEPS)
    params = [leaf(p) for p in start]
    optimizer = Muon(params, weight_decay=0.3, momentum=0.9, scale=scale, ns_dtype="float64")
    path = walk(optimizer, params, gradients, rates)
    known = dict(mu=0.9, decay=0.3, scale=scale)
    for i, p in enumerate(start):
        for e in range(p.shape[0] if p.ndim == 3 else 1):
            # A stack is [E, in, out]: the specification's matrix is the transpose of each slice.
            def pick(x, e=e):
                return np.asarray(x)[e].T if np.ndim(x) == 3 else np.asarray(x)
            expected = spec_muon(pick(p), [pick(g[i]) for g in gradients], rates, **known)
            for step in range(STEPS):
                np.testing.assert_allclose(pick(path[step][i]), expected[step], rtol=0, atol=1e-9)


def test_a_batch_equals_a_loop_over_its_experts(rng):
    """A stack of 5 against 5 matrices alone, 6 steps in float64, and with batches cut small: to 1e-12."""
    stack = leaf(rng.normal(size=(5, 24, 40)))
    alone = [leaf(w.T) for w in stack.detach().numpy()]
    gradients = [rng.normal(size=(5, 24, 40)) for _ in range(6)]
    rates = [0.05] * 6
    together = walk(Muon([stack], ns_dtype="float64"), [stack], [[g] for g in gradients], rates)[-1][0]
    looped = [walk(Muon([p], ns_dtype="float64"), [p], [[g[e].T] for g in gradients], rates)[-1][0]
              for e, p in enumerate(alone)]
    assert (together - torch.stack([p.T for p in looped])).abs().max() < 1e-12


@pytest.mark.parametrize("limit", [1, 2000, 5000, 10**9])
def test_where_batches_are_cut_changes_nothing(rng, limit, monkeypatch):
    """From one matrix a product to all at once: the same update in float64 to 1e-13."""
    def update():
        params = [leaf(w) for w in start]
        walk(Muon(params, ns_dtype="float64"), params, [gradients], [0.1])
        return params
    shapes = [(30, 20), (20, 30), (4, 20, 30), (3, 30, 20), (10, 10)]
    start, gradients = ([rng.normal(size=s) for s in shapes] for _ in range(2))
    expected = update()
    monkeypatch.setattr("moe_core.optim.muon._BATCH_ELEMENTS_CPU", limit)
    for p, q in zip(update(), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 32, 88), (8, 88, 32), (2, 128, 352)])
def test_singular_values_end_near_one(rng, dtype, shape):
    """Random matrices, wide and tall, in each compute dtype: all inside [0.65, 1.2]."""
    x = torch.tensor(rng.normal(size=shape))
    x = (x / x.norm(dim=(1, 2), keepdim=True)).to(dtype)
    values = torch.linalg.svdvals(newton_schulz(x).double())
    assert values.min() > 0.65 and values.max() < 1.2


def test_the_orthogonal_factor_is_that_of_the_momentum(rng):
    """The update keeps the singular vectors: U^T X V is diagonal and positive, whatever the gradient's size."""
    p, g = leaf(np.zeros((20, 30))), rng.normal(size=(20, 30)) * 1e-4
    walk(Muon([p], ns_dtype="float64"), [p], [[g]], [1.0])
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    inner = u.T @ -p.detach().numpy() @ vt.T
    assert np.diag(inner).min() > 0.65
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-9


def test_agrees_with_torchs_own_muon(rng):
    """On [out, in] matrices, in bfloat16 as torch computes: 5 steps within the noise of bfloat16."""
    shapes, rates = [(64, 32), (32, 64)], [0.02] * 5
    start, *gradients = ([rng.normal(size=s) for s in shapes] for _ in range(6))
    ours, theirs = ([leaf(w, torch.float32) for w in start] for _ in range(2))
    for adjust in ("original", "match_rms_adamw"):
        walk(Muon(ours, weight_decay=0.1, scale=adjust), ours, gradients, rates)
        walk(torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn=adjust), theirs, gradients, rates)
    for p, q, before in zip(ours, theirs, start, strict=True):
        moved = np.linalg.norm(q.detach().numpy() - before)
        assert torch.dist(p, q) < 0.04 * moved


@pytest.mark.parametrize("starved", ["skip", "reference"])
def test_starved_experts_are_left_alone_or_not(rng, starved):
    """skip: as though the expert had no gradient that step, weights and momentum; reference: it drifts on."""
    stack = leaf(rng.normal(size=(4, 6, 10)))
    alone = [leaf(w.T) for w in stack.detach().numpy()]
    gradients = [rng.normal(size=(4, 6, 10)) for _ in range(12)]
    fed = rng.random((12, 4)) < 0.5
    fed[0], fed[-1, 0] = True, False
    for g, fed_E in zip(gradients, fed, strict=True):
        g[~fed_E] = 0.0
    settings = dict(weight_decay=0.2, ns_dtype="float64")
    path = walk(Muon([stack], starved=starved, **settings), [stack], [[g] for g in gradients], [0.05] * 12)
    each = Muon(alone, **settings)
    expected = walk(each, alone, [[w.T if ate or starved == "reference" else None
                                   for w, ate in zip(g, fed_E, strict=True)]
                                  for g, fed_E in zip(gradients, fed, strict=True)], [0.05] * 12)
    for now, then in zip(path, expected, strict=True):
        torch.testing.assert_close(now[0], torch.stack([w.T for w in then]), rtol=0, atol=1e-12)
    assert torch.equal(path[-1][0][0], path[-2][0][0]) == (starved == "skip")


def test_batches_mix_stacks_that_skip_with_matrices_that_do_not(rng):
    """A starved expert's zero must not reach the matrices that share its product."""
    stack, matrix = leaf(rng.normal(size=(2, 6, 10))), leaf(rng.normal(size=(6, 10)))
    before, matrix_before = stack.detach().clone(), matrix.detach().clone()
    gradients = [np.concatenate([np.zeros((1, 6, 10)), rng.normal(size=(1, 6, 10))]), np.zeros((6, 10))]
    walk(Muon([stack, matrix], starved="skip", weight_decay=1.0), [stack, matrix], [gradients], [0.1])
    assert torch.equal(stack[0], before[0]) and not torch.equal(stack[1], before[1])
    assert not matrix.grad.any()
    torch.testing.assert_close(matrix.detach(), 0.9 * matrix_before)  # it decays: it is no expert
