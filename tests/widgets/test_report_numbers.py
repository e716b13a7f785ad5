"""A report's numbers are those of the run's rows, each in its place: value, step, layer, expert, branch and side."""

import ast
import math
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import moe_core as mc
from moe_core import commands
from moe_core.effects import COLUMNS
from moe_core.gates import check
from moe_core.health import Finding, Lever
from moe_core.store import MAIN, RunStore
from moe_core.twins import active_params, total_params
from widgets import compare
from widgets.record import Record
from widgets.report_blocks import Bullets, Code, Entry, Note, State, Table, Text, Tiles
from widgets.report_contents import _parting, _snapshots, document, effect_blocks
from widgets.report_setup import script, setup
from widgets.report_words import assessment, observations

LAST = slice(-50, None)
NUMBER = re.compile(r"[−+-]?\d[\d,]*(?:\.\d+)?(?:e-\d+)?")


@pytest.fixture
def logged(tiny, tmp_path):
    """120 random rows at every second step, L = 2 and E = 4, and the record that a report is made from."""
    rng, steps = np.random.default_rng(), np.arange(2, 241, 2)
    frame = pd.DataFrame({name: rng.uniform(low, high, 120) for name, low, high in (
        ("train/loss", 8, 9), ("router/top1_p_mean", 0.85, 0.95), ("router/max_frac_mean", 0.3, 0.45),
        ("router/max_frac_max", 0.5, 0.6), ("router/drop_frac_mean", 0.2, 0.4), ("router/aux_mean", 1, 2),
        ("router/load_balance_alpha", 0.5, 0.9), ("router/z_mean", 5, 9), ("router/z_loss_coef", 0.1, 0.2),
        ("router/entropy_mean/layer_0", 0.05, 0.1), ("router/entropy_mean/layer_1", 0.1, 0.15))}, index=steps)
    frame["train/ce"] = 6 - (steps / 120) ** 2 + rng.normal(0, 0.1, 120)
    frame["val/loss"] = np.where(steps % 20 == 0, rng.uniform(5, 6, 120), np.nan)
    frame.loc[[60, 120, 240], "val/loss"] = 4.5, np.nan, 7.0
    for layer in (0, 1):
        frame[f"router/entropy_mean/layer_{layer}"] *= np.linspace(2, 0.5, 120)
    frame["router/entropy_mean"] = frame.filter(like="entropy").mean(axis=1)
    frame["router/active_min"], frame["router/collapsed"] = 4.0, 0.0
    frame.loc[[20, 200], "router/active_min"] = 1.0, 2.0
    frame.loc[200, ["router/aux_mean", "router/load_balance_alpha"]] = 0.0
    frame.loc[[10, 30], "router/collapsed"] = 1.0
    frame["grad/clipped_cum"] = np.cumsum(rng.integers(0, 3, 120))
    shares = np.stack([rng.dirichlet(weights, (120, 2)) for weights in ([4, 3, 1, 2], [30, 10, 20, 15])], 1)
    shares[:70] = shares[:70, ..., ::-1]  # other experts were the fullest and the least served
    for expert in range(4):
        frame[f"router/frac_srv_e{expert}"] = shares[:, 1].mean(1)[:, expert]
    with RunStore.create(tmp_path / "logged", tiny(max_steps=500).to_dict()) as store:
        for step, one in zip(steps, shares, strict=True):
            row = {name: float(value) for name, value in frame.loc[step].items() if value == value}
            store.log_step(MAIN, int(step), 0.0, row, one.astype(np.float32))
        return frame, shares, Record.read(store)


def numbers(text):
    return [float(one.replace(",", "").replace("−", "-")) for one in NUMBER.findall(text)]


