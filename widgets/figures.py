"""Charts on figures: one by itself, or all of a run's on the panel's one figure.

Everything is transparent, its text and grid in mid-greys that are legible on a white and on a black page.
Sizes are pixels at the width that a figure is laid out for; on another width they stretch with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from widgets import charts
from widgets.charts import GAP, Chart, Others
from widgets.feed import Feed
from widgets.marks import Marks
from widgets.series import POINTS, Shares, within

TEXT, GRID, RULE, MARK = "#808080", "rgba(128,128,128,0.2)", "rgba(128,128,128,0.75)", "#9467bd"
BAND = 0.09  # opacity of a healthy range
FONT = {"family": "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif", "size": 11,
        "color": TEXT}
WIDTH = 1100  # a JupyterLab cell on a common screen
WIDE, MEDIUM = 900, 560  # least widths for three columns and for two
TITLE, LINE, LEGEND, AXIS = 30, 16, 24, 46  # above a chart its title, each line more, its legend; below it its axis
ROWS = 3  # of a legend, at most
NOT_OFFERED = ("select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d")  # buttons over a figure, over its titles
LETTER = 6.6  # pixels of a letter of a title, on average
LEFT, RIGHT, BARE = 56, 52, 14  # beside a chart: the y axis; a right axis or colour bar; nothing
TALL, LOW = 230, 150  # plotting areas of the experts' row and of the others


@dataclass(frozen=True)
class Place:
    """Where a chart stands in a grid of cells."""

    chart: Chart
    row: int
    column: int
    rows: int = 1
    columns: int = 1

    @property
    def last_column(self) -> int:
        return self.column + self.columns - 1


def figure(chart: Chart, marks: Marks | None = None, width: int = 700, legend_rows: int = ROWS) -> go.Figure:
    """One chart as a figure of its own."""
    return _figure(*arrange([Place(chart, 0, 0)], marks or Marks(), width, legend_rows))


def panel_figure(metrics: pd.DataFrame, experts: pd.DataFrame | Shares | None = None,
                 events: pd.DataFrame | None = None, layer: int | None = None, width: int = WIDTH,
                 limit: int = POINTS, others: Others = None, top_k: int | None = None) -> go.Figure:
    """All charts of a run on one figure.

    ``metrics``: ``run.metrics(per_layer=True)``; ``experts``: ``run.experts()``, None or empty for a dense
    model; ``events``: ``run.events()``, whose marks stand on every step axis; ``layer``: an index, None for
    the mean over layers; ``width``: pixels to lay out for; ``limit``: most points of a line; ``others``: the other
    branches' rows by name, as :func:`widgets.others.other_branches` reads them, for grey lines; ``top_k``: the
    config's, for the healthy ranges.
    """
    if experts is not None and not isinstance(experts, Shares):
        experts = Shares.from_frame(experts, layer) if len(experts) else None
    marks = Marks() if events is None else Marks.of(events)
    return _figure(*panel_parts(metrics, experts, marks, layer, width, limit, others=others, top_k=top_k))


def panel_parts(metrics: pd.DataFrame, shares: Shares | None, marks: Marks, layer: int | None = None,
                width: int = WIDTH, limit: int = POINTS,
                window: tuple[float, float] | None = None, others: Others = None,
                top_k: int | None = None) -> tuple[list[dict], dict]:
    """:func:`panel_figure` as plain traces and layout, for whoever wants to see only what changed.

    ``window``: first and last step that the step axes show; lines are thinned to ``limit`` points inside it.
    """
    columns = columns_in(width)
    metrics = metrics.iloc[within(metrics.index.to_numpy(), window)]
    if others:
        others = {name: rows.iloc[within(rows.index.to_numpy(), window)] for name, rows in others.items()}
    loss, clip = charts.loss(metrics, limit, others), charts.clipping(metrics, limit)
    if shares is None or not shares.n_experts:
        return arrange(_flow([(loss, 1), (clip, 1)], min(columns, 2)), marks, width)
    n = shares.n_experts
    seen = shares.cut(within(shares.steps_n, window))
    lines, bars = charts.expert_lines(seen, layer, limit, top_k), charts.utilisation(shares, layer)
    heat = charts.layer_heatmap(shares)
    router = charts.confidence(metrics, n, layer, limit, others, top_k)
    load = charts.concentration(metrics, n, layer, limit, others, top_k)
    balanced = [charts.biases(metrics, n, layer, limit)] if "router/bias_max" in metrics else []
    if columns < 3:
        sized = [(lines, columns), *((chart, 1) for chart in (bars, heat, loss, router, load, clip, *balanced))]
        return arrange(_flow(sized, columns), marks, width)
    # In the same order as when they flow, so that only positions change with the width. What happened over
    # steps stands on the left, what is now on the right.
    places = [Place(lines, 0, 0, columns=2), Place(bars, 0, 2), Place(heat, 1, 2, rows=2), Place(loss, 1, 0),
              Place(router, 1, 1), Place(load, 2, 0), Place(clip, 2, 1),
              *(Place(chart, 3, 0, columns=2) for chart in balanced)]
    return arrange(places, marks, width)


def columns_in(width: int) -> int:
    """Columns of charts on so many pixels."""
    return 3 if width >= WIDE else 2 if width >= MEDIUM else 1


def _flow(sized: Sequence[tuple[Chart, int]], columns: int) -> list[Place]:
    """Charts with the columns each takes, one after the other, row by row."""
    places, row, column = [], 0, 0
    for chart, span in sized:
        if column + span > columns:
            row, column = row + 1, 0
        places.append(Place(chart, row, column, columns=span))
        column += span
    return places


def arrange(places: Sequence[Place], marks: Marks, width: int = WIDTH,
            legend_rows: int = ROWS) -> tuple[list[dict], dict]:
    """Traces and layout of placed charts. Axis number k is the k-th chart's; all step axes move together."""
    rows, columns = max(p.row + p.rows for p in places), 1 + max(p.last_column for p in places)
    first = [[p.chart for p in places if p.row == row] for row in range(rows)]  # the charts that begin there
    area = [TALL if rows == 1 or any(c.name == "expert_lines" for c in row) else LOW for row in first]
    cell = width / columns
    legends = {p.row: lines for p in places if (lines := _legend_lines(p.chart, width, legend_rows))}
    titles = [_fitted(p.chart.title, cell * p.columns - 16) for p in places]
    lines = [max((title.count("<br>") for p, title in zip(places, titles, strict=True) if p.row == row), default=0)
             for row in range(rows)]
    head = [TITLE + LINE * lines[row] + (LEGEND + LINE * (legends[row] - 1) if row in legends else 0)
            for row in range(rows)]
    top = [sum(head[:row]) + sum(area[:row]) + AXIS * row for row in range(rows + 1)]  # of a row
    side = [RIGHT if any(p.last_column == column and _is_wide(p.chart) for p in places) else BARE
            for column in range(columns)]
    height = top[-1]

    traces: list[dict] = []
    layout = _base(height)
    steps = next((k for k, p in enumerate(places, 1) if p.chart.over_steps), None)
    for k, (p, title) in enumerate(zip(places, titles, strict=True), 1):
        left, right = cell * p.column, cell * (p.last_column + 1)
        x = [(left + LEFT) / width, (right - side[p.last_column]) / width]
        y = [1 - (top[p.row + p.rows] - AXIS) / height, 1 - (top[p.row] + head[p.row]) / height]
        _add(traces, layout, p.chart, k, x, y, marks, None if k == steps else _id("x", steps))
        layout["annotations"].append({
            "text": title, "x": (left + 8) / width, "y": 1 - (top[p.row] + 6) / height,
            "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top", "align": "left",
            "showarrow": False, "font": {"size": 12}})
        if p.row in legends and p.chart.legend:
            layout["showlegend"] = True
            above = top[p.row] + TITLE - 4 + LINE * lines[p.row]
            layout["legend"] |= {"x": left / width, "y": 1 - above / height}
    return traces, layout


