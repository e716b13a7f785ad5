"""Routing, checked against literal cases and a queue in plain Python."""

import math
from fractions import Fraction

import pytest
import torch

from moe_core.config import RouterConfig
from moe_core.model.router import Router, RouterControls, capacity_of, draw_noise, route

PLAIN = RouterControls.constant(temp=1.0, noise_std=0.0, capacity_factor=1.0)


def controls(temp=1.0, noise_std=0.0, capacity_factor=1.0):
    return RouterControls.constant(temp, noise_std, capacity_factor)


@pytest.fixture(params=[0, 1])
def generator(request):
    return torch.Generator().manual_seed(request.param)


def test_literal_routing_of_four_tokens_to_their_best_expert():
    """K = 1: the largest logit wins and its weight is its own probability, not renormalised."""
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    routing = route(probs.log(), PLAIN, top_k=1)
    assert routing.experts_TK.tolist() == [[0], [2], [0], [0]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.7], [0.6], [0.5], [0.6]]))
    assert routing.kept_TK.all()
    assert routing.stats.demand_E.tolist() == routing.stats.served_E.tolist() == [3, 0, 1]
    assert routing.stats.top1_p.item() == pytest.approx(0.6)
    assert routing.stats.entropy.item() == pytest.approx(-(probs * probs.log()).sum(-1).mean().item())


@pytest.mark.parametrize("norm, weights", [
    (False, [[0.7, 0.2], [0.6, 0.3]]),
    (True, [[7 / 9, 2 / 9], [2 / 3, 1 / 3]]),
])
def test_literal_weights_of_two_picks(norm, weights):
    """K = 2: picks come best first; norm_topk_prob divides their probabilities by their sum."""
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).log()
    routing = route(logits, PLAIN, top_k=2, norm_topk_prob=norm)
    assert routing.experts_TK.tolist() == [[0, 1], [2, 1]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor(weights))


@pytest.mark.parametrize("norm, weights", [
    (False, [[0.8, 0.5], [0.75, 0.6]]),
    (True, [[8 / 13, 5 / 13], [5 / 9, 4 / 9]]),
])
def test_literal_weights_with_sigmoid_scores(norm, weights):
    """Each expert's score stands by itself; losses and statistics read the three scores divided by their sum."""
    scores = torch.tensor([[0.8, 0.5, 0.2], [0.1, 0.6, 0.75]])
    routing = route(scores.logit(), PLAIN, top_k=2, router_scores="sigmoid", norm_topk_prob=norm)
    assert routing.experts_TK.tolist() == [[0, 1], [2, 1]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor(weights))
    q = scores / scores.sum(-1, keepdim=True)
    assert routing.stats.top1_p.item() == pytest.approx((q[0, 0] + q[1, 2]).item() / 2)
    assert routing.stats.entropy.item() == pytest.approx(-(q * q.log()).sum(-1).mean().item())
    shares = torch.tensor([1, 2, 1]) / 4
    assert routing.balance_loss.item() == pytest.approx(3 * (shares * q.mean(0)).sum().item())


def test_sigmoid_picks_whom_softmax_picks_and_lets_the_loss_reach_each_score(generator):
    """Noise and bias are added to the tempered logit in both; with K = 1 a weight's gradient is sigmoid's own."""
    logits, noise = torch.randn(100, 8, generator=generator), draw_noise("gumbel", (100, 8), generator)
    bias = torch.randn(8, generator=generator)
    pair = [route(logits, controls(0.6, 0.7), noise, bias, top_k=3, router_scores=s) for s in ("softmax", "sigmoid")]
    assert torch.equal(pair[0].experts_TK, pair[1].experts_TK)
    torch.testing.assert_close(pair[1].weights_TK, (logits / 0.6).sigmoid().gather(1, pair[1].experts_TK))
    assert torch.equal(pair[0].z_loss, pair[1].z_loss)
    logits.requires_grad_()
    routing = route(logits, controls(0.6), top_k=1, router_scores="sigmoid")
    grad, = torch.autograd.grad(routing.weights_TK.sum(), logits)
    p = (logits.detach() / 0.6).sigmoid()
    expected = torch.zeros(100, 8).scatter(1, routing.experts_TK, (p * (1 - p) / 0.6).gather(1, routing.experts_TK))
    torch.testing.assert_close(grad, expected)