def test_the_assessment_is_of_the_rows_that_it_names(logged):
    frame, shares, record = logged
    said = {head: words for head, words, _ in assessment(record)}
    late, worst, served = frame.iloc[LAST], frame["router/max_frac_max"], shares[LAST, 1].mean((0, 1))
    assert numbers(said["Balance"]) == pytest.approx([
        50, 100 * late["router/max_frac_mean"].mean(), 25, 100 * worst.max(), worst.idxmax(),
        50, 100 * served.min(), served.argmin(), 100 * served.max(), served.argmax(), 50, 2, 4, 2, 10, 30,
        100 * late["router/drop_frac_mean"].mean(), 50], rel=5e-3)
    entropy, top = frame["router/entropy_mean"], frame["router/top1_p_mean"]
    assert numbers(said["Specialisation"]) == pytest.approx([
        entropy[:50].mean(), 50, entropy[LAST].mean(), 50, round(entropy[LAST].mean() / math.log(4), 2), 4, math.log(4),
        top[:50].mean(), top[LAST].mean(), 0.25,
        0, late["router/entropy_mean/layer_0"].mean(), 1, late["router/entropy_mean/layer_1"].mean()], rel=5e-3)
    aux, alpha = late["router/aux_mean"], late["router/load_balance_alpha"]
    weighed = (late["router/z_mean"] * late["router/z_loss_coef"]).mean()
    assert numbers(said["Regularisation"]) == pytest.approx([
        aux.mean(), alpha.iloc[-1], 50, (aux / alpha).mean(), 1, 4, late["router/z_mean"].mean(), weighed,
        100 * (aux.mean() + weighed) / late["train/loss"].mean()], rel=5e-3)
    top_2 = replace(record, config=record.config.replace(top_k=2))
    assert "1 is balanced and 2 collapsed." in dict(part[:2] for part in assessment(top_2))["Regularisation"]
    count = frame["grad/clipped_cum"]
    recent = (count[240] - count[142]) / 98
    assert numbers(said["Clipping"]) == [count[240], 240, round(100 * count[240] / 240), round(100 * recent), 50]


def test_what_is_observed_is_the_last_value_or_mean_its_trend_and_where_it_lies(logged):
    frame, shares, record = logged
    rows = {row[0]: row[1:] for row in observations(record).rows}
    assert "train/loss" not in rows  # its part that matters is there
    for name in ("train/ce", "router/aux_mean"):
        assert float(rows[name][0]) == pytest.approx(frame[name].iloc[LAST].mean(), rel=1e-3)
    slope = np.polyfit(np.arange(100), frame["train/ce"].iloc[-100:], 1)[0]
    assert numbers(rows["train/ce"][2]) == pytest.approx([99 * slope, 100], rel=5e-3)
    assert rows["router/aux_mean"][2] == "none in 100 steps" and rows["val/loss"][2] == "11 values, too few"
    assert (float(rows["val/loss"][0]), rows["val/loss"][4]) == (7.0, "lowest 4.5 at step 60")
    for name, healthy, where in (("entropy_mean", "0.277 to 1.33", "below the range"),
                                 ("top1_p_mean", "0.375 to 0.657", "above the range"),
                                 ("max_frac_mean", "up to 0.5", "inside the range")):
        assert rows[f"router/{name}"][3:] == (healthy, where)
    every = replace(record, config=record.config.replace(top_k=4, norm_topk_prob=True))  # nothing is chosen
    assert {row[4:] for row in observations(every).rows if row[0].startswith("router/")} == {("", "")}
    spark = rows["router/top1_p_mean"][1]
    assert (spark.low, spark.high) == pytest.approx((0.375, 0.657), abs=1e-3)
    served = shares[LAST, 1].mean((0, 1))
    for expert, word in ((served.argmin(), "least"), (served.argmax(), "most")):
        row = rows[f"router/frac_srv_e{expert}, the {word} served"]
        assert float(row[0]) == pytest.approx(served[expert], rel=1e-3)
    count = frame["grad/clipped_cum"]
    clipped = rows["grad/clipped_cum / steps"]
    assert clipped[0] == f"{count[240] / 240:.1%}" and clipped[1].values[0] == count[2] / 2


