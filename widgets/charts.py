"""Every chart of a run as a pure function of its data; the live panel and the report draw with the same ones.

A chart function takes frames (``run.metrics(per_layer=True)``, ``run.experts()``) and returns a
:class:`Chart`: what to draw and what its axes say, not yet where. :mod:`widgets.figures` makes plotly
figures of charts.

Other branches of the run, by name (:func:`widgets.others.other_branches`), stand behind the lines as thin grey
ones. Where ``top_k``, the picks of a token, is given, the router guide's healthy ranges are shaded.

n steps, L layers, E experts. A layer selection is a layer's index, or None for the mean over layers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from moe_core.health import healthy_band
from widgets.colors import (
    ALL,
    BLUE,
    CROWDED,
    FAIR,
    GREY,
    GREYED,
    HEALTHY,
    MAGENTA,
    NONE,
    ORANGE,
    STARVED,
    expert_colors,
)
from widgets.others import joined
from widgets.series import POINTS, Shares, thin

STEP, SHARE = "optimizer step", "share of assignments"
LEAST = 3  # powers of two under a fair share at which a heatmap's colours end
GAP = "   "  # between a title and each part of its key: where it may be broken
Others = Mapping[str, pd.DataFrame] | None  # None: room for no grey lines


@dataclass(frozen=True)
class Band:
    """A healthy range on the left axis, or on the ``right`` one; where a chart has two, each in its line's color."""

    low: float
    high: float
    words: str
    color: str
    right: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart, not yet placed.

    ``traces``: plotly's dicts, each with a ``uid``; one with ``"yaxis": "right"`` is measured on the right axis.
    ``x``, ``y``, ``right``: plotly's axis settings. ``rules``: (height, words) of horizontal reference lines, and
    their color where it is a line's own; one whose height is None is not in sight. ``bands``: healthy ranges.
    ``over_steps``: x is the step axis, which all such charts share. ``legend``: some of its traces have entries in
    the figure's legend, where there is room for them.
    """

    name: str
    title: str
    traces: tuple[dict, ...]
    x: dict
    y: dict
    right: dict | None = None
    rules: tuple[tuple, ...] = ()
    bands: tuple[Band, ...] = ()
    over_steps: bool = True
    legend: bool = False


def expert_lines(experts: pd.DataFrame | Shares, layer: int | None = None, limit: int = POINTS,
                 top_k: int | None = None) -> Chart:
    """Each expert's share of the assignments over steps: served solid, demand dotted, and the fair share 1/E.

    Where nothing is dropped the two are equal: the dotted lines, hidden under the solid ones, are not drawn, and
    the title says so.
    """
    shares, traces = _shares(experts, layer), []
    dropped = not np.array_equal(shares.demand_nE, shares.served_nE)
    for kind, values_nE, dash in (("demand", shares.demand_nE, "dot"), ("served", shares.served_nE, "solid")):
        for expert, color in enumerate(expert_colors(shares.n_experts)):
            traces.append(_line(
                f"expert-{expert}-{kind}", shares.steps_n, values_nE[:, expert], color, limit,
                f"expert {expert} {kind} %{{y:{_percent(shares.n_experts, 1)}}}", dash=dash, name=str(expert),
                legendgroup=f"expert-{expert}", showlegend=kind == "served",
                visible=dropped or kind == "served"))
    keys = ("━ served", "┅ demand") if dropped else ("━ served = demand",)
    title = titled(f"Share of each expert, {_selection(layer)}", *keys, "╌ fair share")
    return Chart("expert_lines", title, tuple(traces), x={"title": STEP}, y=_share_axis(shares.n_experts),
                 rules=_fair(shares.n_experts), legend=True,
                 bands=_share_band("router/frac_srv_e0", shares.n_experts, top_k, shares.demand_nE))


def utilisation(experts: pd.DataFrame | Shares, layer: int | None = None) -> Chart:
    """The shares at the last step, across experts: demand a wide pale bar, served a narrow full one on it."""
    shares, traces = _shares(experts, layer), []
    at, nothing = np.arange(shares.n_experts, dtype=np.float32), np.zeros(shares.n_experts, np.float32)
    for kind, values_nE, width, opacity in (("demand", shares.demand_nE, 0.84, 0.4),
                                            ("served", shares.served_nE, 0.5, 1)):
        traces.append({
            "type": "bar", "uid": f"utilisation-{kind}", "x": at, "width": width, "showlegend": False,
            "y": values_nE[-1] if len(values_nE) else nothing,
            "marker": {"color": expert_colors(shares.n_experts), "opacity": opacity, "line": {"width": 0}},
            "hovertemplate": f"expert %{{x:d}} {kind} %{{y:{_percent(shares.n_experts, 1)}}}<extra></extra>"})
    return Chart("utilisation", titled(f"Utilisation {_at(shares)}, {_selection(layer)}"), tuple(traces),
                 over_steps=False, rules=_fair(shares.n_experts),
                 # Behind the last bar there is room for the words of the fair share.
                 x=_expert_axis(shares.n_experts, "expert (full bar: served, pale bar: demand)") | {
                     "range": [-0.6, 1.1 * shares.n_experts - 0.4], "tickangle": 0, "dtick": None,
                     "tickvals": list(range(0, shares.n_experts, -(-shares.n_experts // 16)))},
                 y=_share_axis(shares.n_experts) | {"fixedrange": True})


def layer_heatmap(experts: pd.DataFrame | Shares) -> Chart:
    """Served share of every expert in every layer at the last step, coloured by how many times the fair share it is.

    The colours are of its logarithm, from an eighth of the fair share or less up to all of a layer's assignments.
    """
    shares = _shares(experts, None)
    n_layer, n_experts = shares.now_2LE.shape[1:]
    with np.errstate(divide="ignore"):
        times_LE = np.maximum(np.log2(shares.now_2LE[1] * n_experts), -LEAST)
    most = max(math.log2(n_experts), 1)
    ticks = {-LEAST: "≤⅛×", -1: "½×", 0: "fair", 1: "2×"} | ({3: "8×"} if most > 4 else {}) | {most: "all"}
    colors = {-LEAST: NONE, -1: STARVED, 0: FAIR, 1: CROWDED, most: ALL}
    digits, percent = (0, "%") if n_experts <= 8 else (1, "")  # a cell among sixteen has no room for the sign
    named = n_experts <= 16 and n_layer <= 12
    served = [[f"{100 * share:.{digits}f}{percent}" if share == share else "" for share in layer]
              for layer in shares.now_2LE[1].tolist()] if named else []
    hover = _percent(n_experts, 1)
    trace = {
        "type": "heatmap", "uid": "heatmap", "z": np.where(np.isnan(times_LE), None, times_LE),  # JSON has no NaN
        "customdata": np.where(np.isnan(shares.now_2LE), None, shares.now_2LE).transpose(1, 2, 0),
        "text": np.array(served, object), "showlegend": False, "zmin": -LEAST, "zmax": most,
        "xgap": 2 * (n_experts <= 32), "ygap": 2 * (n_layer <= 32),
        "colorscale": [[(at + LEAST) / (most + LEAST), color] for at, color in colors.items()],
        "texttemplate": "%{text}" if named else "", "textfont": {"size": 10 if n_experts <= 8 else 8},
        "colorbar": {"tickvals": list(ticks), "ticktext": list(ticks.values()), "thickness": 8, "outlinewidth": 0,
                     "tickfont": {"size": 10}, "xpad": 4},
        "hovertemplate": (f"layer %{{y}}, expert %{{x}}<br>served %{{customdata[1]:{hover}}}, "
                          f"demand %{{customdata[0]:{hover}}}<extra></extra>")}
    title = f"Served share by layer {_at(shares)}" + (", in %" if named and not percent else "")
    return Chart("layer_heatmap", titled(title), (trace,), over_steps=False,
                 x=_expert_axis(n_experts, "expert"),
                 y={"title": "layer", "dtick": -(-n_layer // 16), "autorange": "reversed", "fixedrange": True,
                    "showgrid": False})


def loss(metrics: pd.DataFrame, limit: int = POINTS, others: Others = None) -> Chart:
    """What is minimised, its cross-entropy part, and the validation cross-entropy, in nats a token."""
    steps, keys = metrics.index, [key(BLUE, "train")]
    traces = [*_grey("train-loss", others, "train/loss", "train loss %{y:.4f}"),
              *_grey("val-loss", others, "val/loss", "validation %{y:.4f}", dash="dash")]
    traces += [_line("train-loss", steps, _column(metrics, "train/loss"), BLUE, limit, "train loss %{y:.4f}")]
    if "router/aux_mean" in metrics:  # without a router the two are one line
        keys.append(key(BLUE, "its cross-entropy", "┅"))
        traces.append(_line("train-ce", steps, _column(metrics, "train/ce"), BLUE, limit,
                            "train cross-entropy %{y:.4f}", dash="dot", width=1))
    if "train/mtp" in metrics:
        keys.append(key(MAGENTA, "tokens further on"))
        traces.append(_line("train-mtp", steps, _column(metrics, "train/mtp"), MAGENTA, limit,
                            "tokens further on %{y:.4f}", width=1))
    val = _column(metrics, "val/loss")
    seen = ~np.isnan(val)
    traces.append(_line("val-loss", steps[seen], val[seen], ORANGE, limit, "validation %{y:.4f}",
                        mode="lines+markers" if seen.sum() <= 60 else "lines", marker={"size": 4}))
    keys.append(key(ORANGE, "validation"))
    if others:
        keys.append(key(GREYED, "others"))
    return Chart("loss", titled("Loss", *keys), tuple(traces),
                 x={"title": STEP}, y={"title": "nats per token"})


def confidence(metrics: pd.DataFrame, n_experts: int, layer: int | None = None, limit: int = POINTS,
               others: Others = None, top_k: int | None = None) -> Chart:
    """Entropy of the router's probabilities (left, in nats) and its mean top-1 probability (right)."""
    of_entropy, of_top1 = (_of_layer(name, layer) for name in ("router/entropy_mean", "router/top1_p_mean"))
    most = math.log(n_experts)  # the entropy of a uniform choice
    bands = ()
    if top_k and n_experts > top_k:
        bands = (Band(*healthy_band(of_entropy, n_experts, top_k), "healthy entropy", BLUE),
                 Band(*healthy_band(of_top1, n_experts, top_k), "healthy probability", ORANGE, right=True))
    return Chart(
        "confidence", titled(_named("Router", layer), key(BLUE, "entropy"), key(ORANGE, "top-1 probability")), (
            *_grey("entropy", others, of_entropy, "entropy %{y:.3f} nats"),
            _line("entropy", metrics.index, _column(metrics, of_entropy), BLUE, limit, "entropy %{y:.3f} nats"),
            _line("top1-p", metrics.index, _column(metrics, of_top1), ORANGE, limit, "top-1 probability %{y:.3f}",
                  yaxis="right")),
        x={"title": STEP}, y={"title": "entropy (nats)", "range": [0, 1.12 * most or 1]},
        right={"title": "probability", "range": [0, 1.12]}, rules=((most, f"ln {n_experts}"),), bands=bands)


