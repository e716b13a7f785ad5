"""Several runs side by side: their curves on shared axes, and a table of how they differ. ``moe compare`` writes it.

``write(["runs/first", "runs/second"], "both.html")``
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from widgets import charts, figures
from widgets.charts import Chart
from widgets.colors import expert_colors
from widgets.marks import say
from widgets.record import Record
from widgets.report_blocks import Block, Document, Heading, Picture, Pictures, Table, Text, code, number
from widgets.report_files import ReportError, checked, save
from widgets.report_words import WINDOW, recent_clipping
from widgets.series import POINTS, thin

# What is overlaid: metric, what the axis says, what the picture is called.
OVERLAID = (("val/loss", "nats per token", "Validation loss"), ("train/ce", "nats per token", "Train cross-entropy"),
            ("train/loss", "nats per token", "Train loss, with what is added to it"),
            ("router/entropy_mean", "nats", "Router entropy"),
            ("router/max_frac_max", charts.SHARE, "Largest demand, worst layer"),
            ("router/top1_p_mean", "probability", "Top-1 probability"), ("grad/norm", "gradient norm", "Gradient norm"))
# What a log may hold instead of a metric, drawn dashed beside it under its own name: a legacy script's validation.
INSTEAD = {"val/loss": "val/loss_with_aux"}
# Means over the last window, in the table.
MEANS = ("train/ce", "train/loss", "router/entropy_mean", "router/top1_p_mean", "router/max_frac_mean",
         "router/max_frac_max", "router/active_min", "router/drop_frac_mean", "router/no_expert_mean", "perf/tok_s")


def write(runs: Sequence, out: str | os.PathLike, *, static: bool = False, title: str | None = None) -> Path:
    """Compare runs (paths, runs or stores) in ``out``, an .html, .md or .ipynb file; returns its path.

    ``static``: pictures in place of interactive charts, in HTML. Raises ReportError, StoreError.
    """
    out = checked(out)
    if isinstance(runs, str | os.PathLike) or len(runs) < 2:
        raise ReportError(f"runs = {runs!r}: must be two runs or more")
    records = [Record.read(run, told=False) for run in runs]
    names = labels(records)
    document = Document(
        title or " and ".join([", ".join(names[:-1]), names[-1]]),
        f"{len(records)} runs compared, up to step {max(record.last_step for record in records):,}",
        tuple(blocks(records, names, level=2)))
    return save(document, records, out, static=static)


def labels(records: Sequence[Record]) -> list[str]:
    """A name for each, with its branch where the branch is not main, and numbered where two are alike."""
    said, seen = [], {}
    for record in records:
        name = record.name if record.branch == "main" else f"{record.name}:{record.branch}"
        seen[name] = seen.get(name, 0) + 1
        said.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return said


def blocks(records: Sequence[Record], names: Sequence[str], level: int) -> list[Block]:
    """How they stand, the overlaid curves, how their configs differ, and what was turned."""
    drawn = draw(records, names)
    parts: list[Block] = [
        Heading("How they stand", level), standing(records, names),
        Text(f"Where a metric is of many steps, the mean of the last {WINDOW} logged ones is given.")]
    if drawn:
        parts += [Heading("Overlaid", level), Pictures(tuple(
            Picture(key, figure, f"{title} of {', '.join(names)} over steps")
            for (key, figure), (_, _, title) in zip(drawn.items(), _overlaid(records), strict=True)))]
    return [*parts, *_incomparable(records, names), Heading("How their configs differ", level),
            *_differences(records, names), *_turned(records, names, level)]


def _incomparable(records: Sequence[Record], names: Sequence[str]) -> list[Block]:
    """What cannot be held against each other because it is counted in other units, if anything."""
    known = [(code(name), record.config) for record, name in zip(records, names, strict=True)
             if record.config is not None]
    said = []
    if len({config.model.vocab_size for _, config in known}) > 1:
        sizes = ", ".join(f"{name} {config.model.vocab_size:,}" for name, config in known)
        said.append(f"Their vocabularies differ ({sizes}), and with them what a token is: losses in nats per token "
                    "cannot be compared.")
    elif len({record.tokens for record in records if record.tokens is not None}) > 1:
        said.append("They read different tokens, of another text, split or tokenizer: losses cannot be compared.")
    windows = [(name, config.optim.batch_size * config.eval_iters, config.model.block_size) for name, config in known
               if config.eval_interval]
    if len({window[1:] for window in windows}) > 1:
        sizes = ", ".join(f"{name} {n:,} of {size:,} tokens" for name, n, size in windows)
        said.append(f"They are validated on different windows ({sizes}): val/loss is a mean over different text.")
    experts = [(name, config.model.n_experts) for name, config in known if config.model.n_experts]
    if len({n for _, n in experts}) > 1:
        sizes = ", ".join(f"{name} {n} (ln {n} = {math.log(n):.3f})" for name, n in experts)
        said.append(f"Their numbers of experts differ: {sizes}. Router entropies, probabilities and shares are to be "
                    "read against ln E and 1/E, not against each other.")
    return [Text(" ".join(said))] if said else []


def standing(records: Sequence[Record], names: Sequence[str]) -> Table:
    """One column a run: steps, validation, router health."""
    rows: list[tuple] = [("last step", *(f"{record.last_step:,}" for record in records)),
                         ("val/loss, last", *(_last(record, "val/loss") for record in records)),
                         ("val/loss, lowest", *(_best_validation(record) for record in records))]
    if any(len(record.series("val/loss_with_aux")[0]) for record in records):
        rows.append(("val/loss_with_aux, last", *(_last(record, "val/loss_with_aux") for record in records)))
    rows += [(metric, *(number(_recent(record, metric)) for record in records)) for metric in MEANS
             if any(len(record.series(metric)[1]) for record in records)]
    if any(len(record.series("grad/clipped_cum")[1]) > 1 for record in records):
        rows.append(("clipped, of the last steps", *(
            f"{recent_clipping(record):.0%}" if len(record.series("grad/clipped_cum")[1]) > 1 else "–"
            for record in records)))
    rows.append(("findings", *(_worst(record) for record in records)))
    return Table(("", *map(code, names)), tuple(rows), tuple(range(1, len(names) + 1)))


def draw(records: Sequence[Record], names: Sequence[str] | None = None) -> dict[str, go.Figure]:
    """Every overlay that two runs or more have something for, by the name that a report gives it."""
    names = labels(records) if names is None else names
    return {_key(metric): overlay(records, names, metric, unit, title)
            for metric, unit, title in _overlaid(records)}


def overlay(records: Sequence[Record], names: Sequence[str], metric: str, unit: str, title: str) -> go.Figure:
    """One metric of several runs on one pair of axes."""
    traces, key = [], _key(metric)
    for k, (record, name, color) in enumerate(zip(records, names, expert_colors(len(records)), strict=True)):
        shown = _shown(record, metric)
        steps, values = record.series(shown)
        steps, values = thin(steps, np.asarray(values, np.float32), POINTS)
        said = html.escape(name if shown == metric or not len(steps) else f"{name}, {shown}")  # plotly reads tags
        traces.append({
            "type": "scatter", "uid": f"{key}-{k}", "x": steps, "y": values, "name": said, "showlegend": len(steps) > 0,
            "mode": "lines+markers" if len(steps) <= 60 else "lines", "marker": {"size": 4},
            "line": {"color": color, "width": 1.5, "dash": "solid" if shown == metric else "dash"},
            "hovertemplate": f"{said}<br>{shown} %{{y:.4g}}<br>step %{{x:d}}<extra></extra>"})
    chart = Chart(key, f"<b>{title}</b>", tuple(traces), x={"title": charts.STEP}, y={"title": unit},
                  legend=True)
    # All are named, however many they are: in a picture no hovering says whose a line is.
    return figures.figure(chart, width=520, legend_rows=len(records))


def _key(metric: str) -> str:
    """The name of an overlay; plotly makes class names of it, which have no stroke in them."""
    return f"overlay-{metric.replace('/', '-')}"


def _overlaid(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Those of ``OVERLAID`` that two runs or more have; the train loss only where not all know its cross-entropy."""
    def known(metric: str) -> int:
        return sum(len(record.series(_shown(record, metric))[0]) > 0 for record in records)
    return [one for one in OVERLAID if known(one[0]) > 1
            and not (one[0] == "train/loss" and known("train/ce") == len(records))]


