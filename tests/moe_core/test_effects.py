import numpy as np
import pytest

from moe_core.effects import LONGEST, design_of_pair, design_of_turn, effects
from moe_core.noise import LEVEL, MANY, Estimate, holm, regress, tail, two_sided, whitened
from moe_core.store import MAIN, RunStore


def noise(rng, n, n_series, phi, fast=0.0):
    """[n, n_series] of unit variance: an AR(1) that forgets itself by phi, and a part that each step brings anew."""
    slow = np.empty((n, n_series))
    slow[0] = rng.normal(size=n_series)
    for k in range(1, n):
        slow[k] = phi * slow[k - 1] + np.sqrt(1 - phi**2) * rng.normal(size=n_series)
    return np.sqrt(1 - fast) * slow + np.sqrt(fast) * rng.normal(size=(n, n_series))


def stored(path, steps, values_nM, turns):
    """A run with these metrics x0, x1, ... and turns of router_temp to 1.0 at these steps, or by step as they are."""
    store = RunStore.create(path, {})
    for step, row in zip(steps, values_nM, strict=True):
        store.log_step(MAIN, int(step), 0.0, {f"x{i}": float(v) for i, v in enumerate(row)})
    hold = {"name": "router_temp", "mode": "hold", "value": 1.0}
    for step, turn in (turns if isinstance(turns, dict) else dict.fromkeys(turns, hold)).items():
        store.log_event(MAIN, step, "knob", turn)
    return store


@pytest.mark.parametrize("before, after", [(50, 50), (50, 20)])
def test_a_null_change_of_one_metric_is_called_significant_at_most_5_times_in_100(before, after):
    """18000 series of noise with phi up to 0.93, with a fast part or none, on a line or a decay as of a loss."""
    rng, steps, found = np.random.default_rng(), np.arange(101, 101 + before + after), []
    shape = (steps > 100 + before) * 1.0
    for phi, fast in ((0.0, 0.0), (0.5, 0.0), (0.8, 0.0), (0.8, 0.6), (0.88, 0.3), (0.93, 0.3)):
        trend = np.stack([rng.normal() * (steps - 100) / 10, 8 * np.exp(-(steps - 100) / 60)], 1)
        values = noise(rng, len(steps), 3000, phi, fast) + np.repeat(trend, 1500, axis=1)
        found.append(regress(steps, values, *design_of_turn(steps, 101 + before, shape)).p_M < LEVEL)
    assert np.mean(found) <= 0.05
    assert np.mean(found, 1).max() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 3000)


def test_a_turn_that_did_nothing_stands_out_in_no_metric_95_times_in_100(tmp_path):
    """60 turns of a run whose 12 metrics have trends and long memory: Holm's method covers all of a turn's tests."""
    rng, steps = np.random.default_rng(), np.arange(1, 3051)
    values = noise(rng, len(steps), 12, 0.9) + np.outer(steps / 300, rng.normal(size=12))
    with stored(tmp_path / "null", steps, values, range(51, 3050, 50)) as store:
        table = effects(store, MAIN)
    turns = table.groupby("step")["stands_out"].any()
    assert len(turns) == 60 and len(table) == 60 * 12 and table["stands_out"].notna().all()
    assert turns.sum() <= 8  # 3 are expected at 5 in 100; 9 or more would come once in 400


def test_a_strong_change_always_stands_out_with_its_size(tmp_path):
    """A shift of 12 standard deviations at a turn, in noise of any memory, is found in each of 40 series; one of noise
    alone beside them, logged more rarely, has a test of its own.
    """
    rng, steps = np.random.default_rng(), np.arange(1, 101)
    values = np.concatenate([noise(rng, 100, 10, phi) for phi in (0.0, 0.5, 0.8, 0.9)], 1)
    values += 5 * np.exp(-steps / 50)[:, None] + 12.0 * (steps >= 51)[:, None]
    rare = np.where(steps % 3 == 0, np.nan, rng.normal(size=100))[:, None]
    with stored(tmp_path / "strong", steps, np.concatenate([values, rare], 1), [51]) as store:
        table = effects(store, MAIN)
    assert (((table["low"] > 0) | (table["high"] < 0)) == table["stands_out"]).all()
    table = table.iloc[:-1]
    assert len(table) == 40 and table["stands_out"].all()
    assert ((table["low"] < 12) & (table["high"] > 12)).mean() > 0.9
    assert table["difference"].mean() == pytest.approx(12, abs=1)


def test_a_ramp_is_told_by_the_part_of_it_that_was_done(tmp_path):
    """Over 100 steps, of which the window holds 50: half of what the whole of it would bring, from its step on."""
    rng, steps = np.random.default_rng(), np.arange(1, 101)
    values = noise(rng, 100, 40, 0.0) / 100 + 12 * np.clip((steps - 50) / 100, 0, 1)[:, None]
    turn = {"name": "router_temp", "mode": "ramp", "value": 1.0, "over": 100}
    with stored(tmp_path / "ramp", steps, values, {51: turn}) as store:
        table = effects(store, MAIN)
    assert table["difference"].mean() == pytest.approx(6, abs=0.1) and table["stands_out"].all()