def concentration(metrics: pd.DataFrame, n_experts: int, layer: int | None = None, limit: int = POINTS,
                  others: Others = None, top_k: int | None = None) -> Chart:
    """The largest demand of one expert, and the share of assignments that capacity dropped.

    The healthy range that is shaded is that of the largest demand; the others' limits are lines in their colors.
    """
    largest = _of_layer("router/max_frac_mean", layer)
    lines = (("max-frac-worst", "worst layer", ORANGE, "router/max_frac_max"),
             ("max-frac", "largest demand", MAGENTA, largest),
             ("drop-frac", "dropped", GREY, _of_layer("router/drop_frac_mean", layer)))
    hover = f"%{{y:{_percent(n_experts, 1)}}}"
    drawn = [_line(uid, metrics.index, _column(metrics, name), color, limit, f"{words} {hover}")
             for uid, words, color, name in lines]
    keys = {uid: words for uid, words, _, _ in lines}
    bands, rules = _share_band(largest, n_experts, top_k, *(line["y"] for line in drawn)), _fair(n_experts)
    if bands:
        top = _top(n_experts, *(line["y"] for line in drawn))
        bands = (replace(bands[0], words="", color=MAGENTA),)
        for uid, words, color, name in lines:
            most = healthy_band(name, n_experts, top_k)[1]
            keys[uid] = f"{words} ({'┅░'[name == largest]} ≤ {most:.0%})"
            rules += () if name == largest else ((most if most < top else None, "", color),)
    return Chart("concentration",
                 titled(_named("Load", layer), *(key(color, keys[uid]) for uid, _, color, _ in lines)), (
                     *_grey("max-frac", others, largest, f"largest demand {hover}"), *drawn), x={"title": STEP},
                 y=_share_axis(n_experts), rules=rules, bands=bands)


