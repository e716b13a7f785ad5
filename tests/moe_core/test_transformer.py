"""The whole model: its start, its losses, and that nothing but its arguments moves it."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import TINY, VARIANTS, batch, build, gradients, lively, rng, total

from moe_core.model import RouterControls
from moe_core.model.causal import attention_in_blocks
from moe_core.model.cross_entropy import linear_cross_entropy
from moe_core.model.experts import dispatched
from moe_core.model.norm import RMSNorm
from moe_core.model.rope import rope_tables
from moe_core.model.router import route
from moe_core.presets import preset


def test_the_loss_is_that_of_the_logits():
    """Cross-entropy chunk by chunk and that of all logits at once agree, and so do all gradients."""
    model, (tokens, targets) = build(TINY), batch(TINY)
    grads = []
    for whole in (False, True):
        model.zero_grad()
        loss = model(tokens, targets, return_logits=whole, generator=torch.Generator().manual_seed(0)).losses["ce"]
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


# Start

@pytest.mark.parametrize("name", ["nano", "moe-203m", "dense-107m"])
def test_first_cross_entropy_is_that_of_a_uniform_guess(name):
    """Within 0.1 of ln V at the preset's width and vocabulary."""
    config = preset(name, n_layer=2, block_size=64)
    model, (tokens, targets) = build(config).eval(), batch(config, size=2)
    with torch.no_grad():
        first = model(tokens, targets).losses["ce"].item()
    assert abs(first - math.log(config.model.vocab_size)) < 0.1


def test_every_weight_starts_with_the_deviation_that_the_table_gives():
    """Of initialise(): by name and fan-in; biases at 0, norms at 1."""
    model = build(preset("nano", n_layer=2, bias=True, use_rope=False, skip_first_n_moe=1, n_shared_experts=1))
    D = model.config.d_model
    for name, p in model.named_parameters():
        leaf = name.removesuffix(".weight").split(".")[-1]
        if p.ndim == 1 or leaf.startswith("b_"):
            assert (p == ("norm" in name)).all(), name
            continue
        gain = {"embed": 0.25, "positions": 0.25, "router": 0.5, "o_proj": 0.02, "down_proj": 0.02, "w_down": 0.02}
        fan_in = D if leaf in ("embed", "positions") else p.shape[1]
        assert p.std().item() == pytest.approx(gain.get(leaf, 1.0) / fan_in**0.5, rel=0.1), name


def test_weights_come_from_the_seed_alone():
    """The same seed gives the same weights, another seed others, None fresh ones; the global stream stays."""
    before = torch.get_rng_state()
    one, same, other, fresh, fresher = (build(seed=s).state_dict() for s in (1, 1, 2, None, None))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[k], same[k]) for k in one)
    for a, b in ((one, other), (fresh, fresher)):
        assert all(not torch.equal(a[k], b[k]) for k in a if "norm" not in k and "bias" not in k)
    with torch.device("meta"):
        shapes = build()
    assert {table.device.type for table in (*shapes.rope, *shapes.to_empty(device="cpu").rope)} == {"meta", "cpu"}


# Losses and gradients

@pytest.mark.parametrize("variant", [v for v in VARIANTS if "dense" not in v])
def test_model_gives_the_same_with_either_expert_path(variant):
    """All losses, all statistics and every parameter's gradient, in training with noise."""
    config = TINY.replace(**VARIANTS[variant])
    loop, grouped = lively(config, experts_impl="loop"), lively(config)
    controls = RouterControls.constant(1.5, 0.7, 0.8)
    a, b = (m(*batch(config), controls=controls, generator=rng()) for m in (loop, grouped))
    torch.testing.assert_close(a.losses, b.losses)
    assert torch.equal(a.stats.demand_E, b.stats.demand_E) and torch.equal(a.stats.served_E, b.stats.served_E)
    torch.testing.assert_close(gradients(loop, total(a)), gradients(grouped, total(b)), atol=1e-6, rtol=1e-4)


def test_language_model_loss_teaches_a_top1_router():
    """At K = 1 the cross-entropy alone has a gradient on every router (renormalised weights: 1e-8)."""
    model, (tokens, targets) = build(), batch()
    routers = [block.mlp.router.weight for block in model.blocks]
    grads = torch.autograd.grad(model(tokens, targets).losses["ce"], routers)
    assert all(g.norm() > 1e-4 for g in grads)


