"""Shoot-outs of real, tiny runs: the same start for all, a table that is the runs', and going on where it was."""

import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from moe_core import ConfigError, Run, StoreError, preset, session
from moe_core.checkpoint import load
from moe_core.shootout import Search, Shootout, shootout_from
from moe_core.shootout.peaks import rates, stretched, with_rates
from moe_core.shootout.table import COLUMNS, Line, interval, table
from moe_core.twins import moe_twin

FOUR = ("adamw", "muon_adamw", "muon_sophia", "sophia")


def weights_at(shootout, job, step):
    """The model's weights after ``step`` of a run of the shoot-out, 0 for the initial ones."""
    run = Run.open(shootout.folder / job.name)
    try:
        run.rewind(step)
        run.checkpoint("weights")
        return load(run.path / run.store.checkpoints()[-1].path, torch.device("cpu"))["model"]
    finally:
        run.close()


def numbers(line):
    """What a run left, without what the clock has a say in."""
    return line.rows.drop(columns=[name for name in line.rows if name.startswith("perf/") or name == "seconds"])


@pytest.fixture(scope="module")
def four(tiny, tmp_path_factory):
    """All four optimizers, two seeds, twelve steps each."""
    made = Shootout.create(tmp_path_factory.mktemp("four") / "s", tiny(eval_interval=4), FOUR, seeds=2, steps=12)
    assert made.train()
    return made


def test_every_optimizer_starts_from_the_same_weights_and_the_same_batch(four):
    """Initial weights equal to the bit, first cross-entropy too; another seed has others, and rates part them later."""
    jobs = {(job.label, job.seed): job for job in four.jobs()}
    first = {seed: weights_at(four, jobs["adamw", seed], 0) for seed in four.seeds}
    assert any(not torch.equal(a, b) for a, b in zip(*(w.values() for w in first.values()), strict=True))
    for (label, seed), job in jobs.items():
        own = first[seed] if label == "adamw" else weights_at(four, job, 0)
        assert own.keys() == first[seed].keys() and all(torch.equal(own[name], first[seed][name]) for name in own)
    lines = four.lines()
    for seed in four.seeds:
        assert len({lines[label][seed].rows["train/ce"].iloc[0] for label in FOUR}) == 1
        assert len({lines[label][seed].rows["train/ce"].iloc[-1] for label in FOUR}) == 4


def test_the_table_has_the_numbers_of_the_runs(four):
    """Means and standard deviations over the seeds, of what run.metrics() says; the legacy columns first."""
    frame = four.summary().set_index("optimizer")
    assert tuple(frame.reset_index()) == COLUMNS and list(frame)[:3] == ["ms/it", "tok/s", "loss"]
    for label in FOUR:
        rows = []
        for seed in four.seeds:
            run = Run.open(four.folder / f"{label}-s{seed}")
            rows.append(run.metrics("main"))
            run.close()
        val = [r["val/loss"].loc[12] for r in rows]
        assert frame["val/loss"][label] == pytest.approx(np.mean(val))
        assert frame["val/loss std"][label] == pytest.approx(np.std(val, ddof=1))
        assert frame["loss"][label] == pytest.approx(np.mean([r["train/ce"].loc[12] for r in rows]))
        ms = np.mean([1e3 * 128 / r["perf/tok_s"].iloc[1:] for r in rows])
        assert frame["ms/it"][label] == pytest.approx(ms) and frame["tok/s"][label] == pytest.approx(128e3 / ms)
        assert (frame["steps"][label], frame["seeds"][label], frame["note"][label]) == (12, 2, "")
    assert frame["steps to baseline"]["adamw"] <= 12 and math.isnan(frame["peak MiB"]["adamw"])


