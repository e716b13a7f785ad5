"""What if: the last batch routed again is the batch itself at its own values, and another at others."""

import math
import threading

import numpy as np
import pytest
import torch

from moe_core.knobs import KnobError
from moe_core.model.router import route
from moe_core.preview import ROUTES


def router_row(run):
    """The last row's router metrics that a batch decides, as they are stored."""
    row = run.metrics(per_layer=True).iloc[-1]
    knobs = {"router/temp", "router/noise_std", "router/load_balance_alpha", "router/z_loss_coef",
             "router/capacity_factor", "router/bias_update_speed"}
    return {name: value for name, value in row.items() if name.startswith("router/") and name not in knobs}


CASES = {
    "dropless": {},
    "capacity": dict(dropless=False, capacity_factor=0.7),
    "balanced by a bias": dict(balance="bias", bias_update_speed=0.1, skip_first_n_moe=1, dropout=0.2),
    "balanced in each sequence": dict(sequence_balance_alpha=0.1, balance="none", top_k=2),
    "sigmoid": dict(router_scores="sigmoid", top_k=2, norm_topk_prob=True, balance="both"),
    "experts choose": dict(routing="expert", dropless=False, balance="none", sequence_balance_alpha=0.1),
    "two picks": dict(top_k=2, norm_topk_prob=True),
    "two picks, capacity, gaussian": dict(top_k=2, dropless=False, capacity_factor=0.6, router_noise_type="gaussian"),
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_at_the_batchs_own_values_every_number_is_the_batchs_own(tiny_run, changes):
    """Every router metric of the row and every stored share, to the bit, after a held and a scheduled step."""
    run = tiny_run(**changes)
    run.knobs["router_noise_std"].hold(0.8)
    run.step(3)
    used = {name: run.metrics()[run._knobs[name].spec.metric].iloc[-1] for name in ROUTES if name in run.knobs}
    for preview in (run.preview(), run.preview(**used)):
        assert preview.step == 3 and preview.turned() == ""
        row = router_row(run)
        assert set(row) == set(preview.now)
        for got in (preview.now, preview.then):
            assert {name: np.float32(value) for name, value in got.items()} == row
        for got in (preview.shares_now, preview.shares_then):
            assert np.array_equal(got, run.store.read_steps(since=2).shares[0])
    drops = not changes.get("dropless", True) and "routing" not in changes  # an expert that chooses drops nothing
    assert (preview.now["router/drop_frac_mean"] > 0.05) == drops


def test_of_several_micro_batches_it_is_the_last_with_its_own_noise(tiny_run):
    """The demand of its last layer is what that layer saw last."""
    run, seen = tiny_run(gradient_accumulation_steps=2), []
    run.knobs["router_noise_std"].hold(0.8)
    run.step(1)
    run._trainer.model.blocks[-1].mlp.register_forward_hook(lambda *call: seen.append(call[-1][1].stats.demand_E))
    run.step(1)
    assert len(seen) == 2 and not torch.equal(*seen)
    assert run.preview().shares_now[0, -1] == pytest.approx((seen[-1] / seen[-1].sum()).numpy())


def test_it_leaves_the_run_and_the_global_random_numbers_alone(tiny_run):
    """Steps after a preview are those of a run that was never asked; weights, noise and cursor do not move."""
    asked, silent = tiny_run("asked"), tiny_run("silent")
    for run in (asked, silent):
        run.step(2)
    before = torch.get_rng_state()
    asked.preview(router_temp=0.5, router_noise_std=2.0)
    assert torch.equal(torch.get_rng_state(), before)
    for run in (asked, silent):
        run.step(3)
    drop = ["perf/tok_s", "perf/data_wait"]
    assert asked.metrics(per_layer=True).drop(columns=drop).equals(silent.metrics(per_layer=True).drop(columns=drop))


def test_it_foresees_what_a_turn_does_to_the_batch(tiny_run):
    """A higher temperature spreads, room takes drops away, and the next batch at the new value is much the same."""
    run = tiny_run(dropless=False, capacity_factor=0.5)
    run.step(3)
    hot, cold = run.preview(router_temp=50.0), run.preview(router_temp=0.05)
    assert hot.then["router/entropy_mean"] == pytest.approx(math.log(4), abs=1e-3)
    assert hot.then["router/top1_p_mean"] < hot.now["router/top1_p_mean"] < cold.then["router/top1_p_mean"]
    assert hot.now == cold.now
    assert hot.now["router/z_mean"] == hot.then["router/z_mean"]  # of the raw logits: no knob moves it
    assert run.preview(capacity_factor=4.0).then["router/drop_frac_mean"] == 0 < hot.now["router/drop_frac_mean"]
    run.knobs["router_temp"].hold(50.0)
    run.step(1)
    assert run.metrics()["router/entropy_mean"].iloc[-1] == pytest.approx(hot.then["router/entropy_mean"], abs=1e-3)


def test_it_says_what_it_cannot_know(tiny_run):
    """Alpha moves no token; a temperature without noise changes no choice, where tokens choose by it alone; deeper
    layers keep their inputs. Of one layer and one batch all is known.
    """
    run = tiny_run(router_noise_std_init=0.0, gradient_accumulation_steps=2)
    run.step(1)
    alpha = run.preview(load_balance_alpha=0.5, lr_scale=0.5)
    assert np.array_equal(alpha.shares_now, alpha.shares_then)
    assert alpha.then["router/aux_mean"] == pytest.approx(25 * alpha.now["router/aux_mean"])
    assert [s.split(":")[0] for s in alpha.unknown[:2]] == [
        f"{name} acts only through training" for name in ("load_balance_alpha", "lr_scale")]
    temp = run.preview(router_temp=0.7)
    assert np.array_equal(temp.shares_now, temp.shares_then)
    said = " ".join(temp.unknown)
    assert "never the choice of experts" in said and "inputs of the next" in said and "last of 2 micro-batches" in said
    for changes in dict(balance="bias"), dict(routing="expert", dropless=False, balance="none"):
        one = tiny_run("".join(changes), router_noise_std_init=0.0, n_layer=1, **changes)
        one.step(1)
        assert one.preview(router_temp=0.7).unknown == ()


def test_it_shows_now_and_then(tiny_run):
    run = tiny_run()
    run.step(1)
    preview = run.preview(router_temp=3.0)
    table = preview.table()
    assert list(table.columns) == ["now", "then", "change"]
    assert table.loc["router/entropy_mean/layer_1", "then"] == preview.then["router/entropy_mean/layer_1"]
    assert "router_temp 1.5 -> 3" in repr(preview) and "router_temp 1.5 -&gt; 3" in preview._repr_html_()


def test_what_cannot_be_asked_is_refused_with_a_reason(tiny_run):
    run = tiny_run()
    with pytest.raises(RuntimeError, match=r"run\.step"):
        run.preview(router_temp=1.0)
    run.step(1)
    with pytest.raises(KnobError, match="capacity_factor: unknown knob; this run's knobs are router_temp"):
        run.preview(capacity_factor=1.0)
    with pytest.raises(KnobError, match="router_temp = 0: must be a number from"):
        run.preview(router_temp=0)
    dense = tiny_run("dense", n_experts=0)
    dense.step(1)
    with pytest.raises(KnobError, match="dense"):
        dense.preview(lr_scale=1.0)


def test_it_can_be_asked_from_another_thread_while_the_run_trains(tiny_run):
    """Every answer is whole: its now is the stored row of its step."""
    run, seen, failed = tiny_run(), [], []

    def ask():
        try:
            while run.progress().state == "training":
                seen.append(run.preview(router_temp=0.5))
        except Exception as error:
            failed.append(error)
    run.step(1)
    run.session.start(60)
    thread = threading.Thread(target=ask)
    thread.start()
    run.session.wait()
    thread.join(10)
    assert not failed and len({p.step for p in seen}) > 3
    entropy = run.metrics()["router/entropy_mean"]
    assert all(np.float32(p.now["router/entropy_mean"]) == entropy[p.step] for p in seen)


def test_it_is_quick_enough_for_a_slider_for_it_only_routes(tiny_run, monkeypatch):
    """Each layer is routed twice, now and then, and no module of the model runs."""
    run, routed = tiny_run(n_layer=3), []
    run.step(1)
    monkeypatch.setattr("moe_core.preview.route", lambda *args, **how: routed.append(1) or route(*args, **how))
    monkeypatch.setattr("torch.nn.Module.__call__", None)
    run.preview(router_temp=0.9, router_noise_std=0.3)
    assert len(routed) == 2 * 3