def clipping(metrics: pd.DataFrame, limit: int = POINTS) -> Chart:
    """The gradient's norm before clipping (left), and the share of the steps so far that were clipped."""
    steps, norm = metrics.index, _column(metrics, "grad/norm")
    ratio = _column(metrics, "grad/clipped_cum") / np.maximum(np.asarray(steps, np.float64), 1)
    return Chart(
        "clipping", titled("Gradient", key(GREY, "norm"), key(BLUE, "clip ratio")), (
            _line("grad-norm", steps, norm, GREY, limit, "gradient norm %{y:.3g}", width=1),
            _line("clip-ratio", steps, ratio, BLUE, limit, "%{y:.1%} of the steps so far clipped",
                  yaxis="right")),
        x={"title": STEP}, y={"title": "gradient norm", "rangemode": "tozero"},
        right={"title": "share of steps clipped", "tickformat": ".0%", "range": [0, 1.05]})


def bias_names(n_experts: int, n_layer: int, layer: int | None = None) -> list[str]:
    """The metrics that :func:`biases` reads of a layer selection."""
    layers = range(n_layer) if layer is None else (layer,)
    return [f"router/bias_e{expert}/layer_{at}" for expert in range(n_experts) for at in layers]


def biases(metrics: pd.DataFrame, n_experts: int, layer: int | None = None, limit: int = POINTS) -> Chart:
    """The balance bias of each expert: what is added to its logits where experts are picked, and nowhere else."""
    every = [name for name in metrics if name.startswith("router/bias_e")]
    chosen = [name for name in every if layer is None or name.endswith(f"/layer_{layer}")]
    lines = []
    for expert, color in enumerate(expert_colors(n_experts)):
        own = [name for name in chosen if name.startswith(f"router/bias_e{expert}/")]
        mean = metrics[own].mean(axis=1).to_numpy(np.float32)
        lines.append(_line(f"bias-{expert}", metrics.index, mean, color, limit, f"expert {expert} bias %{{y:.4f}}",
                           legendgroup=f"expert-{expert}"))
    return Chart("biases", titled(f"Balance bias of each expert, {_selection(layer)}"), tuple(lines),
                 x={"title": STEP}, y={"title": "added to the logit", "rangemode": "normal"}, rules=((0.0, ""),))


