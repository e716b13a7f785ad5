"""The optimizers in a trainer: the Hessian pass, the groups' metrics, starved experts, resuming."""

import copy
import io

import pytest
import torch

from moe_core.data import Batches, load_tokens
from moe_core.knobs import Knobs
from moe_core.model import RouterControls
from moe_core.optim import lr_shape, sampled_gradients
from moe_core.trainer import NonFiniteError, Trainer


@pytest.fixture
def make(tiny):
    def trainer(**changes):
        config = tiny(**{"eval_interval": 0, **changes})
        tokens = load_tokens(config.data, config.model.vocab_size, say=lambda line: None)
        block, batch = config.model.block_size, config.optim.batch_size
        return Trainer(config, Knobs(config), Batches(tokens.train, block, batch, config.seed), [])
    return trainer


def row(trainer):
    return {name: value for name, value in trainer.step().metrics.items() if not name.startswith("perf/")}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon_adamw", "muon_sophia", "sophia"])
def test_every_optimizer_learns_at_its_own_default_rate(make, optimizer):
    """Sixty steps of the small model: the cross-entropy falls by 0.7 nats."""
    trainer = make(optimizer=optimizer)
    rows = [row(trainer) for _ in range(60)]
    assert rows[0]["train/ce"] - sum(r["train/ce"] for r in rows[-5:]) / 5 > 0.7


def test_a_hessian_pass_leaves_a_twin_runs_numbers_unchanged_to_the_bit(make):
    """AdamW with a pass before each update, and without: every metric and every weight of six steps."""
    plain, passing = make(dropless=False), make(dropless=False)
    backward = passing._backward

    def with_pass(number):
        seen = backward(number)
        window = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0))
        sampled_gradients(passing.model, window, passing._controls(), passing.labels,
                          list(passing.model.parameters()))
        return seen
    passing._backward = with_pass
    torch.manual_seed(1)
    stream = torch.get_rng_state()
    for _ in range(6):
        assert row(plain) == row(passing)
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), passing.model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_step_by_hand_is_the_trainers(make):
    """Micro-batches, clipping by the norm of every gradient, the estimate at these weights, this step's rate, then the
    update: on a copy, to the bit.
    """
    trainer = make(optimizer="muon_sophia", sophia_k=1, grad_clip=0.1, gradient_accumulation_steps=2)
    trainer.step()
    model, optimizer = copy.deepcopy((trainer.model, trainer.optimizer))
    noise, labels = trainer.noise.clone_state(), trainer.labels.clone_state()
    place, t = trainer.train.state_dict(), {name: torch.tensor(knob.at(2)) for name, knob in trainer.knobs.items()}
    controls = RouterControls(t["router_temp"], t["router_noise_std"], None)
    optimizer.zero_grad()
    for _ in range(2):
        window = trainer.train.next()
        losses = model(window[:, :-1], window[:, 1:], controls=controls, generator=noise).losses
        loss = losses["ce"] + t["load_balance_alpha"] * losses["balance"] + t["router_z_loss_coef"] * losses["z"]
        (loss / 2).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.update_hessian(
        sampled_gradients(model, window[:, :-1], controls, labels, optimizer.hessian_params()))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_shape(trainer.config.optim, 2)
    optimizer.step()

    trainer.train.load_state_dict(place)
    assert norm > 0.1 and row(trainer)["grad/norm"] == norm
    for name, p in model.named_parameters():
        assert torch.equal(p, trainer.model.get_parameter(name)), name


def test_the_pass_runs_when_it_is_due_on_what_needs_it(make):
    """With k = 3 the curvature of the aux parameters changes in steps 4 and 7 alone, and reaches each of them, those
    of a head for tokens further on too; Muon's have none.
    """
    trainer = make(optimizer="muon_sophia", sophia_k=3, n_mtp=1)
    embed, changed, before = trainer.model.embed.weight, [], None
    for number in range(1, 9):
        trainer.step()
        now = trainer.optimizer.state[embed]["hessian"].clone()
        if before is not None and not torch.equal(now, before):
            changed.append(number)
        before = now
    assert changed == [4, 7]
    assert all(trainer.optimizer.state[p]["hessian"].any() for p in trainer.optimizer.hessian_params())
    assert all("hessian" not in trainer.optimizer.state[p]
               for group in trainer.optimizer.param_groups if group["rule"] == "muon" for p in group["params"])


