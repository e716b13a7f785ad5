"""The figures of a report, by name: the very charts of the panel, each on a figure of its own."""

from __future__ import annotations

import plotly.graph_objects as go

from widgets import charts
from widgets.figures import figure
from widgets.record import Record

WIDE, NARROW = 1060, 520  # pixels that they are laid out for
ALTS = {"loss": "Train and validation loss over steps", "experts": "Each expert's share of the assignments over steps",
        "utilisation": "Each expert's share at the last step", "layers": "Served share of every expert in every layer",
        "router": "Router entropy and top-1 probability over steps",
        "load": "Largest demand of one expert and dropped share over steps",
        "biases": "Balance bias of each expert over steps",
        "gradient": "Gradient norm and share of clipped steps over steps"}


def draw(record: Record) -> dict[str, go.Figure]:
    """Every figure that the run has data for: experts, loss, router, load, biases, gradient, utilisation, layers."""
    metrics, shares, marks, others = record.metrics, record.shares, record.marks, record.others
    drawn = {}
    if shares is not None:
        drawn["experts"] = charts.expert_lines(shares, top_k=record.top_k)
    if "train/loss" in metrics or "val/loss" in metrics:
        drawn["loss"] = charts.loss(metrics, others=others)
    if shares is not None:
        drawn |= {"router": charts.confidence(metrics, record.n_experts, others=others, top_k=record.top_k),
                  "load": charts.concentration(metrics, record.n_experts, others=others, top_k=record.top_k)}
    if shares is not None and "router/bias_max" in metrics:
        drawn["biases"] = charts.biases(metrics, record.n_experts)
    if "grad/norm" in metrics:
        drawn["gradient"] = charts.clipping(metrics)
    if shares is not None:
        drawn |= {"utilisation": charts.utilisation(shares), "layers": charts.layer_heatmap(shares)}
    return {name: figure(chart, marks, WIDE if name == "experts" else NARROW) for name, chart in drawn.items()}