def test_normalised_sigmoid_weights_stay_finite_where_scores_underflow():
    """Scores of exp(-200) and exp(-201) are 0 in float32; their weights still add up to 1."""
    routing = route(torch.tensor([[-200.0, -201.0, -300.0]]), PLAIN, top_k=2, router_scores="sigmoid",
                    norm_topk_prob=True)
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[1.0, 0.0]]).softmax(-1))
    assert routing.balance_loss.isfinite() and routing.stats.entropy.item() == pytest.approx(0.5822, abs=1e-3)


def test_a_full_expert_drops_later_tokens():
    """Capacity 2 of each expert: the third token that asks for expert 0 is dropped, and stays in demand."""
    logits = torch.eye(2)[[0, 0, 0, 1]]
    routing = route(logits, PLAIN, top_k=1, dropless=False)
    assert routing.kept_TK.flatten().tolist() == [True, True, False, True]
    assert routing.experts_TK.flatten().tolist() == [0, 0, 0, 1]
    assert routing.stats.demand_E.tolist() == [3, 1]
    assert routing.stats.served_E.tolist() == [2, 1]
    assert routing.balance_loss == route(logits, PLAIN, top_k=1).balance_loss  # of what was asked for


def test_first_choices_get_in_before_second_choices_of_earlier_tokens():
    """Token 1's second choice, expert 0, is dropped for token 2's first, though token 1 comes earlier."""
    logits = torch.tensor([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [3.0, 1.0, 2.0]])
    routing = route(logits, PLAIN, top_k=2, dropless=False)
    assert routing.experts_TK.tolist() == [[0, 1], [1, 0], [0, 2]]
    assert routing.kept_TK.tolist() == [[True, True], [True, False], [True, True]]
    assert routing.stats.demand_E.tolist() == [3, 2, 1]
    assert routing.stats.served_E.tolist() == [2, 2, 1]


@pytest.mark.parametrize("T, E, K, factor", [
    (1, 2, 1, 1.0), (37, 5, 2, 0.7), (64, 8, 1, 1.25), (50, 3, 3, 0.3),
])
def test_who_gets_in_is_a_queue_in_plain_python(generator, T, E, K, factor):
    """For random logits, each assignment is kept iff its expert still had room when its turn came."""
    logits = torch.randn(T, E, generator=generator)
    routing = route(logits, controls(capacity_factor=factor), top_k=K, dropless=False)
    room = [math.ceil(factor * T * K / E)] * E
    expected = torch.zeros(T, K, dtype=torch.bool)
    for k in range(K):
        for t in range(T):
            expert = routing.experts_TK[t, k]
            expected[t, k] = room[expert] > 0
            room[expert] -= 1
    assert torch.equal(routing.kept_TK, expected)
    taken = torch.stack([(routing.experts_TK[expected] == e).sum() for e in range(E)])
    assert routing.stats.served_E.tolist() == taken.tolist()


@pytest.mark.parametrize("factor", ["0.001", "0.1", "0.7", "1.05", "1.1", "1.2", "1.25", "1.3", "2.4"])
def test_capacity_is_the_ceiling_of_the_decimal_that_was_typed(factor):
    """An expert that everyone asks for takes ceil(factor * T / E), whatever float32 makes of the factor."""
    for T in (1, 10, 330, 1000, 4096):
        logits = torch.tensor([1.0, 0.0]).expand(T, 2)
        routing = route(logits, controls(capacity_factor=float(factor)), top_k=1, dropless=False)
        room = min(T, math.ceil(Fraction(factor) * T / 2))
        assert routing.stats.served_E[0].item() == room, T
        assert capacity_of(controls(capacity_factor=float(factor)), T, 2, 1) == room, T  # where experts choose