def _legend_lines(chart: Chart, width: int, most: int) -> int:
    """On how many lines, as wide as the figure, a chart's legend has room.

    0 for none or more than ``most``: then hovering says which line is whose.
    """
    names = [trace["name"] for trace in chart.traces if trace["showlegend"]]
    if not chart.legend or not names:
        return 0
    lines = math.ceil(len(names) * (46 + 7 * max(map(len, names))) / max(width - 24, 1))
    return lines if lines <= most else 0


def _fitted(title: str, width: float) -> str:
    """A title with its key, broken between the parts of it where a line would be longer than ``width`` pixels."""
    lines, taken = [], math.inf
    for part in title.split(GAP):
        long = LETTER * len(re.sub(r"<[^>]*>", "", part))
        if taken + long > width:
            lines.append(part)
            taken = long
        else:
            lines[-1] += GAP + part
            taken += long + LETTER * len(GAP)
    return "<br>".join(lines)


def step_axes(layout: dict) -> list[str]:
    """The names of the x axes of a layout by :func:`arrange` that count optimizer steps."""
    return [name for name, axis in layout.items()
            if name.startswith("xaxis") and axis["title"]["text"] == charts.STEP]


def _is_wide(chart: Chart) -> bool:
    return chart.right is not None or any("colorbar" in trace for trace in chart.traces)


