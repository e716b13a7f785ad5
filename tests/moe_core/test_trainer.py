import math

import pytest
import torch
from small_models import measured, weights

PUBLISHED = [
    "train/loss", "train/ce", "lr", "train/tokens_b", "perf/tok_s", "perf/data_wait", "grad/norm", "grad/clipped_cum",
    "grad/skipped_cum", "router/balance_mean",
    "router/temp", "router/noise_std", "router/load_balance_alpha", "router/z_loss_coef", "router/aux_mean",
    "router/z_mean", "router/max_frac_mean", "router/max_frac_max", "router/active_min", "router/active_mean",
    "router/drop_frac_mean", "router/top1_p_mean", "router/entropy_mean", "router/collapsed",
    "router/frac_dem_max", "router/frac_srv_max", "router/active_dem", "router/active_srv",
]


@pytest.mark.parametrize("changes", [{}, dict(top_k=2, norm_topk_prob=True, dropless=False, capacity_factor=0.6)])
def test_a_step_reports_every_published_metric_and_they_agree_with_its_shares(make, changes):
    """All names are there and finite, and what can be computed from the shares equals it."""
    trainer = make(eval_interval=1, gradient_accumulation_steps=2, **changes)
    record = trainer.step()
    m, (demand, served) = record.metrics, record.shares
    experts = [f"router/frac_{kind}_e{i}" for kind in ("dem", "srv") for i in range(4)]
    assert set(PUBLISHED) | set(experts) | {"val/loss", "val/ppl"} <= set(m)
    assert all(math.isfinite(value) for value in m.values())
    assert demand.sum(-1) == pytest.approx([1, 1])
    assert m["router/max_frac_mean"] == pytest.approx(demand.max(-1).mean())
    assert m["router/max_frac_mean/layer_1"] == pytest.approx(demand[1].max())
    assert m["router/drop_frac_mean"] == pytest.approx(1 - served.sum(-1).mean(), abs=1e-6)
    assert (m["router/drop_frac_mean"] > 0.1) == bool(changes)
    assert m["router/frac_srv_e3"] == pytest.approx(served[:, 3].mean())
    assert m["train/tokens_b"] == 2 * 4 * 32 / 1e9
    assert m["train/loss"] == pytest.approx(
        m["train/ce"] + m["router/aux_mean"] + m["router/z_loss_coef"] * m["router/z_mean"])
    assert m["val/ppl"] == pytest.approx(math.exp(m["val/loss"]))


def test_accumulated_micro_batches_give_the_gradient_of_one_batch(make):
    """For the language-model part: 1 x 8 sequences and 4 x 2 of the same sequences, every gradient."""
    plain = dict(load_balance_alpha=0.0, router_z_loss_coef=0.0, router_noise_std_init=0.0)
    whole = make(batch_size=8, **plain)
    parts = make(batch_size=2, gradient_accumulation_steps=4, **plain)
    window = whole.train.next()
    whole.train.next, parts.train.next = lambda: window, iter(window.split(2)).__next__
    for trainer in (whole, parts):
        trainer.knobs.read(1)
        trainer.told = trainer._backward(1).told
    assert parts.told.norm == pytest.approx(whole.told.norm, rel=1e-5)
    assert parts.told.reading.ce == pytest.approx(whole.told.reading.ce, rel=1e-6)
    assert parts.told.reading.shares == pytest.approx(whole.told.reading.shares, abs=1e-7)
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_aux_losses_are_divided_by_the_accumulation_steps(make):
    """The same micro-batch twice in one step is that micro-batch once: gradients of all loss terms."""
    once, twice = make(load_balance_alpha=5.0), make(load_balance_alpha=5.0, gradient_accumulation_steps=2)
    window = once.train.next()
    for trainer in (once, twice):
        trainer.train.next = lambda: window
        trainer.knobs["router_noise_std"].turn("hold", 0.0, None, 1)
        trainer.knobs.read(1)
        trainer._backward(1)
    for one, other in zip(once.model.parameters(), twice.model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-8)


def test_a_knob_turned_between_two_steps_holds_for_the_whole_of_the_next(make):
    """The row says the value, and the update is that of the value: rate 0 moves nothing. The others follow on."""
    trainer = make(weight_decay=0.0)
    trainer.step()
    before = weights(trainer)
    trainer.knobs["lr_scale"].turn("hold", 0.0, None, 2)
    trainer.knobs["router_temp"].turn("hold", 3.0, None, 2)
    row = trainer.step().metrics
    assert (row["lr"], row["router/temp"]) == (0.0, 3.0)
    assert row["router/noise_std"] == trainer.knobs["router_noise_std"].at(2) != trainer.knobs["router_noise_std"].at(1)
    assert torch.equal(weights(trainer), before)
    trainer.knobs["lr_scale"].turn("follow", None, None, 3)
    assert trainer.step().metrics["lr"] > 0
    assert not torch.equal(weights(trainer), before)


