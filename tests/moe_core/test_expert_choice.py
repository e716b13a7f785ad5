"""Experts that choose their tokens: literally, balanced by construction, and what that rules out."""

import math

import numpy as np
import pytest
import torch

from moe_core import ConfigError, preset
from moe_core.knobs import Knobs
from moe_core.model import RouterControls, Transformer
from moe_core.model.experts import Biases, experts_grouped, experts_loop
from moe_core.model.generate import generate
from moe_core.model.router import Routing, draw_noise, route

EXPERT = dict(routing="expert", dropless=False, balance="none")


def controls(temp=1.0, noise_std=0.0, capacity_factor=1.0):
    return RouterControls.constant(temp, noise_std, capacity_factor)


def choose(logits, at=None, **how):
    return route(logits, controls() if at is None else at, **{"top_k": 1, "routing": "expert", **how})


def test_literal_choices_of_three_experts():
    """Room for two tokens each: token 3 gets none, the others two, and p of expert and token is the weight."""
    p = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.1, 0.3], [0.1, 0.5, 0.4], [0.4, 0.35, 0.25]])
    routing = choose(p.log(), controls(capacity_factor=1.5))
    assert sorted(routing.tokens_EC[0].tolist()) == [0, 1] and sorted(routing.tokens_EC[1].tolist()) == [0, 2]
    assert routing.experts_TK[:3].tolist() == [[0, 1, 2], [0, 2, 1], [1, 2, 0]]  # each token's own order
    assert sorted(routing.tokens_EC[2].tolist()) == [1, 2]
    assert routing.kept_TK.tolist() == [[True, True, False]] * 3 + [[False] * 3]
    torch.testing.assert_close(routing.weights_TK, p.gather(1, routing.experts_TK))
    assert routing.stats.demand_E.tolist() == routing.stats.served_E.tolist() == [2, 2, 2]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("T, E, K, factor", [(48, 4, 1, 1.0), (33, 8, 2, 1.25), (5, 8, 1, 0.1), (20, 3, 2, 99.0)])
def test_it_is_balanced_by_construction(scores, T, E, K, factor):
    """However lopsided the logits, each takes ceil(factor T K / E) tokens: its best by p, noise added to ln p.

    Noise does not change a token's own order, and of several sequences each has the loss of what it has to do with.
    """
    logits = torch.randn(T, E) + torch.tensor([9.0] + [0.0] * (E - 1))
    noise, capacity = draw_noise("gumbel", (T, E)), min(T, math.ceil(factor * T * K / E))
    B = 5 if T % 5 == 0 else 3
    routing = choose(logits, controls(0.7, 0.4, factor), noise_TE=noise, top_k=K, router_scores=scores, n_sequences=B)
    p = (logits / 0.7).softmax(-1) if scores == "softmax" else (logits / 0.7).sigmoid()
    best = (p.log() + 0.4 * noise).topk(capacity, dim=0).indices
    for e in range(E):
        assert set(routing.tokens_EC[e].tolist()) == set(best[:, e].tolist())
        took = torch.where(((routing.experts_TK == e) & routing.kept_TK).any(-1))[0]
        assert set(took.tolist()) == set(best[:, e].tolist())
    assert routing.stats.demand_E.tolist() == routing.stats.served_E.tolist() == [capacity] * E
    assert routing.balance_loss.item() == pytest.approx(1, abs=1e-5)
    assert (p.gather(1, routing.experts_TK).diff(dim=-1) <= 0).all()
    q, taken = p / p.sum(-1, keepdim=True), torch.zeros(T, E).scatter_(0, best, 1.0)
    each = [taken_b.sum(0) @ q_b.mean(0) for taken_b, q_b in zip(taken.chunk(B), q.chunk(B), strict=True)]
    torch.testing.assert_close(routing.sequence_loss, sum(each) / capacity)
    lost = T - len(set(best.flatten().tolist()))
    assert routing.stats.no_expert.item() == pytest.approx(lost / T)


@pytest.mark.parametrize("E, K, factor, bias", [
    (4, 1, 1.0, False), (8, 2, 1.25, True), (3, 1, 0.2, False), (2, 2, 9.0, True)])