def _add(traces: list, layout: dict, chart: Chart, k: int, x: list[float], y: list[float], marks: Marks,
         matches: str | None) -> None:
    """Axes, rules, traces and marks of the k-th chart. Its y axes: 3k-2 left, 3k-1 right, 3k for marks."""
    x_id, y_id, right_id, marks_id = _id("x", k), _id("y", 3 * k - 2), _id("y", 3 * k - 1), _id("y", 3 * k)
    layout[_key(x_id)] = _axis(chart.x) | {"domain": x, "anchor": y_id, "zeroline": False}
    layout[_key(y_id)] = _axis(chart.y) | {"domain": y, "anchor": x_id, "zeroline": False}
    if chart.over_steps:
        layout[_key(x_id)] |= {"nticks": 8, "tickformat": ",d", "showgrid": False, "rangemode": "tozero",
                               "autorangeoptions": {"include": 8}}  # fewer steps would have ticks between them
        if matches:
            layout[_key(x_id)]["matches"] = matches
        layout[_key(marks_id)] = {"overlaying": y_id, "anchor": x_id, "range": [0, 1], "fixedrange": True,
                                  "visible": False}
        traces.append(marks.trace(MARK) | {"uid": f"{chart.name}-marks", "xaxis": x_id, "yaxis": marks_id})
    if chart.right:
        layout[_key(right_id)] = _axis(chart.right) | {
            "overlaying": y_id, "anchor": x_id, "side": "right", "tickmode": "auto", "showgrid": False,
            "zeroline": False}
    for trace in chart.traces:
        own = {"xaxis": x_id, "yaxis": right_id if trace.get("yaxis") == "right" else y_id}
        if "colorbar" in trace:
            own["colorbar"] = trace["colorbar"] | {
                "x": x[1], "xanchor": "left", "y": (y[0] + y[1]) / 2, "len": y[1] - y[0],
                "lenmode": "fraction", "ypad": 0}
        traces.append(trace | own)
    for band in chart.bands:
        shade = ",".join(str(int(band.color[i : i + 2], 16)) for i in (1, 3, 5))
        layout["shapes"].append({
            "type": "rect", "xref": f"{x_id} domain", "yref": right_id if band.right else y_id, "x0": 0, "x1": 1,
            "y0": band.low, "y1": band.high, "line": {"width": 0}, "fillcolor": f"rgba({shade},{BAND})",
            "layer": "below", "label": {
                "text": band.words, "textposition": "bottom right" if band.right else "top left", "padding": 1,
                "font": {"size": 9, "color": band.color}}})
    for value, words, *own in chart.rules:
        layout["shapes"].append({
            "type": "line", "xref": f"{x_id} domain", "yref": y_id, "x0": 0, "x1": 1, "y0": value or 0,
            "y1": value or 0, "visible": value is not None, "layer": "below",
            "line": {"color": own[0] if own else RULE, "width": 1, "dash": "dot" if own else "dash"},
            "label": {"text": words, "textposition": "end", "yanchor": "bottom", "padding": 1,
                      "font": {"size": 9, "color": own[0] if own else TEXT}}})


def _id(axis: str, number: int) -> str:
    return axis if number == 1 else f"{axis}{number}"


def _key(axis_id: str) -> str:
    """``x3`` -> ``xaxis3``, the axis' name in the layout."""
    return f"{axis_id[0]}axis{axis_id[1:]}"


def _axis(settings: dict) -> dict:
    title = {"text": settings["title"], "standoff": 6, "font": {"size": 10}}
    # Looking for labels that hang over the figure's edge, of which there are none, is a tenth of the drawing.
    return {"gridcolor": GRID, "linecolor": GRID, "tickfont": {"size": 10}, "nticks": 6,
            "ticklabeloverflow": "allow"} | settings | {"title": title}


def _base(height: int) -> dict:
    clear = "rgba(0,0,0,0)"
    return {
        "height": height, "autosize": True, "margin": {"l": 0, "r": 0, "t": 0, "b": 0, "pad": 0},
        "paper_bgcolor": clear, "plot_bgcolor": clear, "font": FONT, "barmode": "overlay",
        "hovermode": "closest", "hoverlabel": {"font": {"size": 12}, "align": "left", "namelength": 0},
        "modebar": {"bgcolor": clear, "color": RULE, "activecolor": TEXT, "orientation": "v"},
        "legend": {"orientation": "h", "xanchor": "left", "yanchor": "top", "bgcolor": clear,
                   "font": {"size": 11}, "itemwidth": 30, "tracegroupgap": 0, "groupclick": "togglegroup"},
        "showlegend": False, "shapes": [], "annotations": []}


def _figure(traces: list[dict], layout: dict) -> go.Figure:
    return go.Figure(traces, layout | {"template": "none"})


def run_figure(run, layer: int | None = None, width: int = WIDTH) -> go.Figure:
    """The panel's figure of a run's current branch, with its other branches grey behind it."""
    feed = Feed(run)
    feed.select(layer)
    feed.refresh()
    return _figure(*panel_parts(feed.metrics, feed.shares, feed.marks, layer, width, others=feed.others,
                                top_k=run.config.router.top_k))