def test_losses_of_one_layer_do_not_hide_in_the_mean():
    """Layers that collapse on different experts score E each, and E in the mean; pooled they score 1."""
    model = lively()
    with torch.no_grad():
        for expert, block in enumerate(model.blocks):
            block.mlp.router.bias[expert] = 50.0
    output = model(*batch())
    torch.testing.assert_close(output.balance_L, torch.full((3,), 4.0))
    torch.testing.assert_close(output.losses["balance"], output.balance_L.mean())
    torch.testing.assert_close(output.losses["z"], output.z_L.mean())
    assert not output.balance_L.requires_grad and not output.z_L.requires_grad
    assert output.stats.demand_E.argmax(-1).tolist() == [0, 1, 2]


def test_the_sequence_loss_is_of_the_batchs_own_sequences():
    """Layer by layer the mean of the balance losses that each has by itself."""
    model, (tokens, targets) = lively().eval(), batch()
    each = torch.stack([model(*one).balance_L for one in zip(tokens.split(1), targets.split(1), strict=True)])
    torch.testing.assert_close(model(tokens, targets).sequence_L, each.mean(0))


def test_dense_model_has_one_loss_and_no_statistics():
    """Without experts there is the cross-entropy alone, and no noise is drawn."""
    generator = rng()
    state = generator.get_state()
    output = lively(TINY.replace(n_experts=0))(*batch(), generator=generator)
    assert list(output.losses) == ["ce"]
    assert output.stats is None and output.balance_L is None and output.z_L is None
    assert torch.equal(generator.get_state(), state)


def test_cross_entropy_is_that_of_the_returned_logits():
    """Logits come when asked for or when there are no targets, and are the loss's own."""
    model, (tokens, targets) = lively().eval(), batch()
    output = model(tokens, targets, return_logits=True)
    expected = -output.logits_BSV.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()
    torch.testing.assert_close(output.losses["ce"], expected)
    torch.testing.assert_close(model(tokens).logits_BSV, output.logits_BSV)
    assert model(tokens, targets).logits_BSV is None and "ce" not in model(tokens).losses


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "capacity" not in v])
def test_no_token_sees_the_future(variant):
    """Changing one token changes its own logits and later ones, and none before."""
    config = TINY.replace(**VARIANTS[variant])
    model, (tokens, _) = lively(config).eval(), batch(config)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % config.model.vocab_size
    moved = (model(tokens).logits_BSV - model(changed).logits_BSV).abs().amax(-1)
    assert moved[:, :7].max() < 1e-6
    assert (moved[:, 7:].amax(0) > 1e-5).all()
    if not config.model.n_experts:  # whose room follows the length
        torch.testing.assert_close(model(tokens[:, :7]).logits_BSV, model(tokens).logits_BSV[:, :7])


def test_bfloat16_compute_keeps_float32_masters_losses_and_routing():
    """Activations in bfloat16 move the loss by its rounding; weights, gradients and losses stay float32."""
    exact, model = lively(), lively(compute_dtype=torch.bfloat16)
    output, expected = model(*batch(), return_logits=True), exact(*batch())
    assert output.logits_BSV.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in output.losses.values())
    assert all(g.dtype == torch.float32 for g in gradients(model, total(output)).values())
    torch.testing.assert_close(output.losses, expected.losses, atol=0, rtol=5e-3)


def test_a_sequence_longer_than_the_block_is_refused():
    """By its length and the field that allows less."""
    with pytest.raises(ValueError, match=r"17 tokens.*block_size = 16"):
        lively()(torch.zeros(1, 17, dtype=torch.int64))


# Noise, knobs and recomputation

def test_noise_is_absent_in_eval():
    """In eval even a huge noise_std moves nothing and draws nothing; in training it moves the routing."""
    model, (tokens, targets) = lively(), batch()
    loud = RouterControls.constant(1.0, 100.0, 1.25)
    outputs = {}
    for training in (False, True):
        generator = rng()
        state = generator.get_state()
        outputs[training] = model.train(training)(tokens, targets, controls=loud, generator=generator)
        assert torch.equal(generator.get_state(), state) is not training
    plain = model.eval()(tokens, targets)
    torch.testing.assert_close(outputs[False].losses, plain.losses, atol=0, rtol=0)
    assert not torch.equal(outputs[True].stats.demand_E, plain.stats.demand_E)


def test_each_layer_has_noise_of_its_own():
    """With logits of zero the noise alone picks, and the layers pick differently."""
    model = lively()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.weight.zero_()
    output = model(*batch(), controls=RouterControls.constant(1.0, 1.0, 1.25), generator=rng())
    assert len({tuple(demand) for demand in output.stats.demand_E.tolist()}) == 3