@pytest.mark.parametrize("K", [1, 2])
def test_capacity_equals_dropless_when_nothing_drops(generator, K):
    """With room for every token at every expert, all of the routing is that of dropless mode."""
    logits = torch.randn(40, 4, generator=generator)
    free = route(logits, PLAIN, top_k=K)
    roomy = route(logits, controls(capacity_factor=4.0), top_k=K, dropless=False)
    for name in ("experts_TK", "weights_TK", "kept_TK", "balance_loss", "z_loss"):
        assert torch.equal(getattr(free, name), getattr(roomy, name)), name
    assert torch.equal(free.stats.served_E, roomy.stats.served_E)


@pytest.mark.parametrize("E", [2, 8])
def test_balance_loss_is_1_when_uniform_and_E_when_collapsed(E):
    """Uniform by indifferent probabilities or by evenly spread certain ones; collapsed on one expert."""
    indifferent, spread, collapsed = torch.zeros(64, E), 100 * torch.eye(E).repeat(8, 1), torch.zeros(64, E)
    collapsed[:, 1] = 100
    for logits, expected in ((indifferent, 1), (spread, 1), (collapsed, E)):
        assert route(logits, PLAIN, top_k=1).balance_loss.item() == pytest.approx(expected, rel=1e-6)


def test_balance_loss_pushes_the_crowded_expert_down(generator):
    """Its gradient raises the loss with the logit of the expert in most demand: descent spreads the load."""
    logits = torch.randn(200, 4, generator=generator) + torch.tensor([1.0, 0, 0, 0])
    logits.requires_grad_()
    route(logits, PLAIN, top_k=1).balance_loss.backward()
    assert logits.grad.mean(0).argmax() == 0
    assert logits.grad.mean(0)[0] > 1e-4


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_sequence_loss_is_the_mean_of_the_balance_losses_of_the_sequences(generator, scores):
    """Its value and its gradient; two sequences that each collapse, on different experts, do not hide in it."""
    logits = torch.randn(5 * 12, 6, generator=generator).requires_grad_()
    how = dict(top_k=2, router_scores=scores)
    whole = route(logits, controls(0.7), n_sequences=5, **how).sequence_loss
    each = torch.stack([route(part, controls(0.7), **how).balance_loss for part in logits.chunk(5)]).mean()
    torch.testing.assert_close(whole, each)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (whole, each)))
    collapsed = 100 * torch.eye(2)[[0, 0, 0, 1, 1, 1]]
    routing = route(collapsed, PLAIN, top_k=1, n_sequences=2)
    assert routing.balance_loss.item() == pytest.approx(1) and routing.sequence_loss.item() == pytest.approx(2)


def test_z_loss_is_of_the_raw_logits(generator):
    """mean(logsumexp(z)^2), and neither temperature nor noise moves it; ln(E)^2 at zero logits."""
    logits = torch.randn(50, 8, generator=generator)
    noise = draw_noise("gumbel", (50, 8), generator)
    expected = logits.exp().sum(-1).log().square().mean()
    for temp, std in ((1.0, 0.0), (0.5, 0.0), (3.0, 2.0)):
        torch.testing.assert_close(route(logits, controls(temp, std), noise, top_k=1).z_loss, expected)
    assert route(torch.zeros(3, 8), PLAIN, top_k=1).z_loss.item() == pytest.approx(math.log(8) ** 2)


def test_noise_is_added_after_the_temperature():
    """Logits (1, 0) at temp 0.5 are (2, 0): noise (0, 1.5) does not turn the choice, noise (0, 2.5) does."""
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    routing = route(logits, controls(0.5, 1.0), torch.tensor([[0.0, 1.5], [0.0, 2.5]]), top_k=1)
    assert routing.experts_TK.tolist() == [[0], [1]]