@pytest.mark.parametrize("optimizer", ["muon_adamw", "muon_sophia", "sophia"])
def test_a_trainer_resumed_between_two_passes_goes_on_to_the_bit(make, optimizer):
    """Saved after step 4 of k = 3, through weights_only: every metric and weight of the next five steps."""
    changes = dict(optimizer=optimizer, sophia_k=3, starved_experts="skip", dropless=False)
    trainer, resumed = make(**changes), make(**changes)
    resumed.step()
    for _ in range(4):
        trainer.step()
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        assert row(trainer) == row(resumed)
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_row_has_the_rate_and_the_last_update_of_each_group(make):
    """lr/... is peak times shape times lr_scale; update/... is the change that the step before made, exactly."""
    trainer = make(optimizer="muon_adamw", embed_lr=1e-2)
    trainer.knobs["lr_scale"].turn("hold", 0.5, None, 1)
    first, share = row(trainer), 0.5 * lr_shape(trainer.config.optim, 1)
    rates = {"embed": 1e-2, "attention": 3e-2, "experts": 3e-2, "router": 3e-3, "vectors": 3e-3}
    assert {k: v for k, v in first.items() if k.startswith("lr/")} == pytest.approx(
        {f"lr/{name}": peak * share for name, peak in rates.items()})
    assert first["lr"] == first["lr/vectors"]
    before = weights(trainer)
    trainer.step()
    after, third = weights(trainer), row(trainer)
    names = {p: name for name, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        old, new = (torch.cat([w[names[p]].flatten() for p in group["params"]]) for w in (before, after))
        # Sampled in the larger groups.
        assert third[f"update/{group['name']}"] == pytest.approx(float((new - old).norm() / old.norm()), rel=0.05)
    assert {k for k in first if k.startswith("update/")} == {f"update/{name}" for name in rates}


@pytest.mark.parametrize("starved", ["skip", "reference"])
def test_experts_without_tokens_are_skipped_and_counted(make, starved):
    """Two experts that the router cannot choose: skipped, they stay to the bit and are the metric's count."""
    trainer = make(optimizer="muon_adamw", starved_experts=starved)
    trainer.step()
    for layer, expert in ((0, 3), (1, 1)):
        with torch.no_grad():
            trainer.model.blocks[layer].mlp.router.bias[expert] = -1e4
    before = weights(trainer)
    for _ in range(2):
        metrics = row(trainer)
    after = weights(trainer)
    still = sum(torch.equal(before[f"blocks.{layer}.mlp.experts.{w}"][e], after[f"blocks.{layer}.mlp.experts.{w}"][e])
                for layer in range(2) for e in range(4) for w in ("w_gate", "w_up", "w_down"))
    if starved == "skip":
        assert metrics["optim/starved_skipped"] == 2
        assert still == 3 * 2
    else:
        assert "optim/starved_skipped" not in metrics and still == 0


def test_an_estimate_that_is_not_finite_is_refused_with_its_step(make, monkeypatch):
    """Nothing is applied: curvature, weights, labels and data go on from where they were."""
    trainer, twin = make(optimizer="sophia", sophia_k=1), make(optimizer="sophia", sophia_k=1)
    trainer.step(), twin.step()
    before = weights(trainer)
    with monkeypatch.context() as patch:
        patch.setattr("moe_core.trainer.sampled_gradients",
                      lambda *args: [torch.full_like(g, torch.inf) for g in sampled_gradients(*args)])
        with pytest.raises(NonFiniteError, match="step 2: the Hessian estimate is inf; the step was not applied"):
            trainer.step()
    assert all(torch.equal(w, before[name]) for name, w in weights(trainer).items())
    for again in (row(trainer), row(trainer)):
        assert again.pop("grad/skipped_cum") == 1
        assert again.items() <= row(twin).items()