def test_a_turned_knob_leaves_later_random_numbers_where_they_were():
    """Noise is drawn whatever its scale: after a forward the generator stands in the same place."""
    model, states = lively(), []
    for noise_std in (0.0, 1.0):
        generator = rng()
        model(*batch(), controls=RouterControls.constant(1.0, noise_std, 1.25), generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_dense_blocks_come_first_and_have_no_part_in_the_routers_numbers():
    """Two of three blocks dense: statistics, noise and losses are of the one that routes."""
    model = lively(TINY.replace(skip_first_n_moe=2, mlp_width=40))
    assert [type(block.mlp).__name__ for block in model.blocks] == ["MLP", "MLP", "MoE"]
    assert model.blocks[0].mlp.up_proj.weight.shape == (40, 32)
    output = model(*batch(), generator=rng())
    assert output.stats.demand_E.shape == (1, 4) and len(output.router_logits) == 1
    assert model.draw(batch()[0], rng())[0].shape == (1, 64, 4)
    torch.testing.assert_close(output.losses["balance"], output.balance_L[0])


def test_shared_experts_see_every_token_also_those_that_were_dropped():
    """What a routed block adds is its experts' part, 0 for a dropped token, and the same SwiGLU of every token."""
    config = TINY.replace(n_shared_experts=2, dropless=False, capacity_factor=0.2)
    moe = lively(config, seed=int(torch.seed() % 2**31)).blocks[0].mlp
    x = torch.randn(3, 16, 32)
    y, routing = moe(x, RouterControls.constant(1.0, 0.0, 0.2), None, None)
    gate, up, down = (p.weight for p in (moe.shared.gate_proj, moe.shared.up_proj, moe.shared.down_proj))
    assert gate.shape == up.shape == (2 * 24, 32)
    shared = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(y, shared + moe.experts(x.flatten(0, 1), routing).view_as(x))
    dropped = ~routing.kept_TK.any(-1).view(3, 16)
    assert dropped.sum() > 16
    torch.testing.assert_close(y[dropped], shared[dropped])
    assert (y[dropped].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("variant", ["one dense block first, biases", "dense gelu, biases"])
def test_every_bias_adds_where_it_belongs(variant):
    """All start at zero, and each, moved by hand, moves the logits."""
    config = TINY.replace(**VARIANTS[variant])
    model, (tokens, _) = lively(config), batch(config)
    names = [n for n, _ in model.named_parameters() if n.endswith(".bias") or ".b_" in n]
    assert len(names) == (3 * 4 + 3 + 3 + 2 * (1 + 3) if config.model.n_experts else 3 * (4 + 2))
    parameters = [model.get_parameter(name) for name in names]
    assert not any(p.any() for p in parameters)
    before = model.eval()(tokens).logits_BSV
    for name, p in zip(names, parameters, strict=True):
        with torch.no_grad():
            p[..., 0] += 0.5
        assert (model(tokens).logits_BSV - before).abs().max() > 1e-5, name
        with torch.no_grad():
            p.zero_()


def test_each_head_for_tokens_further_on_is_judged_by_the_token_it_means():
    """Head k at position i against token i + 1 + k, where there is one; in training only, and the logits without it."""
    config = TINY.replace(n_mtp=3)
    model, (tokens, targets) = lively(config), batch(config)
    out = model(tokens, targets, generator=rng())
    trunk = []
    model.norm.register_forward_pre_hook(lambda module, given: trunk.append(given[0]))
    again = model(tokens, targets, generator=rng())
    rope = rope_tables(tokens.shape[1], config.model.head_dim, config.model.rope_theta, tokens.device)
    for k, head in enumerate(model.mtp, 1):
        x, _ = head(trunk[0], rope, None, None, None, None)
        logits = F.linear(model.norm(x), model.embed.weight)
        expected = torch.stack([F.cross_entropy(logits[:, i], targets[:, i + k]) for i in range(tokens.shape[1] - k)])
        torch.testing.assert_close(out.mtp_N[k - 1], expected.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.losses["mtp"], out.mtp_N.mean())
    assert not out.mtp_N.requires_grad
    assert torch.equal(out.losses["ce"], again.losses["ce"])
    out.losses["mtp"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.blocks[0].attn.parameters())
    model.eval()
    assert "mtp" not in model(tokens, targets).losses


@pytest.mark.parametrize("function", [
    lambda x: RMSNorm(8, 1e-6)(x),
    lambda x: attention_in_blocks(*[x[None, None]] * 3),
    lambda x: linear_cross_entropy(x, torch.ones(3, 8), torch.zeros(8, dtype=torch.int64)),
    lambda x: dispatched(x, route(x.detach(), RouterControls.constant(1, 0, 1), top_k=1), 8, lambda rows, _: rows),
], ids=["norm", "attention", "cross-entropy", "experts"])
def test_a_second_derivative_that_would_be_wrong_is_refused(function):
    """A gradient in closed form keeps what it needs outside of the graph: through it the next one would lack a part."""
    x = torch.randn(8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
