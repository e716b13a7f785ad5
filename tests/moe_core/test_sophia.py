import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_core import preset
from moe_core.config import ConfigError
from moe_core.model import RouterControls, Transformer
from moe_core.optim import SophiaG, hessian, hessian_due, sample_labels, sampled_gradients

STEPS = 20


@pytest.fixture(params=[0, 1])
def rng(request):
    return np.random.default_rng(request.param)


def spec_sophia(p, gradients, ghats, rates, *, b1, b2, rho, bs, eps, decay, k):
    """SophiaG in plain NumPy: the weights after each step; every k-th step is followed by an estimate."""
    p, m, h, path = p.copy(), np.zeros_like(p), np.zeros_like(p), []
    for step, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        p = p * (1 - lr * decay)
        m = b1 * m + (1 - b1) * g
        p = p - lr * np.sign(m) * np.minimum(np.abs(m) / (rho * bs * h + eps), 1)
        path.append(p.copy())
        if step % k == 0:
            h = b2 * h + (1 - b2) * ghats[step - 1] ** 2
    return path


@pytest.mark.parametrize("k", [1, 3])
def test_twenty_steps_follow_the_specification(rng, k):
    """Parameters of 0 to 3 dimensions, elements clipped and not, zero gradients: each to 1e-9 in float64."""
    shapes = [(), (7,), (5, 4), (3, 4, 5)]
    start = [np.asarray(rng.normal(size=s)) for s in shapes]
    gradients = [[np.asarray(rng.normal(size=s) * 10.0 ** rng.integers(-3, 2)) for s in shapes] for _ in range(STEPS)]
    ghats = [[np.asarray(rng.normal(size=s) * (rng.random(s) < 0.8)) for s in shapes] for _ in range(STEPS)]
    gradients[0][2][:] = 0.0
    rates = rng.uniform(1e-3, 0.1, STEPS)
    known = dict(rho=0.05, bs=24, eps=1e-12)
    params = [torch.nn.Parameter(torch.tensor(p)) for p in start]
    optimizer = SophiaG(params, betas=(0.9, 0.8), weight_decay=0.3, **known)
    path = []
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        for p, g in zip(params, gradients[step], strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        path.append([p.detach().numpy().copy() for p in params])
        if (step + 1) % k == 0:
            optimizer.update_hessian([torch.tensor(ghat) for ghat in ghats[step]])
    clipped = np.concatenate([
        (optimizer.state[p]["momentum"].abs() >= 0.05 * 24 * optimizer.state[p]["hessian"]).numpy().ravel()
        for p in params])
    assert 0.1 < clipped.mean() < 0.9  # both branches of the clip were walked
    for i, p in enumerate(start):
        expected = spec_sophia(p, [g[i] for g in gradients], [g[i] for g in ghats], rates,
                               b1=0.9, b2=0.8, decay=0.3, k=k, **known)
        for step in range(STEPS):
            np.testing.assert_allclose(path[step][i], expected[step], rtol=0, atol=1e-9)


def tiny_model(**changes):
    config = preset("nano", **{**dict(n_layer=2, d_model=8, n_head=2, n_experts=2, expert_width=8, vocab_size=3,
                                      block_size=2), **changes})
    model = Transformer(config.model, config.router, seed=0, compute_dtype=torch.float64, experts_impl="loop")
    return model.double()


@pytest.mark.parametrize("changes, tokens", [
    (dict(n_experts=0), [[0, 2], [1, 1]]), (dict(n_experts=2), [[0, 2], [1, 1]]),
    (dict(n_experts=0, n_mtp=1, block_size=3), [[0, 2, 1]])], ids=str)
def test_the_mean_over_all_label_draws_is_the_gauss_newton_diagonal(changes, tokens, monkeypatch):
    """B ghat^2, weighted by the labels' probabilities over all V^B of them, against J^T (diag p - p p^T) J / B.

    With a head for tokens further on, whose B is smaller: its own, times its coefficient, is added.
    """
    model, coef = tiny_model(**changes).train("n_mtp" in changes), 0.3
    tokens = torch.tensor(tokens)
    params, total = list(model.parameters()), tokens.numel()
    with torch.no_grad():
        for p in params:  # away from the start, where every probability is 1 / V
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype), alpha=0.5)
    out = model(tokens, return_logits=True)
    heads = [logits.flatten(0, 1) for logits in (out.logits_BSV, *out.mtp_logits)]
    assert len(heads) == 1 + changes.get("n_mtp", 0)
    log_p_NV = torch.cat(heads).detach().log_softmax(-1)

    mean = [torch.zeros_like(p) for p in params]
    for labels in itertools.product(range(3), repeat=len(log_p_NV)):
        drawn = torch.tensor(labels)
        parts = iter(drawn.split([len(logits) for logits in heads]))
        monkeypatch.setattr(hessian, "sample_labels",
                            lambda logits, generator, parts=parts: next(parts).view(logits.shape[:2]))
        chance = log_p_NV[torch.arange(len(drawn)), drawn].sum().exp()
        for sums, ghat in zip(mean, sampled_gradients(model, tokens, None, None, params, coef), strict=True):
            sums += 0.0 if ghat is None else chance * total * ghat.square()

    expected = [torch.zeros_like(p) for p in params]
    for weight, logits_NV in zip((1.0, coef), heads, strict=False):
        for p_V, row in zip(logits_NV.detach().softmax(-1), logits_NV, strict=True):
            jacobian = [torch.autograd.grad(logit, params, retain_graph=True, allow_unused=True) for logit in row]
            for i, of_logits in enumerate(zip(*jacobian, strict=True)):
                if of_logits[0] is not None:  # a head's are none of the trunk's
                    j_V = torch.stack(of_logits)
                    mixed = torch.tensordot(p_V, j_V, dims=1)
                    diagonal = torch.tensordot(p_V, j_V.square(), dims=1) - mixed.square()
                    expected[i] += weight / len(logits_NV) * diagonal
    for got, wanted in zip(mean, expected, strict=True):
        # The loss, and the router, are in float32 whatever the model's dtype.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(wanted.max()))
        assert wanted.any()