def _line(uid: str, x, y, color: str, limit: int, hover: str, dash: str = "solid", width: float = 1.5,
          **more) -> dict:
    x, y = thin(x, y, limit)
    return {"type": "scatter", "mode": "lines+markers" if len(x) == 1 else "lines", "marker": {"size": 5}, "uid": uid,
            "x": x, "y": y, "showlegend": False, "line": {"color": color, "width": width, "dash": dash},
            "hovertemplate": f"{hover}<br>step %{{x:d}}<extra></extra>"} | more


def _grey(uid: str, others: Others, metric: str, hover: str, dash: str = "solid") -> list[dict]:
    """One trace for all other branches; none where ``others`` is None."""
    if others is None:
        return []
    x, y, whose = joined(others, metric)
    return [{"type": "scatter", "mode": "lines", "uid": f"others-{uid}", "x": x, "y": y, "showlegend": False,
             "text": [html.escape(name) for name in whose], "line": {"color": GREYED, "width": 1, "dash": dash},
             "hovertemplate": f"branch %{{text}}<br>{hover}<br>step %{{x:d}}<extra></extra>"}]


def _share_band(metric: str, n_experts: int, top_k: int | None, *drawn: np.ndarray) -> tuple[Band, ...]:
    """The healthy range of a share, no further up than the chart reaches: shading does not squeeze the lines."""
    if top_k is None or n_experts <= top_k:
        return ()
    low, high = healthy_band(metric, n_experts, top_k)
    return (Band(low or 0.0, min(high, _top(n_experts, *drawn)), "healthy", HEALTHY),)