def test_tiles_and_snapshots_are_of_their_steps(logged):
    frame, _, record = logged
    gates = check(["train/ce < 0", "train/ce > 0", "train/ce < 1 by 999", "train/loss > 0"], record.metrics)
    parts = document(record, gates, [], [], [101, 240, 1, 100]).blocks
    tiles = {what: more for what, *more in next(part for part in parts if isinstance(part, Tiles)).tiles}
    entropy = frame["router/entropy_mean"].iloc[-1]
    assert tiles.pop("health")[::2] == ["alarm", "alarm"]  # the router is peaked
    assert tiles == {
        "steps": ["240", "of 500 planned", "none"], "validation loss": ["7", "lowest 4.5 at step 60", "none"],
        "router entropy": [f"{entropy:.3g}", f"{entropy / math.log(4):.2f} of ln 4", "none"],
        "acceptance": ["2 of 4", "2 passed, 1 failed, 1 not reached", "alarm"]}
    table = next(part for part in parts if isinstance(part, Table) and part.head[0] == "metric")
    assert table.head[1:] == ("step 1", "step 100", "step 101", "step 240")
    ce = frame["train/ce"]
    assert next(row for row in table.rows if row[0] == "`train/ce`")[1:] == (
        "–", f"{ce[100]:.4g}", f"{ce[100]:.4g} (at 100)", f"{ce[240]:.4g}")
    _, quarters = _snapshots(record, None)
    assert quarters.head[1:] == ("step 60", "step 100", "step 180", "step 240")  # validated


def test_the_setup_is_that_of_the_config(logged):
    """Each number under its name; the command, broken to fit a page, is the run's own; a fork says where it began."""
    *_, record = logged
    config = record.config.replace(gradient_accumulation_steps=3, lr_decay_iters=77, learning_rate=0.002, min_lr=1e-4,
                                   optimizer="adamw", seed=7)
    parts = setup(replace(record, config=config, parent={"path": "/p", "branch": "main", "step": 40}))
    table, changes = (part for part in parts if isinstance(part, Table))
    rows = dict(table.rows)
    assert rows["forked from"] == "`/p` at step 40" and rows["seed"] == "7"
    assert rows["batch"] == "12 sequences in 3 micro-batches, 384 tokens a step"
    assert rows["steps"] == "240 of 500 planned; 92,160 tokens seen"
    assert rows["optimizer"] == ("`adamw`, learning rate 0.002 to 0.0001, 5 steps of warmup, decay until step 77, "
                                 "gradient clip 1")
    assert rows["parameters"] == (f"{total_params(config):,}, of which a token is multiplied with "
                                  f"{active_params(config):,}")
    assert rows["experts"] == "4 of width 48 in each of 2 layers; top 1; dropless; balance `aux`"
    nano = mc.preset("nano").flat()
    assert [row[0] for row in changes.rows] == [
        f"`{key}`" for key, value in config.flat().items() if value != nano[key]]
    assert ("`seed`", f"`{nano['seed']}`", "`7`") in changes.rows and changes.head[1:] == ("`nano`", "here")
    command, = (part.text for part in parts if isinstance(part, Code))
    assert shlex.split(command.replace("\\\n", " ")) == shlex.split(commands.spell(config))
    assert max(map(len, command.split("\n"))) < 100
    begun = {"how": "init_from", "path": "/p", "optimizer": True}
    assert ast.parse(said := script(replace(record, parent=begun))) and "init_from='/p'" in said
    assert "keep_optimizer=True" in said and said.endswith("run.step(240)")
    later = script(replace(record, parent={"path": "/p", "branch": "main", "step": 40}, fresh=False))
    assert "parent.fork(" in later and "step=40" in later and later.endswith("run.step(200)")
    chosen = record.config.replace(routing="expert", dropless=False, balance="none", capacity_factor=1.5, top_k=2)
    table = next(part for part in setup(replace(record, config=chosen)) if isinstance(part, Table))
    assert "; experts choose tokens, 3 a token on average; capacity factor 1.5;" in dict(table.rows)["experts"]