def test_clipping_bounds_the_gradient_and_is_counted(make):
    trainer = make(grad_clip=1e-3)
    rows = [trainer.step().metrics for _ in range(3)]
    assert [row["grad/clipped_cum"] for row in rows] == [1, 2, 3]
    clipped = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
    assert float(clipped) == pytest.approx(1e-3, rel=1e-3)
    assert rows[0]["grad/norm"] > 1e-2  # the metric is the norm before clipping
    trainer.knobs["grad_clip"].turn("hold", 1e6, None, 4)
    assert trainer.step().metrics["grad/clipped_cum"] == 3


def test_validation_leaves_training_alone_and_is_of_the_knobs_present_values(make):
    """Steps beside it are to the bit those of a trainer that never validates; without noise it is a mean."""
    one, other = make(eval_interval=1, dropout=0.1), make(eval_interval=0, dropout=0.1)
    for _ in range(3):
        row = one.step()
        assert measured(row, "val/loss", "val/ppl") == measured(other.step())
    assert torch.equal(weights(one), weights(other))
    each = [one.model(window[:, :-1], window[:, 1:], controls=one._controls()).losses["ce"].item()
            for window in one.validation]
    assert row.metrics["val/loss"] == pytest.approx(sum(each) / 2) and one.evaluate() == row.metrics["val/loss"]
    one.knobs["router_temp"].turn("hold", 3.0, None, 4)
    one.knobs.read(4)
    assert one.evaluate() != row.metrics["val/loss"]


def test_data_wait_is_the_part_of_a_step_that_waited_for_batches(make, monkeypatch):
    """By a clock that moves 3 s for each of two batches and 2 s for the update: six seconds of eight."""
    trainer, now = make(gradient_accumulation_steps=2, eval_interval=0), [0.0]

    def taking(seconds, call):
        def timed(*args, **how):
            now[0] += seconds
            return call(*args, **how)
        return timed
    monkeypatch.setattr("moe_core.trainer.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(trainer.train, "next", taking(3.0, trainer.train.next))
    monkeypatch.setattr(trainer.optimizer, "step", taking(2.0, trainer.optimizer.step))
    row = trainer.step().metrics
    assert (row["perf/data_wait"], row["perf/tok_s"]) == (6 / 8, 2 * 4 * 32 / 8)


def test_the_same_run_twice_is_the_same_run(make):
    """Six steps of two trainers: every metric but the speed, every share and every weight, to the bit.

    Another seed is another of everything that is drawn.
    """
    drawn = [(weights(t), t.train.next(), t.noise.get_state(), t.labels.get_state()) for t in (make(), make(seed=5))]
    assert not any(map(torch.equal, *drawn))
    one, two = make(dropless=False), make(dropless=False)
    for _ in range(6):
        a, b = one.step(), two.step()
        assert measured(a) == measured(b)
        assert (a.shares == b.shares).all()
    assert torch.equal(weights(one), weights(two))


def test_a_state_of_another_kind_of_device_goes_on_with_random_numbers_that_begin_anew(make):
    """A GPU keeps a generator in 16 bytes, a CPU in thousands: all else is taken over, and the next row says so."""
    first, second = make(), make()
    begins = second.noise.get_state()
    first.step()
    second.step()
    state = first.state_dict()
    second.load_state_dict({**state, **{name: torch.zeros(16, dtype=torch.uint8) for name in ("noise", "labels")}})
    assert torch.equal(second.noise.get_state(), begins)
    assert torch.equal(weights(second), weights(first)) and second.steps_done == 1
    assert [len(second.step().alerts) for _ in range(2)] == [1, 0]


def test_training_leaves_the_users_random_numbers_alone(make):
    """The global generator is shared with the user's cells; a step neither reads nor moves it."""
    trainer = make()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = trainer.step().metrics["train/ce"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert make().step().metrics["train/ce"] == first


def test_tokens_further_on_are_part_of_the_loss_and_reported_by_head(make):
    """train/loss is cross-entropy, the router's terms and mtp_coef times the heads' mean; 0 leaves the trunk alone."""
    trainer = make(n_mtp=2, mtp_coef=0.4, load_balance_alpha=0.0, router_z_loss_coef=0.0,
                   gradient_accumulation_steps=2)
    row = trainer.step().metrics
    assert row["train/mtp"] == pytest.approx((row["train/mtp_1"] + row["train/mtp_2"]) / 2)
    assert row["train/loss"] == pytest.approx(row["train/ce"] + 0.4 * row["train/mtp"], rel=1e-5)
    alone, without = make(n_mtp=2, mtp_coef=0.0, grad_clip=1e6), make(grad_clip=1e6)
    for _ in range(3):
        rows = alone.step().metrics["train/ce"], without.step().metrics["train/ce"]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    for _ in range(20):
        last = trainer.step().metrics
    assert last["train/mtp_1"] < row["train/mtp_1"] - 0.3