def _top(n_experts: int, *drawn: np.ndarray) -> float:
    """How far up a chart of shares reaches."""
    return 1.06 * float(max([1.6 / n_experts, *(np.nanmax(y) for y in drawn if np.isfinite(y).any())]))


def _shares(experts: pd.DataFrame | Shares, layer: int | None) -> Shares:
    return experts if isinstance(experts, Shares) else Shares.from_frame(experts, layer)


def _column(metrics: pd.DataFrame, name: str) -> np.ndarray:
    """A metric over steps; NaN where no step has it."""
    if name not in metrics:
        return np.full(len(metrics), np.nan, np.float32)
    return metrics[name].to_numpy(np.float32)


def _of_layer(name: str, layer: int | None) -> str:
    return name if layer is None else f"{name}/layer_{layer}"


def _selection(layer: int | None) -> str:
    return "mean of layers" if layer is None else f"layer {layer}"


def _named(title: str, layer: int | None) -> str:
    return title if layer is None else f"{title}, layer {layer}"


def _percent(n_experts: int, more: int = 0) -> str:
    """How a share is written: as exactly as an axis about 1/E needs, or with ``more`` digits."""
    return f".{max(math.ceil(math.log10(n_experts / 3.2)) - 1, 0) + more}%"


def _at(shares: Shares) -> str:
    return f"at step {shares.steps_n[-1]}" if len(shares.steps_n) else "before step 1"


def _share_axis(n_experts: int) -> dict:
    """From 0, and far enough up that a balanced router's wiggles do not fill the chart."""
    return {"title": SHARE, "tickformat": _percent(n_experts), "rangemode": "tozero",
            "autorangeoptions": {"include": 1.6 / n_experts}}


def _expert_axis(n_experts: int, title: str) -> dict:
    return {"title": title, "dtick": -(-n_experts // 16), "fixedrange": True, "showgrid": False}


def _fair(n_experts: int) -> tuple[tuple[float, str], ...]:
    return ((1 / n_experts, f"1/{n_experts}"),)


def key(color: str, words: str, sign: str = "━") -> str:
    """What a line's color means, for :func:`titled`."""
    return f"<span style='color:{color}'>{sign} {words}</span>"


def titled(words: str, *keys: str) -> str:
    """A title with the key to the chart's lines behind it: no legend to lay out, nothing to overlap."""
    return GAP.join([f"<b>{words}</b>", *keys])