def test_the_batched_path_equals_the_loop(E, K, factor, bias):
    """Output and all gradients, of tokens that many experts took and of those that none did."""
    T, D, F = 37, 16, 24
    base = choose(torch.randn(T, E), controls(capacity_factor=factor), top_k=K)
    tensors = [torch.randn(T, D), torch.rand(T, E), torch.randn(E, D, F) / 4, torch.randn(E, D, F) / 4,
               torch.randn(E, F, D) / 5]
    tensors += [torch.randn(E, n) for n in (F, F, D)] if bias else []
    grad, found = torch.randn(T, D), []
    for path in (experts_loop, experts_grouped):
        leaves = [t.clone().requires_grad_() for t in tensors]
        routing = Routing(**{**vars(base), "weights_TK": leaves[1]})
        y = path(leaves[0], routing, *leaves[2:5], Biases(*leaves[5:]) if bias else None)
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    for loop, batched in zip(*found, strict=True):
        torch.testing.assert_close(batched, loop, atol=1e-5, rtol=1e-5)
    assert not found[1][0][~base.kept_TK.any(-1)].any()


def test_a_run_has_even_shares_says_who_got_none_and_follows_its_capacity(tiny_run):
    """Every stored share is fair at every step; a turned capacity holds from the next step; a resumed run goes on."""
    run = tiny_run(**EXPERT, capacity_factor=1.0)
    run.step(3)
    before = run.metrics()["router/no_expert_mean"].iloc[-1]
    run.knobs["capacity_factor"].hold(3.0)
    run.step(2)
    m = run.metrics(per_layer=True)
    assert np.allclose(run.experts()[["demand", "served"]], 1 / 4)
    assert (m["router/drop_frac_mean"] == 0).all() and (m["router/collapsed"] == 0).all()
    assert m["router/no_expert_mean"].iloc[-1] < before and before > 0
    assert m["router/no_expert_mean"].iloc[-1] == pytest.approx(
        m[["router/no_expert_mean/layer_0", "router/no_expert_mean/layer_1"]].iloc[-1].mean(), abs=1e-6)
    assert run.preview(capacity_factor=4.0).then["router/no_expert_mean"] == 0  # room for all of them
    assert not [f for f in run.health() if f.level == "alarm"]


def test_its_capacity_lies_with_the_host():
    """On any device: shapes follow it, and to read it must not wait."""
    config = preset("nano", **EXPERT)
    tensors = Knobs(config, "meta").tensors
    assert tensors["capacity_factor"].device.type == "cpu" and tensors["router_temp"].device.type == "meta"


def test_it_looks_ahead_and_so_writes_no_text(tiny_run):
    """A later token changes an earlier one's logits; generation is refused for it, by name, and so is a probe."""
    run = tiny_run(**EXPERT, capacity_factor=0.5)
    model = Transformer(run.config.model, run.config.router, seed=0).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.experts.w_down.mul_(50)
        tokens = torch.randint(512, (8, 32))  # of one sequence, all that is looked at may stay where it was
        changed = tokens.clone()
        changed[:, 16:] = torch.randint(512, (8, 16))
        moved = (model(tokens).logits_BSV - model(changed).logits_BSV).abs().amax(-1)
    assert moved[:, :16].max() > 1e-4
    for ask in (lambda: generate(model, [[1, 2]], 3), lambda: run.generate("def ", 3)):
        with pytest.raises(ConfigError, match="routing = 'expert': must be 'token' for generation"):
            ask()
    with pytest.raises(ValueError, match="inspect: routing = 'expert'"):
        run.inspect()


@pytest.mark.parametrize("changes, line", [
    (dict(routing="expert", balance="none"), "dropless = True: must be False for routing = 'expert'"),
    (dict(EXPERT, balance="bias"), "balance = 'bias': must be 'none' for routing = 'expert'"),
    (dict(EXPERT, top_k=2, norm_topk_prob=True), "norm_topk_prob = True: must be False for routing = 'expert'"),
    (dict(EXPERT, compile=True), "compile = True: must be False for routing = 'expert'"),
])
def test_what_does_not_go_with_it_is_refused_in_one_line(changes, line):
    with pytest.raises(ConfigError) as refused:
        preset("nano", **changes)
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)