def test_the_csv_is_the_table(four, tmp_path):
    """The legacy script's columns first, one row an entry, nothing else left in the folder."""
    four.to_csv(tmp_path / "deep" / "table.csv")
    read = pd.read_csv(tmp_path / "deep" / "table.csv")
    assert list(read)[:4] == ["optimizer", "ms/it", "tok/s", "loss"] and tuple(read["optimizer"]) == FOUR
    np.testing.assert_allclose(read["val/loss"], four.summary()["val/loss"], rtol=1e-5)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["table.csv"]


def test_interrupted_it_goes_on_and_equals_one_that_was_not(four, tiny, tmp_path):
    """Stopped in the middle of a run, and of the next one; opened anew it leaves finished runs alone."""
    at = iter([("adamw", 5), ("muon_sophia", 3)])
    due = next(at)

    def stop(standing):
        nonlocal due
        if due and standing.name.startswith(due[0]) and standing.step >= due[1]:
            due = next(at, None)
            raise KeyboardInterrupt
    made = Shootout.create(tmp_path / "s", tiny(eval_interval=4), FOUR, seeds=2, steps=12)
    seen = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made.train(lambda standing: (seen.append(standing), stop(standing)))
        made = Shootout.open(tmp_path / "s")
    assert 0 < sum(map(made.finished, made.jobs())) < 8
    again = []
    assert made.train(again.append) and made.train(pytest.fail)
    assert not {s.name for s in again} & {s.name for s in seen if s.step == 12}
    whole = four.lines()
    for label, by_seed in made.lines().items():
        for seed, line in by_seed.items():
            pd.testing.assert_frame_equal(numbers(line), numbers(whole[label][seed]), check_exact=True)


