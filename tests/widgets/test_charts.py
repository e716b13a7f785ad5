import itertools
import re

import numpy as np
import pandas as pd
import pytest

from moe_core.health import healthy_band
from widgets import charts
from widgets.charts import expert_colors
from widgets.colors import ALL, CROWDED, FAIR, NONE, STARVED
from widgets.feed import Feed
from widgets.figures import figure, panel_figure, panel_parts
from widgets.marks import Marks
from widgets.record import Record
from widgets.report_figures import draw
from widgets.series import Shares


@pytest.fixture
def data(request):
    """Metrics, experts and events of 40 steps of a made-up run with L = 3 and E = 4, of which a tenth is dropped."""
    rng = np.random.default_rng(0)
    demand = rng.dirichlet(np.ones(4), (40, 3)).astype(np.float32)
    step, layer, expert = (index.ravel() for index in np.indices((40, 3, 4)))
    experts = pd.DataFrame({"step": step + 1, "layer": layer, "expert": expert,
                            "demand": demand.ravel(), "served": 0.9 * demand.ravel()})
    names = ["train/loss", "train/ce", "val/loss", "grad/norm", "grad/clipped_cum", "router/aux_mean",
             "router/max_frac_max"] + [
        f"router/{name}_mean{suffix}" for name in ("entropy", "top1_p", "max_frac", "drop_frac")
        for suffix in ("", "/layer_0", "/layer_1", "/layer_2")]
    metrics = pd.DataFrame(rng.random((40, len(names))), columns=names, index=pd.Index(range(1, 41), name="step"))
    metrics.loc[metrics.index % 10 != 0, "val/loss"] = np.nan
    events = pd.DataFrame([dict(step=7, kind="knob", name="router_temp", mode="hold", value=2.0, text=None),
                           dict(step=30, kind="note", text="look")])
    return metrics, experts, events


def by_uid(fig):
    return {trace.uid: trace for trace in fig.data}


def test_the_panel_draws_the_shares_and_metrics_that_it_was_given(data):
    """Each expert's solid line is its served share and its dotted one its demand, of the selected layers."""
    metrics, experts, events = data
    for layer in (None, 2):
        shown = by_uid(panel_figure(metrics, experts, events, layer=layer, others={"b": 2 * metrics}))
        chosen = experts if layer is None else experts[experts.layer == layer]
        mean = chosen.groupby(["step", "expert"])[["demand", "served"]].mean().unstack()
        for expert in range(4):
            for kind, dash in (("served", "solid"), ("demand", "dot")):
                line = shown[f"expert-{expert}-{kind}"]
                np.testing.assert_allclose(line.y, mean[kind][expert], rtol=1e-5)
                assert (line.x.tolist(), line.line.dash) == (list(range(1, 41)), dash)
        for kind in ("served", "demand"):
            np.testing.assert_allclose(shown[f"utilisation-{kind}"].y, mean[kind].iloc[-1], rtol=1e-5)
        here = "" if layer is None else f"/layer_{layer}"
        drawn = {"train-loss": "train/loss", "train-ce": "train/ce", "grad-norm": "grad/norm",
                 "max-frac-worst": "router/max_frac_max", "entropy": f"router/entropy_mean{here}",
                 "top1-p": f"router/top1_p_mean{here}", "max-frac": f"router/max_frac_mean{here}",
                 "drop-frac": f"router/drop_frac_mean{here}"}
        for uid, name in drawn.items():
            np.testing.assert_allclose(shown[uid].y, metrics[name], rtol=1e-6)
        for uid in ("train-loss", "entropy", "max-frac"):
            np.testing.assert_allclose(shown[f"others-{uid}"].y[:-1], 2 * metrics[drawn[uid]], rtol=1e-6)
        np.testing.assert_allclose(shown["others-val-loss"].y[:-1], 2 * metrics["val/loss"].dropna(), rtol=1e-6)
    last = experts[experts.step == 40].pivot(index="layer", columns="expert", values="served")
    heat = shown["heatmap"]  # coloured by the logarithm of share / (1/E), and never under an eighth
    np.testing.assert_allclose(np.array(heat.z, float), np.maximum(np.log2(last * 4), -3), rtol=1e-5)
    np.testing.assert_allclose(np.array(heat.customdata, float)[..., 1], last, rtol=1e-6)
    assert [(at, color) for at, color in heat.colorscale] == [
        (0, NONE), (0.4, STARVED), (0.6, FAIR), (0.8, CROWDED), (1, ALL)]  # of -3, -1, 0, 1 and 2
    assert dict(zip(heat.colorbar.tickvals, heat.colorbar.ticktext, strict=True)) == {
        -3: "≤⅛×", -1: "½×", 0: "fair", 1: "2×", 2: "all"}
    assert heat.zmax == 2 and heat.text[0][0] == f"{100 * last[0][0]:.0f}%"  # everything to one expert of four
    assert shown["val-loss"].x.tolist() == [10, 20, 30, 40]
    rare = metrics.set_index(3 * metrics.index)  # every third step was logged
    np.testing.assert_allclose(charts.clipping(rare).traces[1]["y"], rare["grad/clipped_cum"] / rare.index, rtol=1e-5)