def test_two_branches_that_differ_by_noise_alone_are_not_told_apart_and_a_strong_difference_is():
    """50 paired differences, 3000 series: at most 5 in 100 are found; 12 standard deviations are, in any noise."""
    rng, steps, found = np.random.default_rng(), np.arange(1, 51), []
    for phi, fast in ((0.0, 0.0), (0.5, 0.0), (0.8, 0.0), (0.9, 0.0), (0.9, 0.3), (0.93, 0.3)):
        values = noise(rng, 50, 500, phi, fast)
        found.append(regress(steps, values, *design_of_pair(steps), LONGEST).p_M < LEVEL)
        strong = regress(steps, values[:, :100] + 12, *design_of_pair(steps), LONGEST)
        assert (strong.p_M < LEVEL / 30).mean() > 0.95, phi
    assert np.mean(found, 1).max() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 500)


def test_an_interval_leaves_out_0_exactly_where_its_test_stands_out():
    """Noises that disagree, by sign too: mixed by random weights, and the case where only an unlikely one says no."""
    rng, one_sided = np.random.default_rng(), np.array([[1.0], [-1.0]])
    errors, weights = rng.uniform(0.1, 1, (5, 400)), rng.dirichlet(np.ones(5), 400).T
    for estimate in (Estimate(np.zeros(400), np.ones(400), rng.normal(0.6, 0.8, (5, 400)), errors, weights, 40),
                     Estimate(np.zeros(1), np.ones(1), one_sided, 0.3 + 0 * one_sided, np.array([[0.9], [0.1]]), 90)):
        stands_out, held_to = holm(estimate.p_M)
        low, high = estimate.interval(held_to)
        assert np.array_equal(stands_out, (low > 0) | (high < 0))
        for beyond in (high - estimate.values_GM, estimate.values_GM - low):  # and has half the level beyond either end
            left = (estimate.weights_GM * tail(beyond / estimate.errors_GM, estimate.df)).sum(0)
            np.testing.assert_allclose(left, held_to / 2, rtol=1e-6)
    assert not stands_out


def test_of_several_tests_the_next_is_held_to_a_wider_level_until_one_fails():
    """Holm's method: the level over 4, 3, 2 and 1; all from the first that fails on are held to that one's."""
    stands_out, held_to = holm(LEVEL * np.array([0.9, 0.1, 0.6, 0.3]))
    assert stands_out.tolist() == [False, True, False, True]
    np.testing.assert_allclose(held_to / LEVEL, [1 / 2, 1 / 4, 1 / 2, 1 / 3])


def test_what_is_less_than_a_stored_number_can_say_is_no_effect():
    """A series that is constant but for the last digit of a float32, which changes where the knob was turned."""
    steps = np.arange(1, 101)
    values = (0.1 + 1e-8 * (steps > 50)).astype(np.float32).astype(float)[:, None]
    assert len(np.unique(values)) == 2
    estimate = regress(steps, values, *design_of_turn(steps, 51, (steps > 50) * 1.0))
    assert estimate.p_M > LEVEL


