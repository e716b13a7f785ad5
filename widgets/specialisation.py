"""What the experts specialised in, to look at: charts of an inspection, and a view with text coloured by expert.

    from widgets.specialisation import Specialisation
    Specialisation(run.inspect())

The charts are :class:`~widgets.charts.Chart`, which ``widgets.figures.figure`` draws; the text is
:func:`widgets.token_html.section_html`, which needs neither a kernel nor a script.
"""

from __future__ import annotations

import uuid

import anywidget
import ipywidgets as ipw
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from traitlets import Int, Unicode

from moe_core.inspect import Inspection
from widgets.charts import STEP, Chart, key, titled
from widgets.colors import BLUE, CROWDED, FAIR, GREY, ORANGE, STARVED
from widgets.figures import WIDTH, Place, arrange, columns_in
from widgets.marks import Marks
from widgets.token_html import TOKENS, section_html

COLOR_OF = {"token class": BLUE, "document kind": ORANGE}
PAIRS = 11  # of layers in an overview, a chart each
NARROW = 720  # pixels of the charts in a notebook: two columns, which fit beside a file list
FEW = 5  # pairs by chance under which a lift is noise
FACTORS = 2  # the heatmap's colours end at 1/4 and 4 times what independence gives, in powers of two


def information(inspection: Inspection) -> Chart:
    """What a token's expert says of the token, layer by layer: normalised mutual information, with its noise.

    An error bar is two standard deviations of what chance gives, to both sides.
    """
    table, traces = inspection.mutual_information(), []
    for about, rows in table.groupby("about", sort=False):
        # The spread is in nats; a value of 0 has no scale of its own, and the layer's others lend none.
        scale = np.divide(rows["normalised"], rows["nats"], out=np.zeros(len(rows)), where=rows["nats"].abs() > 1e-9)
        traces.append({
            "type": "bar", "uid": f"information-{about.replace(' ', '-')}", "x": rows["layer"].to_numpy(np.float32),
            "y": _plain(rows["normalised"]), "width": 0.8 / table["about"].nunique(), "showlegend": False,
            "offset": -0.4 + 0.8 * len(traces) / table["about"].nunique(),
            "marker": {"color": COLOR_OF[about], "line": {"width": 0}},
            "error_y": {"type": "data", "array": _plain(2 * rows["spread"] * scale), "color": GREY, "thickness": 1,
                        "width": 3},
            "customdata": np.stack([rows[name] for name in ("nats", "chance", "spread")], -1),
            "hovertemplate": f"layer %{{x:d}}, {about}<br>%{{y:.1%}} of the maximum<br>"
                             "%{customdata[0]:.3f} nats above %{customdata[1]:.3f} by chance (± %{customdata[2]:.3f})"
                             "<extra></extra>"})
    keys = [key(COLOR_OF[about], about, "■") for about in table["about"].unique()]
    top = max(0.1, 1.25 * float(np.nan_to_num(table["normalised"]).max()))
    return Chart("information", titled("Mutual information", *keys), tuple(traces), over_steps=False,
                 x={"title": "layer", "dtick": -(-inspection.n_layer // 16), "fixedrange": True, "showgrid": False},
                 y={"title": "share of the maximum", "tickformat": ".0%", "fixedrange": True,
                    "range": [min(0.0, 1.25 * float(np.nan_to_num(table["normalised"]).min())), min(top, 1.08)]})


def coactivation(inspection: Inspection, layer: int) -> Chart:
    """Experts of a layer against those of the next: how many times more tokens share both than chance would give.

    Left blank where chance gives fewer than 5 pairs: too few to say.
    """
    counts, lift = (frame.to_numpy() for frame in inspection.coactivation(layer))
    n = inspection.n_experts
    few = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum() < FEW
    with np.errstate(divide="ignore"):
        power = np.where(few, np.nan, np.clip(np.log2(lift), -FACTORS, FACTORS))
    text = np.where(few, "", np.char.mod("%.1f", lift))
    trace = {
        "type": "heatmap", "uid": f"coactivation-{layer}", "showlegend": False,
        "z": np.where(few, None, power), "customdata": counts, "text": text, "zmin": -FACTORS, "zmax": FACTORS,
        "xgap": 2 * (n <= 32), "ygap": 2 * (n <= 32), "hoverongaps": False,
        "colorscale": [[0, STARVED], [0.5, FAIR], [1, CROWDED]],
        "texttemplate": "%{text}" if n <= 8 else "", "textfont": {"size": 10},
        "colorbar": {"tickvals": [-FACTORS, 0, FACTORS], "ticktext": ["≤¼×", "1×", "≥4×"], "thickness": 8,
                     "outlinewidth": 0, "tickfont": {"size": 10}, "xpad": 4},
        "hovertemplate": f"expert %{{y}} in layer {layer}, %{{x}} in layer {layer + 1}<br>%{{customdata:,d}} pairs, "
                         "%{text} times what independence gives<extra></extra>"}
    axis = {"fixedrange": True, "showgrid": False}
    return Chart("coactivation", titled(f"Experts, layer {layer} → {layer + 1}"), (trace,), over_steps=False,
                 x={"title": f"expert in layer {layer + 1}", "dtick": -(-n // 16), **axis},
                 y={"title": f"expert in layer {layer}", "dtick": -(-n // 8), "autorange": "reversed",
                    **axis})


def pairs(inspection: Inspection, most: int) -> list[int]:
    """Layers with a layer of experts after them, at most so many, evenly spread."""
    last = inspection.n_layer - 1
    return sorted({round(at) for at in np.linspace(0, last - 1, min(last, most))}) if last else []


def overview(inspection: Inspection, width: int = WIDTH, since: pd.DataFrame | None = None) -> go.Figure:
    """Mutual information; with ``since`` (``run.saturation()``) how much of the routing stayed; and which expert
    follows which for every two layers, at most eleven pairs, evenly spread.
    """
    charts = [information(inspection), *([] if since is None else [saturation(since)]),
              *(coactivation(inspection, layer) for layer in pairs(inspection, PAIRS))]
    columns = min(columns_in(width), len(charts))
    traces, layout = arrange([Place(chart, at // columns, at % columns) for at, chart in enumerate(charts)], Marks(),
                             width)
    return go.Figure(traces, layout | {"template": "none"})


def saturation(frame: pd.DataFrame) -> Chart:
    """``run.saturation()`` over steps: how much of the last routing was there already, a line for each layer."""
    layers = sorted(frame["layer"].unique())
    colors = sample_colorscale("Viridis", np.linspace(0.4, 0.85, max(len(layers), 2)).tolist())
    traces = []
    for layer, color in zip(layers, colors, strict=False):
        rows = frame[frame["layer"] == layer].sort_values("step")
        steps = np.append(rows["step"], rows["compared_with"].max()).astype(np.float32)
        traces.append({
            "type": "scatter", "mode": "lines+markers", "uid": f"saturation-{layer}", "x": steps, "showlegend": False,
            "y": np.append(rows["saturation"], 1.0).astype(np.float32), "line": {"color": color, "width": 1.5},
            "marker": {"size": 5}, "hovertemplate": f"layer {layer}: %{{y:.1%}} as at the end<br>step %{{x:d}}"
                                                    "<extra></extra>"})
    keys = [key(color, layer) for layer, color in zip(layers, colors, strict=False)] if len(layers) <= 16 else []
    chance = float(frame["chance"].mean()) if len(frame) else np.nan
    return Chart("saturation", titled("Router saturation", *["layer"] * bool(keys), *keys), tuple(traces),
                 x={"title": STEP},
                 y={"title": "picks already as at the end", "tickformat": ".0%", "range": [0, 1.05]},
                 rules=((chance, "by chance"),) if np.isfinite(chance) else ())


def _plain(values) -> np.ndarray:
    """float32, and None for NaN, which JSON lacks."""
    values = np.asarray(values, np.float32)
    return np.where(np.isnan(values), None, values) if np.isnan(values).any() else values


_ESM = """
export default {
  render({ model, el }) {
    // Each view has radio buttons of its own: names are shared by a whole page.
    const own = "v" + Math.random().toString(36).slice(2);
    const buttons = () => [...el.querySelectorAll("input[data-layer]")];
    const mark = () => buttons().forEach((b) => { b.checked = Number(b.dataset.layer) === model.get("layer"); });
    const draw = () => { el.innerHTML = model.get("html").replaceAll(model.get("uid"), own); mark(); };
    el.addEventListener("change", (event) => {
      const layer = event.target.dataset.layer;
      if (layer !== undefined) { model.set("layer", Number(layer)); model.save_changes(); }
    });
    model.on("change:layer", mark);
    draw();
  },
};
"""


class TokenView(anywidget.AnyWidget):
    """The coloured text in a notebook: the page changes layers by itself, and says in ``layer`` which is shown."""

    _esm = _ESM
    html = Unicode().tag(sync=True)
    uid = Unicode().tag(sync=True)
    layer = Int(0).tag(sync=True)


class Specialisation(ipw.VBox):
    """An inspection in a notebook: the text with a choice of layer, and :func:`overview` under it.

    Nothing in it waits for the kernel. ``text.layer`` is the layer shown as text, here and in the page.
    """

    def __init__(self, inspection: Inspection, layer: int = 0, tokens: int = TOKENS,
                 since: pd.DataFrame | None = None):
        """``layer``: shown at first. ``tokens``: how many of the probe are shown as text, from its start. ``since``:
        ``run.saturation()``, to be drawn too.
        """
        self.inspection = inspection
        uid = f"spec{uuid.uuid4().hex[:10]}"
        self.text = TokenView(html=section_html(inspection, layer, tokens, uid=uid), uid=uid, layer=layer)
        super().__init__([self.text, go.FigureWidget(overview(inspection, NARROW, since).update_layout(width=NARROW))])