def test_titles_keys_and_hovers_name_what_is_drawn(data):
    """With a layer, other branches and healthy ranges; where nothing is dropped an expert's two lines are one."""
    metrics, experts, events = data
    fig = panel_figure(metrics, experts, events, layer=2, top_k=1, others={"b": metrics})
    words = [re.sub("<[^>]*>", "", note.text.replace("<br>", "   ")) for note in fig.layout.annotations]
    assert words == [
        "Share of each expert, layer 2   ━ served   ┅ demand   ╌ fair share", "Utilisation at step 40, layer 2",
        "Served share by layer at step 40", "Loss   ━ train   ┅ its cross-entropy   ━ validation   ━ others",
        "Router, layer 2   ━ entropy   ━ top-1 probability",
        "Load, layer 2   ━ worst layer (┅ ≤ 70%)   ━ largest demand (░ ≤ 70%)   ━ dropped (┅ ≤ 2%)",
        "Gradient   ━ norm   ━ clip ratio"]
    hovers = {trace.uid: re.sub("<br>step .*", "", trace.hovertemplate) for trace in fig.data}
    for uid, hover in {
            "expert-3-demand": "expert 3 demand %{y:.1%}", "expert-3-served": "expert 3 served %{y:.1%}",
            "heatmap": "layer %{y}, expert %{x}<br>served %{customdata[1]:.1%}, demand %{customdata[0]:.1%}"
                       "<extra></extra>",
            "others-entropy": "branch %{text}<br>entropy %{y:.3f} nats", "top1-p": "top-1 probability %{y:.3f}",
            "max-frac-worst": "worst layer %{y:.1%}", "drop-frac": "dropped %{y:.1%}"}.items():
        assert hovers[uid] == hover
    assert fig.layout.xaxis2.title.text == "expert (full bar: served, pale bar: demand)"
    assert [(trace.uid, trace.name) for trace in fig.data if trace.showlegend] == [
        (f"expert-{expert}-served", str(expert)) for expert in range(4)]
    seen = by_uid(fig)
    axes = {uid: fig.layout[f"yaxis{seen[uid].yaxis[1:]}"] for uid in ("top1-p", "clip-ratio", "entropy")}
    assert [axis.side for axis in axes.values()] == ["right", "right", None]
    entropy, = (shape for shape in fig.layout.shapes if shape.label.text == "ln 4")
    assert entropy.y0 == entropy.y1 == np.log(4) and entropy.yref == seen["entropy"].yaxis
    dropless = panel_figure(metrics, experts.assign(served=experts.demand), events)
    assert {trace.uid for trace in dropless.data if trace.visible is False} == {f"expert-{e}-demand" for e in range(4)}
    assert not [trace for trace in fig.data if trace.visible is False]
    assert "━ served = demand" in dropless.layout.annotations[0].text
    assert "mean of layers" in dropless.layout.annotations[0].text and "others" not in str(dropless.layout.annotations)


def test_an_expert_has_one_colour_everywhere(data):
    metrics, experts, events = data
    shown = by_uid(panel_figure(metrics, experts, events))
    for expert in range(4):
        color = shown[f"expert-{expert}-served"].line.color
        assert shown[f"expert-{expert}-demand"].line.color == color
        assert shown["utilisation-served"].marker.color[expert] == color