def test_the_filter_whitens_as_the_root_of_the_covariance_does():
    """Steps with gaps, any memory and fast part: the same rows, the same determinant, the same sum of covariances."""
    rng = np.random.default_rng()
    steps = np.sort(rng.choice(400, 150, replace=False))
    values = rng.normal(size=(150, 3)).cumsum(0) + 50
    apart = np.abs(np.subtract.outer(steps, steps))
    for phi, fast in [(0.0, 0.0), *rng.uniform(0, 0.98, (20, 2)).tolist(), (0.98, 0.0)]:
        cover = (1 - fast) * phi**apart + fast * np.eye(150)
        root = np.linalg.cholesky(cover)
        white, scale, independent = whitened(steps, values, phi, fast)
        np.testing.assert_allclose(white, np.linalg.solve(root, values), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(scale, np.diag(root), rtol=1e-9)
        assert independent == pytest.approx(150**2 / cover.sum())


def test_memory_leaves_fewer_independent_values():
    """100 values of white noise are worth 100, those of an AR(1) with phi 0.9 about 100 * 0.1 / 1.9."""
    rng, steps = np.random.default_rng(), np.arange(1, 101)
    design = design_of_turn(steps, 51, (steps > 50) * 1.0)
    white, slow = (np.median(regress(steps, noise(rng, 100, 1500, phi), *design).n_effective_M) for phi in (0.0, 0.9))
    assert 3 < slow < 12 and white > 80


def test_windows_are_cut_at_the_neighbouring_turns_and_too_little_data_is_said(tmp_path):
    """Turns at 51, 81 and 91: the first has 30 steps behind it, the last 10 before it, which are too few to tell. A
    further one at 145 cuts nothing.
    """
    rng, steps = np.random.default_rng(), np.arange(1, 151)
    values = noise(rng, 150, 2, 0.5)
    values[:, 1] = np.where(steps % 25 == 0, values[:, 1], np.nan)  # as a validation loss
    with stored(tmp_path / "cut", steps, values, [51, 81, 91, 145]) as store:
        table = effects(store, MAIN).set_index(["step", "metric"])
    first, last, sparse = table.loc[(51, "x0")], table.loc[(91, "x0")], table.loc[(51, "x1")]
    assert first["said"] == "after: up to step 80, the next turn"
    assert first["before"] == pytest.approx(values[:50, 0].mean(), rel=1e-5)
    assert first["after"] == pytest.approx(values[50:80, 0].mean(), rel=1e-5)
    assert isinstance(first["stands_out"], bool | np.bool_)
    assert last["stands_out"] is table["stands_out"].dtype.na_value and np.isnan(last["difference"])
    assert last["said"] == ("before: from step 81, the previous turn; "
                            "10 values before and 50 after: too few to tell, each needs 20")
    assert last["after"] == pytest.approx(values[90:140, 0].mean(), rel=1e-5)
    assert table.loc[(145, "x0"), "said"] == "50 values before and 6 after: too few to tell, each needs 20"
    assert sparse["said"].endswith("2 values before and 1 after: too few to tell, each needs 20")


def test_a_run_tells_what_its_turn_brought_and_leaves_out_what_the_turn_set(tiny_run):
    """Alpha 0.02 -> 1.0 multiplies alpha's own loss term at once; the temperature's own metric is no effect."""
    run = tiny_run(max_steps=200)
    run.step(40)
    run.knobs["load_balance_alpha"].hold(1.0)
    run.step(40)
    table = run.effects(window=40).set_index("metric")
    aux = table.loc["router/aux_mean"]
    assert aux["stands_out"] and aux["low"] < aux["after"] - aux["before"] < aux["high"]
    assert (aux["step"], aux["knob"], aux["to"]) == (41, "load_balance_alpha", 1.0)
    assert aux["from"] == pytest.approx(0.02)
    assert "router/load_balance_alpha" not in table.index and "router/temp" not in table.index
    assert table.loc["router/drop_frac_mean", "said"] == "constant"
    clipped, seen = run.metrics()["grad/clipped_cum"].diff(), table.loc["grad/clipped_cum"]
    assert (seen["before"], seen["after"]) == pytest.approx(
        (clipped.loc[:40].mean(), clipped.loc[41:].mean()))  # of a count, its growth a step
    assert not any(name.startswith(("lr", "optim/", "val/ppl")) or "/layer_" in name for name in table.index)
    with pytest.raises(ValueError, match="window = 3: must be an integer, at least 20"):
        run.effects(window=3)


def test_two_branches_are_compared_step_by_step(tiny_run):
    """The same knobs on both branches differ nowhere; another alpha stands out in its loss term."""
    run = tiny_run(max_steps=200)
    run.step(5)
    assert run.ab({}, {}, steps=25).effects().empty
    both = run.ab({"load_balance_alpha": 0.02}, {"load_balance_alpha": 1.0}, steps=25)
    aux = both.effects().set_index("metric").loc["router/aux_mean"]
    means = [run.metrics(name)["router/aux_mean"].loc[31:].mean() for name in (both.branch_a, both.branch_b)]
    assert [aux["a"], aux["b"]] == pytest.approx(means, rel=1e-5)
    assert aux["difference"] == pytest.approx(means[1] - means[0], rel=0.05)
    assert aux["stands_out"] and aux["low"] > 0 and aux["b"] > aux["a"]


def test_many_degrees_of_freedom_are_told_as_by_their_sum(monkeypatch):
    """The normal deviate that stands for the sum from 400 degrees of freedom on is within 2e-7 of it."""
    rng = np.random.default_rng()
    t, df = rng.uniform(-8, 8, 1000), MANY + int(rng.integers(1, 200))
    quick = two_sided(t, df)
    monkeypatch.setattr("moe_core.noise.MANY", df)
    assert 0 < np.abs(quick - two_sided(t, df)).max() < 2e-7


@pytest.mark.parametrize("t, df, p", [(2.228139, 10, 0.05), (12.706205, 1, 0.05), (4.032143, 5, 0.01),
                                      (1.984723, 97, 0.05), (0.0, 7, 1.0)])
def test_the_tail_of_student_t_is_that_of_the_tables(t, df, p):
    assert two_sided(np.array([t, -t]), df) == pytest.approx(p, rel=1e-4)
