"""Balancing by a bias on the selection: how it moves, what it may touch, and that it evens the load out."""

import math

import numpy as np
import pytest
import torch

from moe_core.knobs import KnobError
from moe_core.model import RouterControls, Transformer
from moe_core.model.balance import follow_load
from moe_core.model.router import draw_noise, route

PLAIN = RouterControls.constant(temp=1.3, noise_std=0.4, capacity_factor=1.0)


def test_one_move_literally():
    """Crowded experts go down, empty ones up, those at the mean stay, each by the speed; then centred by layer."""
    bias = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.5, 0.0, -0.5, 0.0]])
    demand = torch.tensor([[7.0, 3.0, 4.0, 2.0], [10.0, 2.0, 2.0, 2.0]])
    follow_load(bias, demand, torch.tensor(0.1))
    torch.testing.assert_close(bias, torch.tensor([[-0.125, 0.075, -0.025, 0.075], [0.35, 0.05, -0.45, 0.05]]))
    torch.testing.assert_close(bias.sum(-1), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("K, norm", [(1, False), (2, False), (3, True)])
def test_the_bias_picks_and_never_weighs(K, norm):
    """Picks are the K largest of tempered logits, noise and bias; whoever is picked weighs what p says."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    logits, bias = torch.randn(200, 6, generator=generator), torch.randn(6, generator=generator)
    noise = draw_noise("gumbel", (200, 6), generator)
    routing = route(logits, PLAIN, noise, bias, top_k=K, norm_topk_prob=norm)
    assert torch.equal(routing.experts_TK, (logits / PLAIN.temp + 0.4 * noise + bias).topk(K).indices)
    assert not torch.equal(routing.experts_TK, route(logits, PLAIN, noise, top_k=K, norm_topk_prob=norm).experts_TK)
    p = (logits / PLAIN.temp).softmax(-1)
    picked = p.gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, picked / picked.sum(-1, keepdim=True) if norm else picked)
    moved = route(logits, PLAIN, noise, bias + 3.0, top_k=K, norm_topk_prob=norm)
    torch.testing.assert_close(moved.weights_TK, routing.weights_TK)  # a constant to all moves nothing


@pytest.mark.parametrize("balance", ["bias", "both"])
def test_the_bias_moves_once_a_step_by_the_demand_of_all_micro_batches(make, balance):
    """After three steps of three micro-batches it is what the stored shares and the knob say, layer by layer."""
    trainer = make(balance=balance, bias_update_speed=0.02, gradient_accumulation_steps=3, top_k=2, dropless=False,
                   capacity_factor=0.5, eval_interval=2)
    expected = np.zeros((2, 4), np.float32)
    for step, speed in enumerate((0.02, 0.02, 0.05), 1):
        if step == 3:
            trainer.knobs["bias_update_speed"].turn("hold", speed, None, step)
        record = trainer.step()
        told = [[record.metrics[f"router/bias_e{e}/layer_{layer}"] for e in range(4)] for layer in range(2)]
        assert np.array(told) == pytest.approx(expected, abs=1e-6)  # what this step was routed with
        assert record.metrics["router/bias_max"] == pytest.approx(np.abs(expected).max(), abs=1e-6)
        assert record.metrics["router/bias_update_speed"] == pytest.approx(speed)
        demand = record.shares[0] * 3 * 4 * 32 * 2
        expected = expected + speed * np.sign(demand.mean(-1, keepdims=True) - np.rint(demand))
        expected -= expected.mean(-1, keepdims=True)
        assert trainer.model.balance_bias.numpy() == pytest.approx(expected, abs=1e-6)
        assert not np.array_equal(record.shares[0], record.shares[1])  # it follows demand, not what got in


def test_evaluation_uses_the_bias_and_leaves_it_alone(make):
    trainer = make(balance="bias", bias_update_speed=0.5)
    trainer.step()
    before, loss = trainer.model.balance_bias.clone(), trainer.evaluate()
    assert torch.equal(trainer.model.balance_bias, before) and before.abs().max() > 0.1
    trainer.model.balance_bias.zero_()
    assert trainer.evaluate() != loss


@pytest.mark.parametrize("balance, knobs", [
    ("aux", {"load_balance_alpha"}), ("bias", {"bias_update_speed"}),
    ("both", {"load_balance_alpha", "bias_update_speed"}), ("none", set())])
def test_each_way_of_balancing_has_its_knobs_its_loss_and_its_metrics(make, balance, knobs):
    """Alpha is a knob, and its term in the loss, with "aux" and "both"; the balance itself is always measured."""
    trainer = make(balance=balance, load_balance_alpha=0.3, bias_update_speed=0.01)
    assert set(trainer.knobs) & {"load_balance_alpha", "bias_update_speed"} == knobs
    if "bias_update_speed" not in knobs:
        with pytest.raises(KnobError, match="bias_update_speed: unknown knob"):
            trainer.knobs["bias_update_speed"]
    for _ in range(2):
        m = trainer.step().metrics
    alpha = 0.3 if "load_balance_alpha" in knobs else 0.0
    assert m["router/balance_mean"] >= 1.0 and m["router/balance_mean/layer_1"] >= 0.9
    assert m["router/aux_mean"] == pytest.approx(alpha * m["router/balance_mean"])
    assert m["train/loss"] == pytest.approx(
        m["train/ce"] + m["router/aux_mean"] + m["router/z_loss_coef"] * m["router/z_mean"])
    assert ("router/bias_max" in m) == ("bias_update_speed" in knobs) == ("balance_bias" in trainer.model.state_dict())


def test_the_sequence_term_is_minimised_and_charted_beside_any_way_of_balancing(make):
    """Part of train/loss and its gradient with "none" too; per layer; absent where its coefficient is 0."""
    plain = make(balance="none")
    assert not any("seq_aux" in name for name in plain.step().metrics)
    after, seen = [], []
    for alpha in (1e-6, 0.5):
        trainer = make(balance="none", sequence_balance_alpha=alpha, router_noise_std_init=0.0)
        with torch.no_grad():
            for block in trainer.model.blocks:
                block.mlp.router.bias[2] = 1.5
        m = trainer.step().metrics
        assert m["train/loss"] == pytest.approx(
            m["train/ce"] + m["router/seq_aux_mean"] + m["router/z_loss_coef"] * m["router/z_mean"])
        layers = [m[f"router/seq_aux_mean/layer_{layer}"] for layer in range(2)]
        assert m["router/seq_aux_mean"] == pytest.approx(sum(layers) / 2)
        seen.append(m["router/seq_aux_mean"] / alpha)
        for _ in range(20):
            m = trainer.step().metrics
        after.append(m["router/seq_aux_mean"] / alpha)
    assert seen[0] == pytest.approx(seen[1], rel=1e-5) and seen[0] > 1.2
    assert after[1] < 1 + 0.5 * (after[0] - 1)  # where it counts, each sequence becomes more even


def test_without_the_loss_alpha_has_no_gradient(make):
    """With "none" two values of alpha train the same model; with "aux" they do not."""
    for balance, same in (("none", True), ("bias", True), ("aux", False)):
        ends = []
        for alpha in (0.0, 5.0):
            trainer = make(balance=balance, load_balance_alpha=alpha)
            trainer.step(), trainer.step()
            ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert torch.equal(*ends) is same, balance


def test_the_bias_evens_out_a_load_that_without_it_stays_uneven(make):
    """A router leaning to one expert: in forty steps the bias takes its share from over 0.4 to near the fair 0.25."""
    top = {}
    for balance in ("none", "bias"):
        trainer = make(balance=balance, bias_update_speed=0.05, router_noise_std_init=0.5, learning_rate=1e-5,
                       min_lr=0.0, router_noise_decay_iters=10_000)
        with torch.no_grad():
            for block in trainer.model.blocks:
                block.mlp.router.bias[2] = 1.5
        top[balance] = [trainer.step().metrics["router/max_frac_mean"] for _ in range(40)]
    assert top["none"][-1] > 0.4 and top["bias"][0] > 0.4
    assert np.mean(top["bias"][-10:]) < 0.33  # the largest share of one step's 128 tokens strays by more


def test_a_model_cast_to_bfloat16_keeps_its_bias_in_float32(tiny):
    """0.5 + 1e-3 is 0.5 in bfloat16, so casting the model must neither round nor cast the bias."""
    config = tiny(balance="bias")
    model = Transformer(config.model, config.router, seed=0)
    bias = torch.randn(2, 4)
    model.balance_bias.copy_(bias)
    model.bfloat16()
    assert model.embed.weight.dtype == torch.bfloat16
    assert torch.equal(model.balance_bias, bias)
    assert not any(math.isclose(a, b, abs_tol=0) for a, b in zip(bias.flatten().tolist(),
                   bias.bfloat16().flatten().tolist(), strict=True))  # the cast would have shown