def test_the_fair_share_is_drawn_at_one_over_the_number_of_experts(data):
    metrics, experts, events = data
    rules = [shape for shape in panel_figure(metrics, experts, events).layout.shapes if shape.y0 == 0.25]
    assert [shape.label.text for shape in rules] == ["1/4"] * 3
    assert all(shape.y1 == 0.25 for shape in rules)


def test_healthy_ranges_are_shaded_where_the_guide_has_them_and_squeeze_no_line(data):
    """A band lies at the guide's numbers on the axis of its line, and reaches no further than the lines do."""
    metrics, experts, events = data
    metrics = metrics * 0.3  # largest demands under 0.3; the guide's line for E = 4 is 0.5
    fig = panel_figure(metrics, experts, events, top_k=1)
    bands = [shape for shape in fig.layout.shapes if shape.type == "rect"]
    axes = {trace.uid: trace.yaxis for trace in fig.data}
    for uid, name in (("entropy", "router/entropy_mean"), ("top1-p", "router/top1_p_mean")):
        band, = (shape for shape in bands if shape.yref == axes[uid])
        assert (band.y0, band.y1) == healthy_band(name, 4)
        assert band.label.font.color == by_uid(fig)[uid].line.color
    band, = (shape for shape in bands if shape.yref == axes["max-frac"])
    highest = max(metrics[name].max() for name in ("router/max_frac_mean", "router/max_frac_max"))
    assert band.y0 == 0
    assert band.y1 == pytest.approx(1.06 * max(highest, 1.6 / 4))
    assert band.y1 < healthy_band("router/max_frac_mean", 4)[1]
    band, = charts.expert_lines(experts, layer=1, top_k=1).bands
    assert (band.low, band.high) == healthy_band("router/frac_srv_e0", 4)  # some expert's line goes beyond
    assert all(shape.layer == "below" for shape in bands) and len(bands) == 4
    # The largest demand alone is shaded; the others of that chart have a limit each, in their own color.
    limits = {shape.line.color: shape for shape in fig.layout.shapes
              if shape.line.dash == "dot" and shape.yref == axes["max-frac"]}
    for uid, limit, seen in (("max-frac-worst", 0.7, False), ("drop-frac", 0.02, True)):
        shape = limits[by_uid(fig)[uid].line.color]
        assert shape.visible == seen and (not seen or shape.y0 == limit)
    assert not [shape for shape in panel_figure(metrics, experts, events).layout.shapes if shape.type == "rect"]
    assert charts.expert_lines(experts, top_k=4).bands == ()  # every token goes to all of the four: nothing is chosen


def test_every_step_axis_has_every_mark_and_all_move_together(data):
    metrics, experts, events = data
    fig = panel_figure(metrics, experts, events)
    marks = [trace for trace in fig.data if trace.uid.endswith("-marks")]
    assert len(marks) == 5
    for trace in marks:
        axis = fig.layout["xaxis" + trace.xaxis[1:]]
        assert axis.title.text == "optimizer step"
        assert trace.xaxis == "x" or axis.matches == "x"
        assert trace.x[trace.y == 0].tolist() == [7, 30]
        assert "Router temperature: held at 2" in trace.text[0]


@pytest.mark.parametrize("width", (400, 560, 650, 850, 1100))
def test_no_title_reaches_into_the_next_chart(data, width):
    """With a layer and every key: each line of a title ends before its chart does, and its last is above the axes."""
    metrics, experts, events = data
    metrics = metrics.assign(**{"train/mtp": metrics["train/loss"]})
    fig = panel_figure(metrics, experts, events, layer=1, width=width, top_k=1, others={"b": metrics})
    columns = {1: 1, 2: 2, 3: 3}[3 if width >= 900 else 2 if width >= 560 else 1]
    for at, title in enumerate(fig.layout.annotations):
        room = width * (1 if at else min(2, columns) / columns) / (columns if at else 1)
        for words in title.text.split("<br>"):
            assert 6.2 * len(re.sub("<[^>]*>", "", words)) < room
    assert "Router, layer 1" in fig.layout.annotations[4].text