def test_what_a_turn_brought_is_said_on_its_side_and_once():
    """Of several knobs at a step once; a constant metric is not tested; equal demand and served are one expert's."""
    def row(knob, metric, before, after, difference, stands_out, said="", step=51):
        return [step, knob, 0.0, 1.0, metric, before, after, difference, difference - 0.5, difference + 0.5,
                stands_out, 40.0, said]
    cut = "after: up to step 71, the next turn; before: from step 31, the previous turn"
    rows = [row(knob, *one) for knob in ("router_temp", "grad_clip") for one in (
        ("train/ce", 5.0, 3.0, -1.25, True, f"{cut}; turned together with grad_clip"),
        ("train/loss", 5.0, 4.0, -0.1, False, cut), ("router/aux_mean", 1.0, 1.0, 0.0, False, f"{cut}; constant"),
        ("router/frac_dem_e1", 0.5, 0.7, 0.125, True, cut), ("router/frac_srv_e1", 0.5, 0.7, 0.125, True, cut),
        ("router/frac_dem_e2", 0.5, 0.8, 0.1, True, cut), ("router/frac_srv_e2", 0.5, 0.7, 0.1, False, cut),
        ("val/loss", 6.0, 5.0, math.nan, None, f"{cut}; 5 values before and 5 after: too few to tell, each needs 20"))]
    frame = pd.DataFrame([*rows, row("lr_scale", "train/ce", 1.0, 2.0, 9.0, True, step=81)],
                         columns=COLUMNS).astype({"stands_out": "boolean"})
    text, table = effect_blocks(frame, 51)
    assert text == Text(f"3 of 5 metrics stand out ({cut}).")
    assert table.head[1:4] == ("mean before", "mean after", "change beside the trend")
    assert table.rows == (("train/ce", "5", "3", "−1.25", "−1.75 to −0.75"),
                          ("router/frac_srv_e1", "0.5", "0.7", "+0.125", "−0.375 to +0.625"),
                          ("router/frac_dem_e2", "0.5", "0.8", "+0.1", "−0.4 to +0.6"))
    assert effect_blocks(frame[~frame["stands_out"].fillna(True)], 51) == [
        Text(f"None of 2 metrics stands out from the noise ({cut}).")]
    assert effect_blocks(frame, 1) == [Text("Too few steps on one side to tell what it brought.")]
    parted = frame.iloc[:2].assign(a=5.0, b=4.0)
    text, table = _parting(SimpleNamespace(branch="main"), "b", 20, 50, parted)
    assert text.text.endswith("to 50, on the same batches, 1 of 2 metrics of `b` stand out from `main`, step by step.")
    assert [row[:4] for row in table.rows] == [("train/ce", "5", "4", "−1.25")]
    assert _parting(SimpleNamespace(branch="main"), "b", 20, 50, parted.iloc[:0]) == [
        Text("Over steps 21 to 50 `b` and `main` are identical in every metric.")]