def test_noise_picks_and_never_weighs(generator):
    """Whoever noise picks is weighed by the noise-free tempered probability; the statistics are so too."""
    logits, noise = torch.randn(100, 8, generator=generator), draw_noise("gumbel", (100, 8), generator)
    routing, quiet = route(logits, controls(1.7, 2.0), noise, top_k=2), route(logits, controls(1.7), top_k=2)
    assert not torch.equal(routing.experts_TK, quiet.experts_TK)
    probs = (logits / 1.7).softmax(-1)
    torch.testing.assert_close(routing.weights_TK, probs.gather(1, routing.experts_TK))
    torch.testing.assert_close(routing.stats.top1_p, probs.gather(1, routing.experts_TK[:, :1]).mean())
    assert torch.equal(routing.stats.entropy, quiet.stats.entropy)


def test_temperature_alone_never_changes_a_choice(generator):
    """Without noise it moves the weights and leaves the picks."""
    logits = torch.randn(100, 8, generator=generator)
    cold, hot = route(logits, controls(0.3), top_k=2), route(logits, controls(3.0), top_k=2)
    assert torch.equal(cold.experts_TK, hot.experts_TK)
    assert (cold.weights_TK[:, 0] > hot.weights_TK[:, 0]).all()


def test_normalised_weights_stay_finite_where_probabilities_underflow():
    """Noise may pick two experts whose probabilities are 0 in float32; their weights still add up to 1."""
    logits, noise = torch.tensor([[500.0, 1.0, 0.0]]), torch.tensor([[-900.0, 0.0, 0.0]])
    routing = route(logits, controls(noise_std=1.0), noise, top_k=2, norm_topk_prob=True)
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[1.0, 0.0]]).softmax(-1))


def test_gumbel_noise_samples_from_the_softmax(generator):
    """The Gumbel-max property: at std 1 an expert is picked as often as its probability says."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = draw_noise("gumbel", (40_000, 4), generator)
    picked = route(probs.log().expand(40_000, 4), controls(noise_std=1.0), noise, top_k=1).stats.demand_E
    torch.testing.assert_close(picked / 40_000, probs, atol=0.01, rtol=0)  # four standard errors


def test_gaussian_noise_is_standard_and_the_global_stream_untouched(generator):
    """Mean 0, variance 1, from the given generator alone; another kind is refused by name."""
    before, state = torch.get_rng_state(), generator.get_state()
    noise = draw_noise("gaussian", (40_000,), generator)
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.03
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draw_noise("gaussian", (40_000,), generator.set_state(state)), noise)
    with pytest.raises(ValueError, match="'gumbel' or 'gaussian'"):
        draw_noise("uniform", (1,))


def test_router_works_in_float32_whatever_it_is_given(generator):
    """bfloat16 tokens are routed as the same numbers in float32 are, by a router cast to bfloat16 or not."""
    router = Router(16, 8, RouterConfig())
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.bias.normal_(generator=generator)
    x = torch.randn(200, 16, generator=generator).bfloat16()
    routing = router(x, PLAIN)
    logits = x.float() @ router.weight.T + router.bias
    torch.testing.assert_close(routing.weights_TK.squeeze(-1), logits.softmax(-1).amax(-1))
    assert torch.equal(routing.experts_TK.squeeze(-1), logits.argmax(-1))
    assert router.bfloat16()(x, PLAIN).weights_TK.dtype == torch.float32


def test_statistics_carry_no_gradient_and_losses_do(generator):
    """Only the weights and the two losses lead back to the logits."""
    routing = route(torch.randn(9, 4, generator=generator).requires_grad_(), PLAIN, top_k=2, dropless=False)
    assert all(not t.requires_grad for t in (routing.logits_TE, *vars(routing.stats).values()))
    assert all(t.requires_grad for t in (routing.weights_TK, routing.balance_loss, routing.z_loss))