def test_one_step_is_a_point_and_its_axis_counts_in_whole_steps(data):
    metrics, experts, _ = data
    one = panel_figure(metrics.iloc[:1], experts[experts.step == 1], None)
    lines = [trace for trace in one.data if trace.type == "scatter" and not trace.uid.endswith("-marks")]
    assert {trace.mode for trace in lines if len(trace.x) == 1} == {"lines+markers"}
    assert all(axis["autorangeoptions"]["include"] == 8 for name, axis in one.layout.to_plotly_json().items()
               if name.startswith("xaxis") and axis["title"]["text"] == "optimizer step")


@pytest.mark.parametrize(("n_experts", "axis", "hover"), ((8, ".0%", ".1%"), (16, ".0%", ".1%"), (128, ".1%", ".2%")))
def test_shares_are_written_as_exactly_as_their_number_asks(n_experts, axis, hover):
    shares = Shares.of(np.array([7, 12]), np.full((2, 2, 1, n_experts), 1 / n_experts, np.float32))
    chart = charts.expert_lines(shares)
    assert chart.y["tickformat"] == axis and f"%{{y:{hover}}}" in chart.traces[0]["hovertemplate"]
    heat = charts.layer_heatmap(shares)
    bar = heat.traces[0]["colorbar"]
    assert dict(zip(bar["tickvals"], bar["ticktext"], strict=True)).get(3) == {8: "all", 16: None, 128: "8×"}[n_experts]
    assert "at step 12" in heat.title and charts.utilisation(shares, 0).title.endswith("at step 12, layer 0</b>")
    assert heat.title.endswith(", in %</b>") == (n_experts == 16)  # a cell among sixteen has no room for the sign


@pytest.mark.parametrize("width", (400, 700, 850, 1100, 1600))
def test_no_two_charts_overlap_and_each_axis_says_what_it_measures(data, width):
    fig = panel_figure(*data, width=width)
    boxes = []
    for trace in fig.data:
        x, y = (fig.layout[f"{a}axis{trace[f'{a}axis'][1:]}"] for a in "xy")
        if y.overlaying is None:
            boxes.append((*x.domain, *y.domain))
            assert y.title.text
            assert x.title.text
    boxes = sorted(set(boxes))
    assert len(boxes) == 7
    for a, b in itertools.combinations(boxes, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
    assert all(0 <= edge <= 1 for box in boxes for edge in box)


def test_one_chart_alone_is_the_chart_of_the_panel(data):
    metrics, experts, events = data
    panel = by_uid(panel_figure(metrics, experts, events, layer=1))
    alone = by_uid(figure(charts.expert_lines(experts, layer=1), Marks.of(events)))
    assert len(alone) == 9
    for uid, trace in alone.items():
        np.testing.assert_array_equal(trace.y, panel[uid].y)


def test_what_is_out_of_sight_is_not_drawn_but_what_is_now_stays(data):
    """A window of steps, with a branch that begins elsewhere."""
    metrics, experts, _ = data
    traces, layout = panel_parts(metrics, Shares.from_frame(experts), Marks(), window=(20, 22),
                                 others={"b": metrics.loc[15:]})
    drawn = {trace["uid"]: trace for trace in traces}
    for uid in ("train-loss", "expert-0-served", "others-train-loss"):
        assert [step for step in drawn[uid]["x"] if step == step] == [19, 20, 21, 22, 23]  # one beyond on either side
    assert all("at step 40" in layout["annotations"][k]["text"] for k in (1, 2))


def test_a_dense_run_has_no_expert_charts(data):
    metrics, _, events = data
    dense = metrics[[name for name in metrics if not name.startswith("router/")]]
    shown = by_uid(panel_figure(dense, None, events))
    assert set(shown) == {"loss-marks", "train-loss", "val-loss", "clipping-marks", "grad-norm", "clip-ratio"}


def test_an_untrained_run_draws_empty_charts(data):
    metrics, experts, events = data
    nothing = Shares.of(np.zeros(0, np.int64), np.zeros((0, 2, 3, 4), np.float32))
    traces, layout = panel_parts(metrics.iloc[:0], nothing, Marks())
    full, same = panel_parts(metrics, Shares.from_frame(experts), Marks.of(events))
    assert [trace["uid"] for trace in traces] == [trace["uid"] for trace in full]  # so that they can grow in place
    assert layout.keys() == same.keys()
    assert all(len(trace["y"]) == 0 for trace in traces if trace["type"] == "scatter")
    assert traces[[trace["uid"] for trace in traces].index("heatmap")]["z"][0][0] is None


def test_experts_can_be_told_apart_by_colour_blind_readers_on_white_and_on_black():
    """Eight colours, sixteen too, differ for three kinds of colour blindness, and stand out from either page.

    The simulation is that of Machado, Oliveira and Fernandes (2009) at full strength; the distance is CIE76,
    where 2.3 is just noticeable; contrast is that of WCAG 2.
    """
    seen_as = {
        "normal": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def linear(colors):
        rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colors]) / 255
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)

    def lab(rgb):
        f = np.cbrt(np.clip(rgb, 1e-4, 1) @ to_xyz.T / [0.9505, 1, 1.089])
        return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)

    for n, on_white, on_black in ((8, 2.2, 2.8), (16, 2.0, 2.0)):
        colors = linear(charts.expert_colors(n))
        for kind, matrix in seen_as.items():
            points = lab(colors @ np.array(matrix).T)
            nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2))
            assert nearest > 14, (n, kind)
        light, page = colors @ to_xyz[1], linear(["#111111"]) @ to_xyz[1]
        assert (1.05 / (light + 0.05)).min() > on_white
        assert ((light + 0.05) / (page + 0.05)).min() > on_black


