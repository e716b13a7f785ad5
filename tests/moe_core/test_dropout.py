"""What dropout leaves of a training pass, and the same pass computed again from less that is kept."""

import dataclasses

import pytest
import torch
from small_models import TINY, batch, build, gradients, lively, rng, total

from moe_core.model import RouterControls


def dropping(rate=0.3, **changes):
    """A config with dropout, and its three-layer lively model in training mode."""
    return TINY.replace(dropout=rate, **changes)


def test_dropout_scales_what_it_keeps_and_keeps_what_its_masks_say():
    """With every mask full it divides by 1 - rate at the embedding and in both halves; with every mask empty the
    logits are those of a stream of zeros."""
    config = dropping(0.5, n_layer=1, router_noise_std_init=0.0)
    model, plain, (tokens, targets) = lively(config), lively(config.replace(dropout=0.0)), batch(config)
    full = torch.ones(3, *tokens.shape, 32, dtype=torch.bool)
    with torch.no_grad():
        doubled = plain.state_dict() | {"embed.weight": 2 * plain.state_dict()["embed.weight"]}
        for name in ("blocks.0.attn.o_proj.weight", "blocks.0.mlp.experts.w_down"):
            doubled[name] = 2 * doubled[name]
    plain.load_state_dict(doubled)
    controls = RouterControls.constant(1.3, 0.0, 1.25)
    a = model.compute(tokens, targets, controls, None, full, True)
    b = plain.compute(tokens, targets, controls, None, None, True)
    torch.testing.assert_close(2 * a.logits_BSV, b.logits_BSV)  # the head is the embedding, here not doubled
    empty = model.compute(tokens, targets, controls, None, ~full, True)
    assert not empty.logits_BSV.any()
    one = full.clone()
    one[0, 2, 5] = False  # of one token's embedding
    moved = (model.compute(tokens, targets, controls, None, one, True).logits_BSV - a.logits_BSV).abs().amax(-1)
    assert moved[2, 5] > 1e-3 and moved[2, :5].max() < 1e-6 and moved[[0, 1, 3]].max() < 1e-6


def test_dropout_draws_from_the_given_generator_at_its_rate_and_only_in_training():
    """The same state gives the same masks, another place others; the noise before them is that of no dropout."""
    config = dropping(0.3)
    model, plain, (tokens, _) = build(config), build(), batch()
    (noise, kept), (same_noise, none) = (m.draw(tokens, rng(3)) for m in (model, plain))
    assert none is None and torch.equal(noise, same_noise)
    assert kept.shape == (7, 4, 16, 32) and abs(kept.float().mean() - 0.7) < 0.02
    assert len({tuple(place.flatten().tolist()) for place in kept}) == 7
    generator = rng(3)
    assert torch.equal(model.draw(tokens, generator)[1], kept)
    assert not torch.equal(model.draw(tokens, generator)[1], kept)
    state = generator.get_state()
    assert model.eval().draw(tokens, generator) == (None, None)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("variant", [dict(), dict(n_experts=0), dict(skip_first_n_moe=1, bias=True, top_k=2,
                                     dropless=False, capacity_factor=0.6, balance="both")], ids=str)
def test_recomputed_activations_change_nothing(variant):
    """Under activation checkpointing: the same losses, statistics (counted once) and gradients, dropout included."""
    config = dropping(**variant)
    plain, saving = lively(config), lively(config, activation_checkpointing=True)
    controls, forwards = RouterControls.constant(1.3, 0.5, 0.6), [0]
    saving.blocks[1].attn.register_forward_hook(lambda *_: forwards.append(1))
    a, b = (m(*batch(), controls=controls, generator=rng()) for m in (plain, saving))
    grads = gradients(plain, total(a)), gradients(saving, total(b))
    assert sum(forwards) == 2  # it was computed again
    torch.testing.assert_close(a.losses, b.losses, atol=0, rtol=0)
    torch.testing.assert_close(*grads, atol=0, rtol=0)
    if config.model.n_experts:
        torch.testing.assert_close(dataclasses.asdict(a.stats), dataclasses.asdict(b.stats), atol=0, rtol=0)
        assert b.stats.demand_E.sum(-1).tolist() == [64 * config.router.top_k] * config.model.n_moe_layer


def test_activation_checkpointing_keeps_less():
    """Bytes held for the backward pass: under half of those of a plain pass."""
    held = {}
    for saving in (False, True):
        model, kept = lively(TINY.replace(n_layer=6, vocab_size=8), activation_checkpointing=saving), {}

        def keep(t, kept=kept):
            kept[t.data_ptr()] = t.nbytes
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(*batch(TINY.replace(vocab_size=8)), generator=rng())
        held[saving] = sum(kept.values()) - sum(p.nbytes for p in model.parameters())
    assert held[True] < held[False] / 2