def test_labels_are_drawn_from_the_softmax_of_their_own_position(rng):
    """40000 draws at two positions: every frequency within 4 standard deviations; a -inf logit never wins."""
    logits_BSV = torch.tensor(rng.normal(size=(1, 2, 5)) * 2, dtype=torch.float32)
    logits_BSV[0, 0, 3] = -math.inf
    n = 40_000
    drawn = sample_labels(logits_BSV.expand(n, 2, 5), torch.Generator().manual_seed(0))
    p_SV = logits_BSV[0].softmax(-1)
    seen_SV = F.one_hot(drawn, 5).float().mean(0)
    assert seen_SV[0, 3] == 0
    assert ((seen_SV - p_SV).abs() <= 4 * (p_SV * (1 - p_SV) / n).sqrt()).all()
    joint = ((drawn[:, 0] == 0) & (drawn[:, 1] == 0)).float().mean()
    assert abs(joint - p_SV[0, 0] * p_SV[1, 0]) < 4 / math.sqrt(n)  # positions are drawn independently


def test_the_pass_touches_nothing_but_its_own_generator():
    """Gradients, training mode, the global random stream and the weights stay; the same seed gives the same."""
    model = tiny_model(n_experts=2).train()
    tokens = torch.tensor([[0, 2]])
    controls = RouterControls.constant(1.0, 0.5, 1.0)
    model(tokens, tokens).losses["ce"].backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    one, two = (sampled_gradients(model, tokens, controls, torch.Generator().manual_seed(7),
                                  list(model.parameters())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a is not None)
    assert torch.equal(torch.get_rng_state(), stream) and model.training
    for p, grad, weight in zip(model.parameters(), grads, weights, strict=True):
        assert torch.equal(p, weight) and (p.grad is grad or torch.equal(p.grad, grad))


def test_a_parameter_out_of_the_loss_keeps_its_curvature():
    """The router's losses are not in the pass, and None leaves momentum and curvature alone."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SophiaG(params, bs=1)
    optimizer.update_hessian([torch.ones(2), torch.ones(2)])
    before = optimizer.state[params[1]]["hessian"].clone()
    optimizer.update_hessian([torch.ones(2), None])
    assert torch.equal(optimizer.state[params[1]]["hessian"], before)
    assert (optimizer.state[params[0]]["hessian"] > before).all()
    with pytest.raises(ValueError, match="3 estimates for 2 parameters"):
        optimizer.update_hessian([None, None, None])


def test_the_schedule_of_passes():
    """After every k steps, then every k_after once the switch step has passed; never after step 0, nor in AdamW."""
    def due(**changes):
        config = preset("nano", **changes).optim
        return [n for n in range(101) if hessian_due(config, n)]
    assert due(optimizer="sophia", sophia_k=25) == [25, 50, 75, 100]
    switching = dict(sophia_k=10, sophia_k_after=20, sophia_k_switch_step=50)
    assert due(optimizer="muon_sophia", **switching) == [10, 20, 30, 40, 50, 60, 80, 100]
    assert due(optimizer="muon_adamw") == due(optimizer="adamw") == []
    with pytest.raises(ConfigError, match="sophia_k_after = 20: must be given together with"):
        preset("nano", sophia_k_after=20)
