"""What happened, on the step axis: every turn of a knob, note and the rest as a mark that says what it was."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
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
KEY = "Marks on the step axis: ◆ knob turned, ● note, ▲ new branch, ■ checkpoint, ▼ alarm, ✕ went wrong"
FEW = 40  # marks whose lines are drawn in full color
WRAP, LINES, MOST = 56, 5, 6  # characters a line of hover text, lines of one event, events that are told of a mark


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
        records = events.to_dict("records")
        for event, lost in zip(records, superseded(records), strict=True):
            if event["kind"] == "finding" and (event["level"], event["state"]) != ("alarm", "here"):
                continue  # on the charts only the coming of an alarm has a mark; the log has the rest
            if event["kind"] in UNMARKED:
                continue
            at.setdefault(int(event["step"]), []).append(event | {"superseded": lost})
        steps = sorted(at)
        return cls(
            tuple(steps),
            tuple(_symbol({event["kind"] for event in at[step]}) for step in steps),
            tuple("<br>".join([f"<b>step {step}</b>", *_told(at[step])]) for step in steps))

    def trace(self, color: str) -> dict:
        """One scatter trace over a y axis from 0 to 1: each mark at the bottom, a thin line up from it.

        ``color``: #rrggbb. The lines of many marks are paler: they would hide what stands behind them.
        """
        n = len(self.steps)
        pale = f"{color}{round(255 * min(1, max(FEW / max(n, 1), 0.15))):02x}"
        x, y = np.full((n, 3), np.nan, np.float32), np.tile(np.array([0, 1, np.nan], np.float32), (n, 1))
        x[:, :2] = np.array(self.steps, np.float32).reshape(n, 1)
        return {
            "type": "scatter", "mode": "lines+markers", "x": x.ravel(), "y": y.ravel(),
            "text": [part for text in self.texts for part in (text, text, "")],
            "hovertemplate": "%{text}<extra></extra>", "cliponaxis": False, "showlegend": False,
            "line": {"color": pale, "width": 1, "dash": "dot"},
            "marker": {"color": color, "size": 8, "opacity": [1, 0, 0] * n,
                       "symbol": [symbol for symbol in self.symbols for _ in range(3)]}}


def say(event: dict) -> str:
    """One event in words, as plain text: nothing in it is HTML yet. ``superseded``: its knob was turned again."""
    if event["kind"] == "finding":
        return f"{'Gone' if event['state'] == 'gone' else event['level'].capitalize()}: {event['text']}"
    if event["kind"] != "knob":
        said = next((event[key] for key in ("text", "name") if isinstance(event.get(key), str)), None)
        kind = {"nonfinite": "Not finite"}.get(event["kind"], event["kind"].capitalize())
        if event["kind"] == "branch" and said is not None:  # says that it is one: "branch from-4 from step 4"
            return said[:1].upper() + said[1:]
        if event["kind"] == "nonfinite" and said is not None:
            said = said.partition("Error: ")[2] or said
        return kind if said is None or said == f"step {event.get('step')}" else f"{kind}: {said}"
    if event.get("superseded"):
        return f"{say(event | {'superseded': False})} (superseded before the step)"
    title = KNOB_TITLES.get(event["name"], str(event["name"]))
    if event["mode"] == "follow":
        return f"{title}: follows its schedule"
    if event["mode"] == "hold":
        why = f", in answer to {event['finding']}" if isinstance(event.get("finding"), str) else ""
        return f"{title}: held at {event['value']:.4g}{why}"
    over = event.get("over")
    steps = f" over {int(over)} steps" if over is not None and math.isfinite(over) else ""
    return f"{title}: ramps to {event['value']:.4g}{steps}"


def superseded(events: Sequence[dict]) -> list[bool]:
    """Which of these events, in the order they came, are turns of a knob that was turned again before their step.

    An event is a dict with kind, step and, of a turn, name.
    """
    turns = [(event["step"], event["name"]) if event["kind"] == "knob" else None for event in events]
    last = {turn: k for k, turn in enumerate(turns)}
    return [turn is not None and last[turn] != k for k, turn in enumerate(turns)]


def wrap(text: str) -> str:
    """Plain text as escaped HTML in a few lines short enough to hover; what is longer is cut."""
    lines = [piece for line in text.splitlines() for piece in textwrap.wrap(line, WRAP) or [""]]
    lines = lines if len(lines) <= LINES else [*lines[: LINES - 1], "…"]
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def _told(events: list[dict]) -> list[str]:
    """Lines of the hover text of what shares a step: a page shows none that is taller than its chart."""
    more = len(events) - MOST
    return [wrap(say(event)) for event in events[:MOST]] + [f"and {more} more, in the log"] * (more > 0)


def _symbol(kinds: set[str]) -> str:
    return WRONG if kinds - SYMBOLS.keys() else next(s for kind, s in SYMBOLS.items() if kind in kinds)