def test_killed_it_goes_on_and_equals_one_that_was_not(four, tiny, tmp_path):
    """A process that ends at once in the middle of a run, with steps that no saved state has."""
    made = Shootout.create(tmp_path / "s", tiny(eval_interval=4), FOUR, seeds=2, steps=12)
    script = """
        import os, sys
        from moe_core.shootout import Shootout
        Shootout.open(sys.argv[1]).train(lambda at: at.name.startswith("muon_adamw") and at.step >= 7 and os._exit(9))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "s")],
                          cwd=Path(__file__).parents[2])
    assert done.returncode == 9 and [made.finished(job) for job in made.jobs()][:2] == [True, False]
    assert made.train()
    whole = four.lines()
    for label, by_seed in made.lines().items():
        for seed, line in by_seed.items():
            pd.testing.assert_frame_equal(numbers(line), numbers(whole[label][seed]), check_exact=True)


def test_what_is_done_with_a_run_later_does_not_move_the_table(tiny, tmp_path):
    """A finished run is rewound, turned and trained on: ordinary, and the table stays."""
    made = Shootout.create(tmp_path / "s", tiny(), ["adamw"], steps=6)
    made.train()
    before = made.summary()
    run = Run.open(tmp_path / "s" / f"adamw-s{made.seeds[0]}")
    run.step(2)
    run.rewind(3)
    run.knobs["lr_scale"].hold(0.1)
    run.step(5)
    run.close()
    pd.testing.assert_frame_equal(made.summary(), before)


def test_a_search_gives_each_entry_the_same_budget_and_the_best_of_its_rates(tiny, tmp_path):
    """Four short runs each, on a seed of their own; the lowest val/loss wins, and the runs have its rates."""
    search = Search((0.5, 4.0), steps=6)
    made = Shootout.create(tmp_path / "s", tiny(), ["adamw", "muon_sophia"], seeds=[3], steps=8, tune=search)
    with pytest.raises(StoreError, match="adamw: the search for its peak rates is not done"):
        made.peaks("adamw")
    assert made.train()
    found = Shootout.open(tmp_path / "s").search_table()
    assert set(found["seed"]) == {4} and set(found["steps"]) == {6}
    for label, first, second in (("adamw", "learning_rate", "embed_lr"), ("muon_sophia", "muon_lr", "sophia_lr")):
        own = found[found["optimizer"] == label]
        assert len(own) == 4 and own["edge"].sum() == 1  # a grid of two is all edge
        best = own.loc[own["val/loss"].idxmin()]
        assert own["chosen"].sum() == 1 and best["chosen"]
        run = Run.open(tmp_path / "s" / f"{label}-s3")
        optim, peaks = run.config.optim, made.peaks(label)
        run.close()
        assert peaks == {name: getattr(optim, name) for name in (first, second)}
        assert best["rates"] == f"{first} {peaks[first]:.3g}, {second} {peaks[second]:.3g}"
        assert made.summary().set_index("optimizer")["peaks"][label] == best["rates"] + " (at the edge of the search)"
        base = search.centre(made.entries[label])
        assert base == {first: getattr(made.entries[label].optim, first), second: 10 * (
            made.entries[label].optim.sophia_lr if second == "sophia_lr" else 3e-3)}
        assert {peaks[name] / base[name] for name in (first, second)} <= {0.5, 4.0}
        assert (optim.max_iters, optim.min_lr / optim.learning_rate) == (8, pytest.approx(0.1))
    assert not [*(tmp_path / "s" / "search").rglob("*.safetensors")]  # nine states for every one that is wanted
    assert len([*(tmp_path / "s").rglob("*.safetensors")]) >= 2


def test_one_that_is_paused_ends_the_call(tiny, tmp_path):
    """By whoever has it: it is not done, no other begins, and this is said."""
    made, said = Shootout.create(tmp_path / "s", tiny(), ["adamw", "sophia"], steps=2000), []
    assert not made.train(lambda standing: [one.pause() for one in list(session._alive)], said.append)
    assert not made.finished(made.jobs()[0]) and list(made.lines()["sophia"]) == []
    assert re.fullmatch(r"adamw-s\d+: paused at step \d+ of 2000; train again to go on", said[-1])


def test_a_search_moves_every_rate_of_an_entry(tiny):
    """The matrices' by the first multiplier of a pair, the rest and the embedding by the second; the floor by none. Its
    seed is its own, and of a grid of nine only the middle lies inside.
    """
    search = Search((0.5, 4.0), steps=6, seed=0)
    for name, first in (("adamw", "learning_rate"), ("muon_adamw", "muon_lr"), ("sophia", "sophia_lr")):
        base = tiny(optimizer=name, embed_lr=0.02)
        before, after = rates(base), rates(search.trial(base, (0.5, 4.0)))
        assert search.trial(base, (0.5, 4.0)).seed == 0 != base.seed
        assert {n: after[n] / before[n] for n in after} == pytest.approx({n: 0.5 if n == first else 4 for n in before})
        assert "embed_lr" in after
    assert rates(tiny(optimizer="sophia", sophia_lr=0.01)) == {"sophia_lr": 0.01, "embed_lr": 0.01}
    assert [pair for pair in Search().pairs if not Search().at_edge(pair)] == [(1.0, 1.0)]


def test_a_run_that_diverges_is_said_and_the_others_go_on(tiny, tmp_path):
    """A rate beyond all measure ends its run; the table has the others, and a note."""
    made = Shootout.create(tmp_path / "s", tiny(), ["adamw", "sophia"], steps=8,
                           peaks={"adamw": {"learning_rate": 1e30}})
    said = []
    assert made.train(say=said.append)
    frame = made.summary("sophia").set_index("optimizer")
    assert any("is not finite" in line or "the step was not applied" in line for line in said)
    assert frame["note"]["adamw"] == f"seed {made.seeds[0]} diverged" and math.isnan(frame["loss"]["adamw"])
    assert frame["seeds"].to_dict() == {"adamw": 0, "sophia": 1} and frame["loss"]["sophia"] < 7


def test_a_search_whose_runs_all_diverge_chooses_none(tiny, tmp_path):
    """It is said, with what to do, and no run begins at rates that nothing was found for."""
    made = Shootout.create(tmp_path / "s", tiny(), ["adamw"], steps=8, peaks={"adamw": {"learning_rate": 1e30}},
                           tune=Search((1.0,), steps=3))
    with pytest.raises(StoreError, match="adamw: every run of its search diverged; give lower peaks"):
        made.train()
    assert not made.search_table()["chosen"].any() and made.summary()["peaks"].tolist() == [""]
    assert [path.name for path in (tmp_path / "s").iterdir() if path.is_dir()] == ["search"]


def test_a_run_that_diverges_in_its_first_step_leaves_a_note_and_no_numbers(tiny):
    """No row at all: the others' numbers stay, and a difference to it is unknown."""
    nothing = Line.of(pd.DataFrame(index=pd.Index([], name="step")), tiny(), {"diverged": "step 1", "step": 0})
    frame = table({"adamw": {0: nothing}, "b": {0: made_up(2.0)}}, "adamw", {"adamw": "", "b": ""})
    bad, good = frame.to_dict("records")
    assert (bad["note"], good["note"], good["val/loss"]) == ("seed 0 diverged", "", 2.0)
    assert all(math.isnan(value) for value in (bad["ms/it"], bad["tok/s"], bad["loss"], good["difference"]))


