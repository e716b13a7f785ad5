"""A shoot-out's figure is its runs' rows; the live view follows them while somebody else trains."""

import re
import threading

import numpy as np
import pandas as pd
import pytest

from moe_core import preset
from moe_core.shootout import Shootout
from moe_core.shootout.table import Line
from widgets.shootout import ShootoutView, shootout_figure, table_html

LABELS = ("adamw", "muon_adamw", "sophia")


def random_line(n, done=True):
    """A run of ``n`` steps with random losses, validated every fifth, at a random pace."""
    rng = np.random.default_rng()
    steps = pd.RangeIndex(1, n + 1, name="step")
    rows = pd.DataFrame({"train/ce": 8 - 3 * rng.random(n), "val/loss": np.where(steps % 5 == 0, rng.random(n), np.nan),
                         "perf/tok_s": 1e4 * (1 + rng.random(n))}, index=steps)
    return Line.of(rows, preset("nano"), {"step": n, "branch": 1} if done else None)


def by_name(figure, axis):
    return {trace.name: trace for trace in figure.data if trace.name and trace.xaxis == axis}


def test_the_figure_draws_the_runs_rows_over_steps_tokens_and_seconds():
    """The bold line is the mean over seeds, the thin ones are the seeds, each at its own step, token and second."""
    lines = {label: {seed: random_line(40) for seed in (1, 2, 3)} for label in LABELS}
    figure = shootout_figure(lines, smooth=1)
    assert [figure.layout[f"xaxis{k}"].title.text for k in ("", "2", "3")] == [
        "optimizer step", "tokens", "seconds of training"]
    for row, value in enumerate(("train/ce", "val/loss")):
        for column, over in enumerate(("steps", "tokens", "seconds")):
            axis = f"x{3 * row + column + 1}".removesuffix("1") or "x"
            axis = "x" if row == column == 0 else f"x{3 * row + column + 1}"
            for label, trace in by_name(figure, axis).items():
                rows = [line.rows[line.rows[value].notna()] for line in lines[label].values()]
                at = [r.index if over == "steps" else r[over] for r in rows]
                np.testing.assert_allclose(trace.y, np.mean([r[value] for r in rows], 0), rtol=1e-6)
                np.testing.assert_allclose(trace.x, np.mean(at, 0), rtol=1e-6)
                (seeds,) = [t for t in figure.data if t.uid == f"{trace.uid}-seeds"]
                assert trace.hovertemplate.startswith(f"{label} %{{y") and seeds.visible is not False
                assert np.isnan(seeds.y).sum() == 3 and seeds.line.color == trace.line.color
                np.testing.assert_allclose(seeds.y[~np.isnan(seeds.y)], np.concatenate([r[value] for r in rows]),
                                           rtol=1e-6)
            assert len(by_name(figure, axis)) == 3
    colors = {label: {t.line.color for t in figure.data if t.name == label} for label in LABELS}
    assert all(len(own) == 1 for own in colors.values()) and len(set.union(*colors.values())) == 3


def test_the_smoothed_lines_last_point_is_the_tables_loss():
    """The running mean is over as many steps as the loss in the table."""
    line = random_line(200)
    trace = by_name(shootout_figure({"adamw": {1: line}}, ["steps"]), "x")["adamw"]
    assert trace.y[-1] == pytest.approx(line.loss, rel=1e-6) and trace.y.dtype == np.float32


def test_lines_are_short_however_long_the_runs_and_no_seed_hides_another():
    """At most the limit of points; a run that is at its start does not cut the mean of those that are done."""
    lines = {"adamw": {1: random_line(5000), 2: random_line(5000), 3: random_line(3, done=False)}}
    figure = shootout_figure(lines, limit=300)
    assert max(len(trace.x) for trace in figure.data) <= 300 + 3
    assert by_name(figure, "x")["adamw"].x[-1] == 5000
    nothing = shootout_figure({"adamw": {}, "sophia": {}})
    assert [len(trace.x) for trace in nothing.data] == [0] * len(nothing.data)
    with pytest.raises(ValueError, match="over = 'days': must be one of steps, tokens, seconds"):
        shootout_figure(lines, ["days"])


def test_the_view_follows_runs_that_another_thread_trains(tiny, tmp_path):
    """What it shows in the end is the figure of the finished runs, and the table's numbers; then its thread is gone."""
    made = Shootout.create(tmp_path / "s", tiny(eval_interval=4), ["adamw", "sophia"], steps=12)
    view = ShootoutView(made)
    view.interval = 0.05
    assert "0 of 2" in view.status.value
    trainer = threading.Thread(target=made.train)
    trainer.start()
    view._wake.set()
    assert view.wait(60)
    trainer.join()
    want = {trace.uid: trace for trace in shootout_figure(made.lines(), ["steps"]).data}
    for trace in view.figure.data:
        np.testing.assert_array_equal(trace.x, want[trace.uid].x)
        np.testing.assert_array_equal(trace.y, want[trace.uid].y)
    view.over.value = "seconds"
    assert view.wait(60) and view.figure.data[1].x[-1] == pytest.approx(
        made.lines()["adamw"][made.seeds[0]].rows["seconds"].iloc[-1], rel=1e-6)
    assert view.figure.layout.xaxis.title.text == view.figure.layout.xaxis2.title.text == "seconds of training"
    assert "<br>seconds of training " in view.figure.data[1].hovertemplate
    assert [note.text for note in view.figure.layout.annotations] == [
        "<b>Train cross-entropy, running mean</b>", "<b>Validation loss</b>"]
    assert f"{made.summary()['val/loss'][1]:.4f}" in view.table.value and "2 of 2" in view.status.value
    again = ShootoutView(made)
    assert not view._thread.is_alive()
    again.close()
    assert not again._thread.is_alive()


def test_the_page_table_names_the_baseline_and_leaves_out_what_nobody_measured(tiny, tmp_path):
    """No column for memory on a CPU, none for notes where there is none; unknown is empty, not nan."""
    made = Shootout.create(tmp_path / "s", tiny(), ["adamw", "sophia"], steps=4)
    made.train()
    page = table_html(made.summary())
    assert "<b>adamw</b>" in page and "peak MiB" not in page and "<th>note</th>" not in page
    assert "nan" not in page.lower() and "<NA>" not in page
    table = made.summary().assign(**{"within spread": [True, False], "difference": [0.0, 0.25], "ms/it": [1.25, 2.0]})
    assert [word for word in re.findall("<td>(.*?)</td>", table_html(table))
            if word in ("yes", "no", "+0.2500", "1.2", "2.0")] == ["1.2", "yes", "2.0", "+0.2500", "no"]