def _shown(record: Record, metric: str) -> str:
    """The metric, or what a log holds instead of it."""
    return metric if len(record.series(metric)[0]) else INSTEAD.get(metric, metric)


def _differences(records: Sequence[Record], names: Sequence[str]) -> list[Block]:
    known = [(name, record.config.flat()) for record, name in zip(records, names, strict=True)
             if record.config is not None]
    without = [name for record, name in zip(records, names, strict=True) if record.config is None]
    said: list[Block] = []
    if len(known) > 1:
        fields = [key for key in known[0][1] if len({repr(values.get(key)) for _, values in known}) > 1]
        rows = tuple((f"`{key}`", *(code(values.get(key)) for _, values in known)) for key in fields)
        said.append(Table(("field", *(code(name) for name, _ in known)), rows) if rows else
                    Text("Their configs are the same in every field."))
    if without:
        said.append(Text(f"Imported from a log, which holds no config: {', '.join(map(code, without))}."))
    return said


def _turned(records: Sequence[Record], names: Sequence[str], level: int) -> list[Block]:
    """What was done to each run's knobs, which no config tells."""
    rows = tuple((code(name), f"{event['step']:,}", say({**event["payload"], **event}))
                 for record, name in zip(records, names, strict=True)
                 for event in record.events if event["kind"] == "knob")
    return [Heading("What was turned", level), Table(("run", "from step", "turn"), rows, (1,))] if rows else []


def _recent(record: Record, metric: str) -> float:
    values = record.series(metric)[1]
    return float(values[-WINDOW:].mean()) if len(values) else float("nan")


def _last(record: Record, metric: str) -> str:
    steps, values = record.series(metric)
    return f"{number(values[-1])} at {steps[-1]:,}" if len(steps) else "–"


def _best_validation(record: Record) -> str:
    best = record.best_validation()
    return "–" if best is None else f"{number(best[1])} at {best[0]:,}"


def _worst(record: Record) -> str:
    return ", ".join(f"{n} {level}" for level, n in record.counted().items()) or "none"
