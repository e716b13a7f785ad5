"""Each rule on a series made to break it, and on one just inside."""

import math

import numpy as np
import pandas as pd
import pytest
from guide_runs import EXPERIMENT_1, LN8, healthy, put

from moe_core.config import RouterConfig
from moe_core.health import RULES, Rule, findings, healthy_band, recent, sustained
from moe_core.knobs import KNOBS
from moe_core.metrics import Reading, router_metrics
from moe_core.rules import down_to, move, scale, up_to, within
from moe_core.store import MAIN, RunStore


def said(frame, E=8, K=1):
    """(level, rule, metric) of what is found worth doing something about."""
    return {(f.level, f.rule, f.metric) for f in findings(frame, EXPERIMENT_1, E, K) if f.level != "ok"}


@pytest.mark.parametrize("E, K", [(8, 1), (8, 2), (4, 1), (4, 2), (2, 1), (16, 1), (64, 1), (64, 6)])
def test_a_healthy_run_of_any_shape_has_no_finding(E, K):
    assert findings(healthy(E=E, K=K), EXPERIMENT_1, E, K) == []


def test_the_guides_own_baseline_is_at_most_watched_except_for_the_clipping():
    """Top-1 0.15, entropy 1.94 to 2.06, shares 0.115 to 0.135, max_frac 0.155 to 0.165, 67 % clipped."""
    rng, n = np.random.default_rng(1), 1400
    frame = healthy(n)
    for name, low, high in [("top1_p_mean", 0.14, 0.16), ("entropy_mean", 1.94, 2.06), ("max_frac_mean", 0.155, 0.165),
                            ("max_frac_max", 0.16, 0.25), *((f"frac_srv_e{e}", 0.115, 0.135) for e in range(8))]:
        frame[f"router/{name}"] = rng.uniform(low, high, n)
    frame["grad/clipped_cum"] = 0.67 * frame.index
    found = findings(frame, EXPERIMENT_1, 8)
    assert [f.rule for f in found if f.level == "alarm"] == ["clipping"]
    assert {lever.text for lever in found[0].levers} == {"lr_scale 1.00 -> 0.75", "grad_clip 1.00 -> 1.50"}


LINES = [  # level, rule, metric, just beyond, just inside
    ("alarm", "max_frac_max", "router/max_frac_max", 0.501, 0.40),
    ("watch", "max_frac_max", "router/max_frac_max", 0.401, 0.399),
    ("alarm", "max_frac_mean", "router/max_frac_mean", 0.501, 0.35),
    ("watch", "max_frac_mean", "router/max_frac_mean", 0.351, 0.349),
    ("alarm", "top1_p", "router/top1_p_mean", 0.801, 0.799),
    ("watch", "top1_p", "router/top1_p_mean", 1.19 / 8, 1.2 / 8),
    ("watch", "entropy", "router/entropy_mean", 0.199 * LN8, 0.201 * LN8),
    ("watch", "starved", "router/frac_srv_e3", 0.049, 0.051),
    ("watch", "drops", "router/drop_frac_mean", 0.0201, 0.0199),
    ("watch", "capacity", "router/frac_srv_max", 1.1 / 8 - 0.033, 1.1 / 8 - 0.029),
]


@pytest.mark.parametrize("level, rule, metric, beyond, inside", LINES)
def test_a_sustained_rule_fires_beyond_its_line_and_not_inside(level, rule, metric, beyond, inside):
    """Fifty steps beyond fire it, the same inside do not; nor do fifty steps before which nothing is known."""
    assert said(put(healthy(), metric, beyond)) == {(level, rule, metric)}
    assert said(put(healthy(), metric, inside)) == set()
    assert said(put(healthy(), metric, beyond).iloc[-49:]) == set()
    found = findings(put(healthy(), metric, beyond, last=80), EXPERIMENT_1, 8)[0]
    assert (found.kind, found.last) == ("sustained", 600)
    assert 510 <= found.first <= 521  # the first fifty whose mean was beyond may hold a few that were not
    assert found.levers
    assert all(lever.undo and KNOBS[lever.knob].low <= lever.value_to <= KNOBS[lever.knob].high
               and lever.value_to != lever.value_from for lever in found.levers)