def test_a_finding_is_said_once_with_where_else_it_is_and_each_lever_under_its_own_undo(logged):
    *_, record = logged
    temp, alpha, coef = (Lever(knob, 1.0, 2.0, f"{knob} 1.00 -> 2.00", undo) for knob, undo in (
        ("router_temp", "once calm"), ("load_balance_alpha", "once even"), ("router_z_loss_coef", "once calm")))

    def finding(level, rule, layer, value, levers=()):
        return Finding(level, rule, f"router/{rule}", "sustained", 141, 240, value, None, 0.4, f"{rule} is off", levers,
                       layer)
    found = [finding("alarm", "max_frac_max", 1, 0.75, (temp, alpha, coef)), finding("watch", "mine", None, 0.3),
             finding("alarm", "max_frac_max", 0, 0.5), finding("alarm", "max_frac_max", None, 0.625),
             finding("ok", "entropy", None, 0.1)]
    record = replace(record, findings=found)
    assert record.counted() == {"alarm": 1, "watch": 1}
    entry, = (part for part in document(record, [], [], []).blocks if isinstance(part, Entry) and part.blocks)
    said = "max_frac_max is off; also layer 0 (0.5), all layers (0.625)"
    assert (entry.at, entry.kind, entry.title) == ("steps 141 to 240", "alarm", f"Alarm: {said}")
    assert entry.blocks == (Bullets((
        "`router_temp 1.00 -> 2.00` or `router_z_loss_coef 1.00 -> 2.00`; watch router/max_frac_max; undo: once calm",
        "`load_balance_alpha 1.00 -> 2.00`; watch router/max_frac_max; undo: once even")),)
    assert {head: found for head, _, found in assessment(record)} == {
        "Balance": (f"Alarm, steps 141 to 240: {said}.",), "Regularisation": (), "Clipping": (),
        "Specialisation": ("Fine, steps 141 to 240: entropy is off.",),
        "Other findings": ("Watch, steps 141 to 240: mine is off.",)}


def test_a_gate_of_a_baseline_is_the_baselines_own_and_so_are_its_numbers(logged, tiny_run):
    frame, _, record = logged
    run = tiny_run("other")
    run.step(12)
    run.knobs["grad_clip"].hold(0.5)  # for the next step
    assert Record.read(run).knobs == {name: knob.value for name, knob in run.knobs.items()}
    other, gates = Record.read(run), ["train/ce < 6.5 at 240", "train/ce > 0"]
    mine, theirs = (check(gates, one.metrics) for one in (record, other))
    checklist, = (part for part in document(record, mine, [other], [theirs]).blocks
                  if isinstance(part, Table) and part.head[0] == "gate")
    assert checklist.head[3:] == ("`other`",)
    assert [row[1:2] + row[3:] for row in checklist.rows] == [
        (State("passed", "ok"), State("not reached", "none")), (State("passed", "ok"), State("passed", "ok"))]
    assert checklist.rows[0][2] == f"{frame['train/ce'][240]:.4g} at step 240"
    rows = {row[0]: row[1:] for row in compare.standing([record, other, record], ["a", "b", "c"]).rows}
    seen = run.metrics()
    assert rows["last step"] == ("240", "12", "240")
    assert rows["val/loss, last"][:2] == ("7 at 240", f"{seen['val/loss'][10]:.4g} at 10")
    assert rows["val/loss, lowest"][0] == "4.5 at 60"
    assert numbers(" ".join(rows["train/ce"][:2])) == pytest.approx(
        [frame["train/ce"].iloc[LAST].mean(), seen["train/ce"].mean()], rel=1e-3)
    count = frame["grad/clipped_cum"]
    assert rows["clipped, of the last steps"][0] == f"{(count[240] - count[142]) / 98:.0%}"
    assert compare.labels([record, other, record]) == ["logged", "other", "logged (2)"]
    assert rows["findings"][0] == ", ".join(f"{n} {level}" for level, n in record.counted().items())
    log = other.metrics.drop(columns="train/ce").rename(columns={"val/loss": "val/loss_with_aux"})
    drawn = compare.draw([record, other, replace(other, name="a <b>", branch="c", metrics=log)])
    assert "overlay-train-loss" in drawn and "overlay-train-loss" not in compare.draw([record, other])
    line = [trace for trace in drawn["overlay-val-loss"].data if trace.name][2]
    assert line.name == "a &lt;b&gt;:c, val/loss_with_aux"
    assert line.hovertemplate.startswith(f"{line.name}<br>val/loss_with_aux %{{y")