@pytest.mark.parametrize("n_experts", (1, 8, 16, 64))
def test_no_two_experts_share_a_colour(n_experts):
    assert len(set(charts.expert_colors(n_experts))) == n_experts


@pytest.mark.parametrize("layer", [None, 1])
def test_the_balance_bias_of_each_expert_is_charted_where_one_balances(tiny_run, layer):
    """In the panel, live too, and in the report: the mean over layers or one layer's, in the expert's own colour."""
    run = tiny_run(balance="bias", bias_update_speed=0.02)
    run.step(6)
    rows = run.metrics(per_layer=True)
    feed = Feed(run)
    feed.select(layer)
    feed.refresh()
    assert sum(name.startswith("router/bias_e") for name in feed.metrics) == 4  # one for each line, not for each layer
    live, _ = panel_parts(feed.metrics, feed.shares, feed.marks, layer)
    drawn = {trace["uid"]: trace for trace in live}
    for expert, color in enumerate(expert_colors(4)):
        at = (0, 1) if layer is None else (layer,)
        expected = rows[[f"router/bias_e{expert}/layer_{i}" for i in at]].mean(axis=1)
        assert expected.abs().max() > 0
        np.testing.assert_allclose(drawn[f"bias-{expert}"]["y"], expected, rtol=1e-5, atol=1e-8)
        assert drawn[f"bias-{expert}"]["line"]["color"] == color
    assert "biases" in draw(Record.read(run))
    plain = tiny_run("plain")
    plain.step(1)
    assert "biases" not in draw(Record.read(plain))


def test_a_bias_of_expert_1_in_layer_1_is_not_that_of_10():
    names = charts.bias_names(12, 12)
    frame = pd.DataFrame([range(len(names))], columns=names, index=[5])
    for layer, layers in ((None, range(12)), (1, [1])):
        lines = charts.biases(frame, 12, layer).traces
        means = [np.mean([12 * expert + at for at in layers]) for expert in range(12)]
        assert [line["y"][0] for line in lines] == means
    assert charts.bias_names(2, 12, 3) == ["router/bias_e0/layer_3", "router/bias_e1/layer_3"]


def test_the_loss_of_tokens_further_on_is_charted_where_it_is_trained(tiny_run):
    """On the loss chart of the panel, live too, and of the report: the mean over the heads."""
    run = tiny_run(n_mtp=2)
    run.step(3)
    feed = Feed(run)
    feed.refresh()
    live, _ = panel_parts(feed.metrics, feed.shares, feed.marks)
    (line,) = [trace for trace in live if trace["uid"] == "train-mtp"]
    np.testing.assert_allclose(line["y"], run.metrics()[["train/mtp_1", "train/mtp_2"]].mean(axis=1), rtol=1e-5)
    assert any(trace.uid == "train-mtp" for trace in draw(Record.read(run))["loss"].data)