def test_a_spike_passes_where_the_mean_is_inside():
    """One step at 0.6 is said to be a spike, at level ok; it is not sustained."""
    frame = put(put(healthy(), "router/max_frac_max", 0.6, last=10), "router/max_frac_max", 0.2, last=9)
    found, = findings(frame, EXPERIMENT_1, 8)
    assert (found.level, found.kind, found.first, found.last, found.value) == ("ok", "spike", 591, 591, 0.6)


@pytest.mark.parametrize("E, K, few", [(8, 1, 2), (4, 1, 2), (64, 1, 16), (8, 2, 3)])
def test_dips_of_the_active_experts_are_watched_and_repeated_deep_ones_alarm(E, K, few):
    """E - 1 of 8 is healthy, one fewer a dip; three dips to a quarter are where a collapse begins."""
    dip = E - max(1, E // 8) - 1
    alarm, watch = ({(level, "active", "router/active_min")} for level in ("alarm", "watch"))
    assert said(put(healthy(E=E), "router/active_min", few, last=3), E, K) == alarm
    assert said(put(healthy(E=E), "router/active_min", few, last=2), E, K) == watch
    assert said(put(healthy(E=E), "router/active_min", dip, last=1), E, K) == watch
    assert said(put(healthy(E=E), "router/active_min", dip + 1), E, K) == set()


def test_one_collapsed_step_alarms_from_the_first_row_on_and_the_levers_lead_out():
    frame = put(healthy(n=5), "router/collapsed", 1.0, last=1)
    found, = findings(frame, EXPERIMENT_1, 8)
    assert (found.level, found.rule, found.first, found.last) == ("alarm", "collapsed", 5, 5)
    assert [lever.text for lever in found.levers] == [
        "router_temp 1.30 -> 2.50", "router_noise_std 0.30 -> 1.00", "load_balance_alpha 0.12 -> 0.15"]
    assert said(healthy(n=5)) == set()
    assert said(put(healthy(), "router/collapsed", 1.0, last=60).iloc[:-50]) != set()


def test_a_line_is_scaled_to_the_picks():
    """With two picks of eight an expert that every token asks for has half of the assignments: collapsed."""
    frame = put(healthy(K=2), "router/max_frac_max", 0.46)
    assert {("alarm", "collapsed", "router/collapsed"), ("alarm", "max_frac_max", "router/max_frac_max")} == said(
        frame, K=2)
    assert said(put(healthy(K=2), "router/max_frac_max", 0.44), K=2) == {
        ("alarm", "max_frac_max", "router/max_frac_max")}


@pytest.mark.parametrize("K, demand, is_so", [
    (1, [0.9, 0.1, 0, 0], 1), (1, [0.89, 0.11, 0, 0], 0), (1, [1, 0, 0, 0], 1), (2, [0.5, 0.5, 0, 0], 1),
    (2, [0.46, 0.2, 0.2, 0.14], 1), (2, [0.44, 0.3, 0.26, 0], 0), (4, [0.25] * 4, 0), (1, [1], 0)])
def test_collapsed_means_the_same_to_the_metric_and_to_the_rule(K, demand, is_so):
    """An expert in nine of ten tokens' picks, or K experts that have all; not where K = E leaves no choice."""
    shares = np.tile(np.array(demand, np.float32), (2, 1, 1))
    told = router_metrics(Reading(0.0, *np.zeros((6, 1)), shares, None, np.zeros(0)), 0.0, RouterConfig(top_k=K))
    assert told["router/collapsed"] == is_so
    frame = pd.DataFrame({name: told[name] for name in ("router/max_frac_max", "router/active_min")}, index=[1])
    assert ("collapsed" in {found.rule for found in findings(frame, {}, len(demand), K)}) == is_so


def test_an_extreme_over_the_layers_is_of_one_layer():
    """One that is collapsed among three is told, as are the fewest experts and the largest bias on either side of 0."""
    demand, bias_LE = [[0.95, 0.05, 0, 0], [0.25] * 4, [0.4, 0.3, 0.3, 0]], np.tile([0.1, -0.5, 0.2, 0.2], (3, 1))
    shares = np.tile(np.array(demand, np.float32), (2, 1, 1))
    told = router_metrics(Reading(0.0, *np.zeros((6, 3)), shares, bias_LE, np.zeros(0)), 0.0, RouterConfig(top_k=1))
    assert (told["router/collapsed"], told["router/active_min"], told["router/bias_max"]) == (1, 2, 0.5)
    assert told["router/max_frac_max"] == np.float32(0.95)


def test_entropy_far_below_early_is_an_alarm_only_while_it_falls():
    falling = put(healthy(), "router/entropy_mean", np.linspace(0.4, 0.05, 100) * LN8, last=100)
    falling = put(falling, "router/entropy_mean", np.linspace(0.11, 0.05, 50) * LN8)
    found = findings(falling, EXPERIMENT_1, 8)
    assert [(f.level, f.rule) for f in found] == [("alarm", "entropy")]
    assert "under 0.1 ln E = 0.21" in found[0].text and "0.2 ln E = 0.42" in found[0].text
    steady = put(healthy(), "router/entropy_mean", 0.09 * LN8, last=200)
    little = put(steady, "router/entropy_mean", np.linspace(0.09, 0.08, 100) * LN8, last=100)
    for calm in (steady, little, falling.set_index(falling.index + 400)):  # as it is, by a trifle, late
        assert {f.level for f in findings(calm, EXPERIMENT_1, 8)} == {"watch"}


def test_entropy_near_uniform_is_watched_late_and_not_before():
    """0.97 ln E at step 1100 is under-specialised; at step 900 it is early."""
    late = put(healthy(1100), "router/entropy_mean", 0.97 * LN8)
    assert said(late) == {("watch", "entropy", "router/entropy_mean")}
    assert said(late.set_index(late.index - 200)) == set()
    assert said(put(healthy(1100), "router/entropy_mean", 0.955 * LN8)) == set()
    assert "router_temp 1.30 -> 1.25" in [lever.text for lever in findings(late, EXPERIMENT_1, 8)[0].levers]


def test_the_balance_loss_is_watched_where_it_grows_with_the_largest_share_and_alpha_did_not():
    def frame(aux, top, alpha=0.12):
        scatter = 1 + np.random.default_rng(2).normal(0, 0.02, 100)
        made = put(healthy(), "router/aux_mean", np.linspace(0.12, aux, 100) * scatter, last=100)
        made = put(made, "router/load_balance_alpha", np.linspace(0.12, alpha, 100), last=100)
        return put(made, "router/max_frac_mean", np.linspace(0.16, top, 100) * scatter, last=100)
    assert said(frame(0.2, 0.3)) == {("watch", "aux", "router/aux_mean")}
    assert said(frame(0.2, 0.16)) == said(frame(0.12, 0.3)) == said(frame(0.125, 0.165)) == set()
    assert said(frame(0.2, 0.3, alpha=0.2)) == set()  # the coefficient was raised


def test_clipping_counts_over_the_run_and_a_flat_count_is_fine():
    frame = healthy(500)
    frame["grad/clipped_cum"] = np.ceil(0.2 * frame.index)
    assert said(frame) == {("watch", "clipping", "grad/clipped_cum")}
    assert findings(frame.iloc[:99], EXPERIMENT_1, 8) == []
    frame["grad/clipped_cum"] = np.ceil(0.09 * frame.index)
    assert findings(frame, EXPERIMENT_1, 8) == []
    frame["grad/clipped_cum"] = np.minimum(frame.index, 300)
    found, = findings(frame.iloc[-200:], EXPERIMENT_1, 8)
    assert (found.level, found.value) == ("ok", 0.6)


def test_one_collapsed_layer_out_of_four_is_named_and_most_layers_are_said_once():
    """Layer 2 puts every token on one expert; then all four do."""
    def frame(layers):
        made = healthy()
        for name, value in (("max_frac_mean", 1.0), ("active_mean", 1.0), ("entropy_mean", 0.01),
                            ("top1_p_mean", 0.99)):
            for layer in layers:
                made = put(made, f"router/{name}/layer_{layer}", value)
            made[f"router/{name}"] = made[[f"router/{name}/layer_{i}" for i in range(4)]].mean(axis=1)
        made["router/max_frac_max"] = made[[f"router/max_frac_mean/layer_{i}" for i in range(4)]].max(axis=1)
        made["router/active_min"] = made[[f"router/active_mean/layer_{i}" for i in range(4)]].min(axis=1)
        made["router/collapsed"] = (made["router/max_frac_max"] >= 0.9).astype(float)
        return made

    found = findings(frame([2]), EXPERIMENT_1, 8)
    assert (found[0].level, found[0].rule, found[0].layer, found[0].metric) == (
        "alarm", "collapsed", 2, "router/max_frac_mean/layer_2")
    assert found[0].text.startswith("layer 2: collapsed in 50 of the last 50 logged steps")
    assert {f.layer for f in found if f.level == "alarm"} == {2} and "worst layer" not in str(found)
    assert said(put(healthy(), "router/max_frac_mean/layer_2", 0.38)) == set()  # its line is the worst's
    everywhere = findings(frame(range(4)), EXPERIMENT_1, 8)
    assert {f.layer for f in everywhere} == {None}


@pytest.mark.parametrize("whole, layers, heard", [
    (1.5, (1.5, 1.5, 0, 0), [("watch", 0, "layer 0: high"), ("watch", 1, "layer 1: high")]),  # no more than half
    (1.5, (1.5, 1.5, 1.5, 0), [("watch", None, "high (layers 0, 1, 2)")]),
    (1.5, (1.5, 1.5, 1.5, 3), [("alarm", 3, "layer 3: high"), ("watch", None, "high (layers 0, 1, 2)")]),
    (1.5, (1.5, 1.5, 3, 0), [("alarm", 2, "layer 2: high"), ("watch", None, "high (layers 0, 1)")]),
    (1.5, (1.5,) * 4, [("watch", None, "high")]),
    (0.7, (0.7,) * 4, [("ok", None, "fair")]),
    (0.7, (1.5, 0, 0, 0), [("watch", 0, "layer 0: high")]),
])
def test_layers_are_named_where_they_are_few_or_worse_than_all_together(whole, layers, heard):
    rules = [Rule("r", "m", level, sustained(above=line), says)
             for level, line, says in (("ok", 0.5, "fair"), ("alarm", 2.0, "high"), ("watch", 1.0, "high"))]
    frame = pd.DataFrame({"m": whole, **{f"m/layer_{i}": value for i, value in enumerate(layers)}},
                         index=pd.Index(range(1, 51), name="step"), dtype=float)
    assert [(f.level, f.layer, f.text) for f in findings(frame, {}, 8, rules=rules)] == heard


def test_levers_are_of_the_knobs_that_there_are_and_stop_where_the_guide_stops():
    frame = put(healthy(), "router/max_frac_max", 0.45)
    found, = findings(frame, {"load_balance_alpha": 0.2, "router_temp": 1.3379}, 8)
    assert [lever.text for lever in found.levers] == ["router_temp 1.34 -> 1.64"]
    assert (found.low, found.high) == healthy_band("router/max_frac_max", 8) == (None, 0.4)
    assert "router/max_frac_max is under 0.40 for 100 steps" in found.levers[0].undo


def test_what_is_read_of_a_run_is_its_newest_rows_with_the_share_of_each_expert_in_each_layer(tmp_path):
    """The last 200 logged, though not every step was."""
    rng, steps = np.random.default_rng(), np.arange(3, 700, 3)
    shares = rng.random((len(steps), 2, 3, 4)).astype(np.float32)
    with RunStore.create(tmp_path / "run", {}) as store:
        for step, one in zip(steps, shares, strict=True):
            store.log_step(MAIN, int(step), 0.0, {"train/ce": float(step)}, one)
        rows = recent(store, MAIN, int(steps[-1]))
    assert rows.index.tolist() == rows["train/ce"].tolist() == steps[-200:].tolist()
    for layer, expert in np.ndindex(3, 4):
        np.testing.assert_array_equal(rows[f"router/frac_srv_e{expert}/layer_{layer}"], shares[-200:, 1, layer, expert])


TEMP, ALPHA = "router_temp", "load_balance_alpha"


@pytest.mark.parametrize("make, now, then", [
    (move(TEMP, 0.3), 1.3379, 1.64), (move(TEMP, 0.3), 99.8, 100.0), (move(TEMP, 0.3), 100.0, None),
    (move(TEMP, -0.2), 0.25, 0.1), (move(TEMP, -0.2), 0.1, None), (move(TEMP, -0.2), 0.05, None),  # the slider's end
    (up_to(ALPHA, 0.1, 0.2), 0.1, 0.2), (up_to(ALPHA, 0.1, 0.2), 0.09999, 0.2), (up_to(ALPHA, 0.1, 0.2), 0.3, None),
    (down_to(TEMP, 1.2, 0.9), 1.2, 0.9), (down_to(TEMP, 1.2, 0.9), 1.2001, 0.9), (down_to(TEMP, 1.2, 0.9), 0.8, None),
    (within(ALPHA, 0.1, 0.2), 0.15, None), (within(ALPHA, 0.1, 0.2), 0.02, 0.1), (within(ALPHA, 0.1, 0.2), 0.5, 0.2),
    (scale(ALPHA, 0.75), 0.123, 0.0922), (scale(ALPHA, 0.75), 0.0, None), (move("capacity_factor", 1.0), 2.0, None)])
def test_a_lever_turns_its_own_way_to_the_next_stop_and_is_none_where_there_is_none(make, now, then):
    """A stop that is all but reached is not the next one; nor is a knob that the run does not have turned."""
    lever = make({TEMP: now, ALPHA: now}, "when")
    assert (None if lever is None else (lever.value_from, lever.value_to)) == (None if then is None else (now, then))


def test_a_user_adds_a_rule_in_three_lines_and_a_broken_one_is_named():
    """It reads any metric, of a dense run too; what a test raises says which rule it was."""
    mine = Rule("high loss", "train/ce", "watch", sustained(above=6.0), "{metric_value}")
    dense = pd.DataFrame({"train/ce": np.full(60, 7.0)}, index=pd.RangeIndex(1, 61, name="step"))
    with pytest.raises(ValueError, match=r"rule 'high loss'.*metric_value"):
        findings(dense, {}, 0, rules=[mine])
    rules = [*RULES, Rule("high loss", "train/ce", "watch", sustained(above=6.0), "train/ce is {value:.2f}")]
    found, = findings(dense, {}, 0, rules=rules)
    assert (found.text, found.first, found.last, found.high) == ("train/ce is 7.00", 1, 60, 6.0)
    assert findings(dense.iloc[:0], {}, 0) == []


def test_a_collapse_provoked_in_training_is_found_at_once_and_its_levers_bring_the_run_back(tiny_run):
    """A router pushed onto one expert alarms at the first step that shows it; 150 steps later nothing is collapsed."""
    run = tiny_run(n_layer=2, learning_rate=1e-2)
    assert run.health() == []
    run.step(1)
    for block in run._trainer.model.blocks:
        block.mlp.router.bias.data[1] += 6.0
    run.step(2)
    found = run.health()
    assert (found[0].level, found[0].rule, found[0].first) == ("alarm", "collapsed", 2)
    for lever in found[0].levers:
        run.knobs[lever.knob].hold(lever.value_to)
    run.step(150)
    assert not [f for f in run.health() if f.rule == "collapsed"]


def biased(E=8, K=1):
    """A healthy run that a bias balances, with each layer's shares, as they are read from a run's file."""
    frame = healthy(E=E, K=K).drop(columns=["router/load_balance_alpha"]).copy()
    z = math.log(E) ** 2
    per_layer = {f"router/frac_srv_e{e}/layer_{i}": frame[f"router/frac_srv_e{e}"] for e in range(E) for i in range(4)}
    for where in ("", *(f"/layer_{i}" for i in range(4))):
        per_layer[f"router/z_mean{where}"] = np.full(len(frame), z)
    more = pd.DataFrame({"router/bias_update_speed": np.full(len(frame), 1e-3), **per_layer}, index=frame.index)
    return pd.concat([frame, more], axis=1)


BIASED = {"router_temp": 1.0, "router_z_loss_coef": 1e-3, "bias_update_speed": 1e-3}


@pytest.mark.parametrize("E, K", [(8, 1), (8, 2), (4, 1), (16, 1), (64, 6)])
def test_a_healthy_run_that_a_bias_balances_has_no_finding(E, K):
    assert findings(biased(E, K), BIASED, E, K) == []


def test_where_a_bias_balances_an_expert_under_5_percent_alarms_and_the_bias_is_the_lever():
    """At 4.9 %; at 5.1 % not; without a bias it is watched. The speed is raised first."""
    frame = put(biased(), "router/frac_srv_e3", 0.049)
    found, = [f for f in findings(frame, BIASED, 8) if f.rule == "starved"]
    assert (found.level, found.metric, found.levers[0].text) == (
        "alarm", "router/frac_srv_e3", "bias_update_speed 0.001 -> 0.002")
    assert not [f for f in findings(put(biased(), "router/frac_srv_e3", 0.051), BIASED, 8) if f.rule == "starved"]
    watched, = findings(put(healthy(), "router/frac_srv_e3", 0.049), EXPERIMENT_1, 8)
    assert watched.level == "watch"


def test_shares_that_stay_apart_say_that_the_bias_is_too_slow_and_shares_that_swing_do_not():
    """One layer in which half of the experts have 1.31 fair shares and half 0.69; not at 1.29, nor in swings."""
    def frame(by, swings=False):
        made = biased()
        for e in range(8):
            sign = (-1.0) ** (e + (np.arange(50) if swings else np.zeros(50)))
            made = put(made, f"router/frac_srv_e{e}/layer_2", (1 + by * sign) / 8)
        return made
    found, = findings(frame(0.31), BIASED, 8)
    assert (found.level, found.rule, found.layer) == ("watch", "uneven", 2)
    assert "8.6% to 16.4%), sustained above 3.8%" in found.text and found.high == pytest.approx(0.3 / 8)
    assert [lever.text for lever in found.levers] == ["bias_update_speed 0.001 -> 0.002"]
    assert findings(frame(0.29), BIASED, 8) == findings(frame(0.5, swings=True), BIASED, 8) == []
    assert "uneven" not in {rule for _, rule, _ in said(frame(0.31).drop(columns="router/bias_update_speed"))}


def test_growing_logits_are_watched_where_a_bias_balances():
    """A z-loss of 0.01 at the guide's coefficient and E = 8 is a mean square of 10, whatever the coefficient is now."""
    found, = findings(put(biased(), "router/z_mean", 10.1), BIASED, 8)
    assert (found.level, found.rule) == ("watch", "z_loss")
    assert [lever.text for lever in found.levers] == ["router_z_loss_coef 0.001 -> 0.005"]
    assert findings(put(biased(), "router/z_mean", 9.9), BIASED, 8) == []
    assert findings(put(biased(64, 6), "router/z_mean", 39.0), BIASED, 64, 6) == []
    assert "router/bias_update_speed" not in healthy() and said(healthy().assign(**{"router/z_mean": 50.0})) == set()