def made_up(val, ms=2.0, start=3.0):
    """A line of 100 steps whose validation falls straight from ``start`` to ``val``."""
    steps = pd.RangeIndex(1, 101, name="step")
    losses = np.interp(steps, [0, 100], [start, val])
    rows = pd.DataFrame({"train/ce": losses, "val/loss": np.where(steps % 10 == 0, losses, np.nan),
                         "perf/tok_s": 1e3 * 128 / ms}, index=steps)
    return Line.of(rows, preset("nano", batch_size=1), {"branch": 1, "step": 100})


def test_the_table_says_when_a_difference_lies_within_the_spread_and_only_then():
    """Paired by seed: a steady small gain over noisy seeds is beyond, an unsteady larger one within; one seed: NA."""
    noise = np.random.default_rng().uniform(0.5, 1.0, 3)
    base = dict(enumerate(map(made_up, noise)))
    entries = {"adamw": base, "steady": dict(enumerate(map(made_up, noise - [0.010, 0.011, 0.012]))),
               "unsteady": dict(enumerate(map(made_up, noise - [0.2, 0.0, 0.1]))), "once": {0: made_up(noise[0] - 0.3)}}
    frame = table(entries, "adamw", dict.fromkeys(entries, "")).set_index("optimizer")
    assert not frame["within spread"]["steady"] and frame["within spread"]["unsteady"]
    assert frame["within spread"].isna().to_dict() == {"adamw": True, "steady": False, "unsteady": False, "once": True}
    assert frame["difference"]["steady"] == pytest.approx(-0.011, abs=1e-6)
    # By hand: standard deviation 0.001, t(0.975, 2) = 4.303, so -0.011 +- 4.303 * 0.001 / sqrt(3).
    assert (frame["low"]["steady"], frame["high"]["steady"]) == (
        pytest.approx(-0.013484, abs=2e-6), pytest.approx(-0.008516, abs=2e-6))
    assert interval([1.0]) == (-math.inf, math.inf)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Of 4000 samples of three normal numbers, the 95 % interval misses their mean in 4 to 6 of 100."""
    draws = np.random.default_rng().normal(0.3, 1.0, (4000, 3))
    missed = np.mean([not low <= 0.3 <= high for low, high in (interval(list(row)) for row in draws)])
    assert 0.035 < missed < 0.065


def test_steps_and_seconds_to_the_baselines_loss_are_where_the_line_crosses():
    """Straight lines: one that falls twice as far is there at half the steps; a worse one never."""
    entries = {"adamw": {0: made_up(2.0)}, "twice": {0: made_up(1.0, ms=8.0)}, "worse": {0: made_up(2.5)}}
    rows = entries["twice"][0].rows
    rows.loc[70::10, "val/loss"] = 1.9  # it stays above its best
    frame = table(entries, "adamw", dict.fromkeys(entries, "")).set_index("optimizer")
    assert frame["val/loss"]["twice"] == 1.9
    assert frame["steps to baseline"][["adamw", "twice"]].tolist() == pytest.approx([100, 50])
    assert frame["seconds to baseline"][["adamw", "twice"]].tolist() == pytest.approx([0.2, 0.4])
    assert math.isnan(frame["steps to baseline"]["worse"])


def test_models_of_two_shapes_stand_in_one_table(tiny, tmp_path):
    """A dense model and its twin, two optimizers each: four rows, and any of them to compare with."""
    dense = tiny(n_experts=0, expert_width=None)
    made = Shootout.create(tmp_path / "s", {"dense": dense, "moe": moe_twin(dense, 4)}, ["adamw", "muon_adamw"],
                           steps=4, peaks={"moe-muon_adamw": {"muon_lr": 0.02}, "muon_adamw": {"muon_lr": 0.01}})
    assert [made.entries[f"{label}-muon_adamw"].optim.muon_lr for label in ("dense", "moe")] == [0.01, 0.02]
    assert made.train()
    assert list(made.summary()["optimizer"]) == ["dense-adamw", "dense-muon_adamw", "moe-adamw", "moe-muon_adamw"]
    frame = made.summary("moe-adamw").set_index("optimizer")
    assert frame["difference"]["dense-adamw"] == pytest.approx(
        frame["val/loss"]["dense-adamw"] - frame["val/loss"]["moe-adamw"])


def test_a_command_line_shoot_out_prints_the_users_lines_and_goes_on(tiny, tmp_path):
    """Their step, validation and summary lines, the table at --csv; given again it only prints the summary again."""
    config = tiny(opt_list="adamw,muon_adamw", csv=str(tmp_path / "t.csv"), log_interval=4, eval_interval=4)
    first, again = [], []
    shootout_from(config, tmp_path / "s", steps=8, say=first.append)
    table_then = (tmp_path / "t.csv").read_text()
    shootout_from(config, tmp_path / "s", steps=8, say=again.append)
    assert sum(bool(re.fullmatch(
        r"\[muon_adamw  \] step    [48]/8  loss \d\.\d{4}  avg [\d.]+ ms/it +\d+ tok/s  gnorm [\d.]+/1", line))
        for line in first) == 2
    val = r"\[adamw       \]   \(val\) loss \d\.\d{4}  ppl [\d.]+"
    assert sum(bool(re.fullmatch(val, line)) for line in first) == 2
    summary = first[first.index("=== Summary (CPU) ==="):]
    assert re.fullmatch(r"adamw        +[\d.]+ ms/it +\d+ tok/s   loss \d\.\d{4}", summary[1])
    assert again == summary and (tmp_path / "t.csv").read_text() == table_then
    for other, how in (config.replace(batch_size=2), {}), (config, {"seeds": 2}), (config, {"tune": Search()}):
        with pytest.raises(ConfigError, match="holds a shoot-out of something else"):
            shootout_from(other, tmp_path / "s", steps=8, say=first.append, **how)


def test_a_schedule_stretched_keeps_its_shape():
    """Warmup and decay grow with the steps, the last step is validated, and rates keep their floor."""
    longer = stretched(preset("nano"), 2000)
    assert (longer.optim.warmup_iters, longer.optim.lr_decay_iters, longer.eval_interval) == (200, 2000, 25)
    assert stretched(preset("nano", eval_interval=180, max_iters=500), 500).eval_interval == 250  # not 125
    assert stretched(preset("nano", eval_interval=0), 400).eval_interval == 400
    assert with_rates(preset("nano"), learning_rate=0.01).optim.min_lr == pytest.approx(0.001)


@pytest.mark.parametrize("more, says", [
    ({"optimizers": ["adam"]}, "optimizer = 'adam': must be one of adamw, muon_adamw, muon_sophia, sophia"),
    ({"seeds": []}, r"seeds = \[\]: must be different integers, at least one"),
    ({"seeds": [1, 1]}, r"seeds = \[1, 1\]: must be different"),
    ({"seeds": 0}, "seeds = 0: must be an integer, at least 1"),
    ({"seeds": [-1]}, "seed = -1: must be at least 0"),
    ({"steps": 0}, "steps = 0: must be an integer, at least 1"),
    ({"peaks": {"adamw": {"learning_rate": 0.0}}}, "learning_rate = 0.0: must be more than 0"),
    ({"peaks": {"muon": {"muon_lr": 0.1}}}, "peaks = 'muon': must be one of adamw"),
    ({"peaks": {"adamw": {"sophia_k": 0}}}, "sophia_k = 0: must be at least 1"),
    *(({"peaks": {"adamw": {name: value}}, "optimizers": ["sophia", "adamw"]},
       f"{name} = {value} of adamw: must be {other} as in sophia; all entries must see the same batches")
      for name, value, other in (("batch_size", 2, 4), ("gradient_accumulation_steps", 2, 1), ("block_size", 16, 32),
                                 ("vocab_size", 600, 512), ("eval_interval", 1, 10), ("eval_iters", 3, 2))),
    ({"peaks": {"adamw": {"val_fraction": 0.2}}, "optimizers": ["sophia", "adamw"]},
     "adamw: its data are not those of sophia; all entries must see the same batches"),
])
def test_a_wrong_value_is_one_clear_line_and_nothing_is_made(tiny, tmp_path, more, says):
    with pytest.raises(ConfigError, match=says) as raised:
        Shootout.create(tmp_path / "s", tiny(), **{"optimizers": ["adamw"], **more})
    assert "\n" not in str(raised.value) and not (tmp_path / "s").exists()


def test_wrong_searches_labels_and_folders_are_refused(tiny, tmp_path):
    """One line each: multipliers, a search's length, a label that is no directory name, a folder in use or none."""
    for multipliers in ((), (0.0, 1.0), (1.0, 1.0), (1.0, 1.0001), (1, math.inf)):  # the fourth: one directory
        with pytest.raises(ConfigError, match=r"multipliers = .*: must be different numbers above 0"):
            Search(multipliers)
    with pytest.raises(ConfigError, match="steps = 0: must be an integer"):
        Search(steps=0)
    with pytest.raises(ConfigError, match="second = 0: must be a number above 0"):
        Search(second=0)
    with pytest.raises(ConfigError, match="label = 'a/b': must be letters"):
        Shootout.create(tmp_path / "s", {"a/b": tiny()})
    with pytest.raises(ConfigError, match="n_experts = 4: must be 0; the model"):
        moe_twin(tiny())
    Shootout.create(tmp_path / "s", tiny())
    with pytest.raises(StoreError, match="exists already; open that shoot-out"):
        Shootout.create(tmp_path / "s", tiny())
    with pytest.raises(StoreError, match=r"is not a shoot-out, there is no shootout\.json"):
        Shootout.open(tmp_path)
    assert Shootout.create(tmp_path / "other", tiny(), ["sophia", "adamw"]).baseline() == "adamw"
    with pytest.raises(ConfigError, match="baseline = 'sophia': must be one of adamw"):
        Shootout.open(tmp_path / "s").summary("sophia")
    said = (tmp_path / "s" / "shootout.json").read_text()
    for ours, theirs in (('"adamw": {', '"../../adamw": {'), ('"seeds": [\n  1337', '"seeds": [\n  "../../1337"')):
        assert ours in said
        (tmp_path / "s" / "shootout.json").write_text(said.replace(ours, theirs))
        with pytest.raises(StoreError, match=r"shootout\.json cannot be read: (label|seed) = '\.\./\.\./"):
            Shootout.open(tmp_path / "s")
