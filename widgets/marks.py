"""What happened, on the step axis: every turn of a knob, note and the rest as a mark that says what it was."""

from __future__ import annotations

import html
import math
import textwrap
from dataclasses import dataclass

import numpy as np
import pandas as pd

KNOB_TITLES = {
    "router_temp": "Router temperature",
    "router_noise_std": "Router noise",
    "load_balance_alpha": "Load-balance alpha",
    "router_z_loss_coef": "Router z-loss",
    "capacity_factor": "Capacity factor",
    "bias_update_speed": "Balance-bias speed",
    "lr_scale": "Learning-rate scale",
    "grad_clip": "Gradient clip",
}
# What a mark shows, the first of these that it stands for; a kind that is none of them went wrong, and comes
# before all.
SYMBOLS = {"knob": "diamond", "note": "circle", "branch": "triangle-up", "checkpoint": "square",
           "finding": "triangle-down"}
WRONG = "x"
UNMARKED = ("mirror", "imported")  # housekeeping: the log has it
WRAP = 56  # characters a line of hover text


@dataclass(frozen=True)
class Marks:
    """One mark a step that something happened at: its step, its symbol, and its words as escaped HTML."""

    steps: tuple[int, ...] = ()
    symbols: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, events: pd.DataFrame) -> Marks:
        """From the frame of ``run.events()``. What shares a step shares its mark, the oldest line first."""
        at: dict[int, list[dict]] = {}
        for event in events.to_dict("records"):
            if event["kind"] == "finding" and (event["level"], event["state"]) != ("alarm", "here"):
                continue  # on the charts only the coming of an alarm has a mark; the log has the rest
            if event["kind"] in UNMARKED:
                continue
            at.setdefault(int(event["step"]), []).append(event)
        steps = sorted(at)
        return cls(
            tuple(steps),
            tuple(_symbol({event["kind"] for event in at[step]}) for step in steps),
            tuple("<br>".join([f"<b>step {step}</b>", *(wrap(say(event)) for event in at[step])])
                  for step in steps))

    def trace(self, color: str) -> dict:
        """One scatter trace over a y axis from 0 to 1: each mark at the bottom, a thin line up from it."""
        n = len(self.steps)
        x, y = np.full((n, 3), np.nan, np.float32), np.tile(np.array([0, 1, np.nan], np.float32), (n, 1))
        x[:, :2] = np.array(self.steps, np.float32).reshape(n, 1)
        return {
            "type": "scatter", "mode": "lines+markers", "x": x.ravel(), "y": y.ravel(),
            "text": [part for text in self.texts for part in (text, text, "")],
            "hovertemplate": "%{text}<extra></extra>", "cliponaxis": False, "showlegend": False,
            "line": {"color": color, "width": 1, "dash": "dot"},
            "marker": {"color": color, "size": 8, "opacity": [1, 0, 0] * n,
                       "symbol": [symbol for symbol in self.symbols for _ in range(3)]}}


def say(event: dict) -> str:
    """One event in words, as plain text: nothing in it is HTML yet."""
    if event["kind"] == "finding":
        return f"{'Gone' if event['state'] == 'gone' else event['level'].capitalize()}: {event['text']}"
    if event["kind"] != "knob":
        said = next((event[key] for key in ("text", "name") if isinstance(event.get(key), str)), None)
        kind = event["kind"].capitalize()
        return kind if said is None else f"{kind}: {said}"
    title = KNOB_TITLES.get(event["name"], str(event["name"]))
    if event["mode"] == "follow":
        return f"{title}: follows its schedule"
    if event["mode"] == "hold":
        why = f", in answer to {event['finding']}" if isinstance(event.get("finding"), str) else ""
        return f"{title}: held at {event['value']:.4g}{why}"
    over = event.get("over")
    steps = f" over {int(over)} steps" if over is not None and math.isfinite(over) else ""
    return f"{title}: ramps to {event['value']:.4g}{steps}"


def wrap(text: str) -> str:
    """Plain text as escaped HTML in lines short enough to hover."""
    lines = [piece for line in text.splitlines() for piece in textwrap.wrap(line, WRAP) or [""]]
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def _symbol(kinds: set[str]) -> str:
    return WRONG if kinds - SYMBOLS.keys() else next(s for kind, s in SYMBOLS.items() if kind in kinds)