def test_turns_of_one_step_are_told_together_and_those_of_other_branches_under_their_name(tiny_run):
    """One entry with the effects once; a turn that was turned again is said to be; nothing is lost by rewinding."""
    run = tiny_run(max_steps=100)
    run.step(10)
    run.note("before they part")
    run.step(15)
    for knob, value in (("router_temp", 9.0), ("grad_clip", 0.5), ("router_temp", 2.0)):
        run.knobs[knob].hold(value)
    run.note("on\0 main")
    run.step(25)
    run.rewind(30, name="c")
    run.switch("main")
    run.rewind(20, name="b")
    run.knobs["lr_scale"].hold(0.5)
    run.step(31)

    def told(branch):
        parts = document(Record.read(run, branch), [], [], []).blocks
        where = next(k for k, part in enumerate(parts) if getattr(part, "text", "") == "Comparison")
        return [[(part.at, part.title) for part in side if isinstance(part, Entry) and part.kind in ("knob", "note")]
                for side in (parts[:where], parts[where:])], parts
    (mine, theirs), parts = told("b")
    early = ("step 10", "Note")
    assert mine == [early, ("step 21", "Learning-rate scale: held at 0.5")]
    on_main = [("step 25", "Note"), ("step 26", "Router temperature: held at 9 (superseded before the step); "
                                                "Gradient clip: held at 0.5; Router temperature: held at 2")]
    assert theirs == on_main
    assert [part.title for part in parts if getattr(part, "kind", "") == "branch"] == [
        "Branch `b`, from step 20", "Branch `c`, from step 30"]
    branches, parting = (part for part in parts if isinstance(part, Table) and "`main`" in part.head + part.rows[0])
    assert branches.rows == (("`main`", "", "", "50", ""), ("`c`", "`main`", "30", "30", ""),
                             ("`b`", "`main`", "20", "51", "this one"))
    assert f"Over steps 21 to 50, on the same batches, {len(parting.rows)} of " in str(parts)
    assert parting.head[:4] == ("metric", "`b`", "`main`", "difference") and parting.rows
    for name, *values in parting.rows:
        for side, value in zip(("b", "main"), values, strict=False):
            seen = run.metrics(side)[name].loc[21:50]
            seen = seen.diff() if name.endswith("_cum") else seen
            assert float(value.replace(",", "")) == pytest.approx(seen.mean(), rel=1e-3), name
    of_b = parts
    (mine, theirs), parts = told("main")
    assert (mine, theirs) == ([early, *on_main], [("step 21", "Learning-rate scale: held at 0.5")])
    for told_of in (parts, of_b):
        assert [part.blocks for part in told_of if getattr(part, "title", "") == "Note"] == [
            (Note("before they part"),), (Note("on main"),)]
    entry = next(part for part in parts if getattr(part, "at", "") == "step 26")
    assert sum("stand" in block.text for block in entry.blocks if isinstance(block, Text)) == 1
    assert "turned together" not in str(entry)


def test_branches_are_compared_from_where_both_left_the_line_that_they_share(tmp_path):
    """Of four that part at 10, 20 and 30: each pair over the steps that each has of its own, where there are 20."""
    rng = np.random.default_rng()
    with RunStore.create(tmp_path / "tree", {"imported": True}) as store:
        ids = {"main": MAIN}
        for name, parent, fork, last in (("main", None, 0, 60), ("x", "main", 10, 50), ("y", "x", 30, 55),
                                         ("z", "x", 20, 49)):
            if parent:
                ids[name] = store.add_branch(name, ids[parent], fork)
            for step in range(fork + 1, last + 1):
                store.log_step(ids[name], step, 0.0, {"train/loss": rng.random()})
        seen = {name: {(other, common, upto) for other, common, upto, _ in Record.read(store, name).partings}
                for name in ids}
    assert seen == {
        "main": {("x", 10, 50), ("y", 10, 55), ("z", 10, 49)}, "x": {("main", 10, 50), ("y", 30, 50), ("z", 20, 49)},
        "y": {("main", 10, 55), ("x", 30, 50), ("z", 20, 49)}, "z": {("main", 10, 49), ("x", 20, 49), ("y", 20, 49)}}
