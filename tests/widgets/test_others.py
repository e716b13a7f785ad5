import numpy as np
import pytest

from moe_core.face import Face
from widgets import charts
from widgets.feed import Feed
from widgets.figures import panel_figure, run_figure
from widgets.live import Live
from widgets.others import MOST, POINTS, joined, other_branches

NAMES = ["train/loss", "val/loss", "router/entropy_mean", "router/max_frac_mean"]


def of(run):
    return other_branches(run.store, run._branch.id, NAMES)


def test_each_other_branch_starts_where_it_parts_and_is_drawn_once(tiny_run):
    """Whether it is an ancestor, a descendant or a sibling of the current one: its own rows and the one before."""
    run = tiny_run()
    run.step(6)
    run.rewind(4, name="b")
    run.step(4)  # 5 to 8
    run.rewind(7, name="c")
    run.step(2)  # 8 to 9
    seen = {}
    for branch, expected in (("c", {"main": (4, 6), "b": (7, 8)}), ("b", {"main": (4, 6), "c": (7, 9)}),
                             ("main", {"b": (4, 8), "c": (7, 9)})):
        run.switch(branch)
        seen[branch] = of(run)
        assert {name: (rows.index[0], rows.index[-1]) for name, rows in seen[branch].items()} == expected
    for name, rows in seen["main"].items():
        np.testing.assert_array_equal(rows, run.metrics(name).loc[rows.index[0] :, NAMES].to_numpy(np.float32))
    run.rewind(2, name="bare")
    run.switch("main")
    assert set(of(run)) == {"b", "c"}  # a branch without steps of its own is no line


def test_both_lines_of_an_ab_are_on_the_charts(tiny_run):
    run = tiny_run()
    run.step(3)
    both = run.ab({"lr_scale": 0.1}, {"lr_scale": 1.0}, steps=4)
    fig = run_figure(run)
    shown = {trace.uid: trace for trace in fig.data}
    grey, own = shown["others-train-loss"], shown["train-loss"]
    assert grey.x[:-1].tolist() == [3, 4, 5, 6, 7]
    np.testing.assert_allclose(grey.y[:-1], run.metrics(both.branch_a)["train/loss"].loc[3:], rtol=1e-6)
    assert own.x.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert set(grey.text) == {both.branch_a, ""}
    order = [trace.uid for trace in fig.data]
    assert order.index("others-train-loss") < order.index("train-loss")  # behind it


@pytest.mark.parametrize("layer", (None, 1))
def test_a_runs_figure_is_that_of_its_frames_without_a_row_for_every_expert_of_every_step(tiny_run, layer, monkeypatch):
    """The same figure as of run.metrics() and run.experts(), of which a night's run has a hundred million rows."""
    run = tiny_run(balance="bias")
    run.step(12)
    run.rewind(5)
    run.step(6)
    run.note("so far")
    metrics = run.metrics(per_layer=True)
    others = other_branches(run.store, run._branch.id, [*metrics])
    plain = panel_figure(metrics, run.experts(), run.events(), layer, others=others, top_k=run.config.router.top_k)
    monkeypatch.delattr(Face, "experts")
    of_run = run_figure(run, layer)
    for ours, theirs in zip(of_run.data, plain.data, strict=True):
        for axis in ("z",) if ours.type == "heatmap" else ("x", "y"):
            np.testing.assert_allclose(*(np.array(trace[axis], float) for trace in (ours, theirs)), rtol=1e-5,
                                       atol=1e-8, err_msg=ours.uid)
    assert of_run.layout == plain.layout


def test_grey_lines_are_bounded_in_number_and_points(tiny_run):
    run = tiny_run(eval_interval=0)
    run.step(60)
    for n in range(MOST + 3):
        run.rewind(1 + n, name=f"n{n}")
        run.step(12)
        run.switch("main")
    others = of(run)
    assert list(others) == [f"n{n}" for n in range(3, MOST + 3)]
    long = {name: rows.reindex(range(1, 5000)).interpolate(limit_direction="both") for name, rows in others.items()}
    x, y, whose = joined(long, "train/loss")
    assert len(x) == len(y) == len(whose) <= POINTS + MOST
    assert np.isnan(y).sum() == MOST


def test_the_live_figure_draws_them_leaves_them_out_and_forgets_them_where_there_are_none(tiny_run):
    run = tiny_run()
    run.step(5)
    live = Live(run)
    grey = next(trace for trace in live.figure.data if trace.uid == "others-train-loss")
    title = next(a for a in live.figure.layout.annotations if a.text.startswith("<b>Loss</b>"))
    assert len(grey.x) == 0 and not live.has_others
    run.rewind(3)
    run.step(1)
    live._sent_at = 0
    live._update()
    assert grey.x[:-1].tolist() == [3, 4, 5] and live.has_others
    assert "others" in title.text
    live.show_others(False)
    live._update()
    assert len(grey.x) == 0 and "others" not in title.text
    live.select(1)
    live.show_others(True)
    live._update()
    entropy = next(trace for trace in live.figure.data if trace.uid.startswith("others-entropy"))
    main = run.metrics("main", per_layer=True)["router/entropy_mean/layer_1"]
    np.testing.assert_allclose(entropy.y[:-1], main.loc[3:], rtol=1e-6)


def test_a_branchs_name_is_inert_on_a_chart(tiny_run):
    run = tiny_run()
    run.step(4)
    run.rewind(2, name="<img src=x>")
    run.step(1)
    run.switch("main")
    grey = charts.loss(run.metrics(), others=of(run)).traces[0]
    assert set(grey["text"]) == {"&lt;img src=x&gt;", ""}


@pytest.mark.parametrize("branches", (0, 2))
def test_what_a_feed_has_of_others_is_what_the_store_says(tiny_run, branches):
    run = tiny_run()
    run.step(4)
    for _ in range(branches):
        run.rewind(2)
        run.step(2)
    feed = Feed(run)
    feed.refresh()
    expected = other_branches(run.store, run._branch.id, feed.metrics.columns)
    assert list(feed.others) == list(expected) and len(expected) == branches
    for name, rows in expected.items():
        np.testing.assert_array_equal(feed.others[name].to_numpy(), rows.to_numpy())
