"""W&B's CSV export: text in, drafts of runs out, and a tally of what was passed over."""

from __future__ import annotations

import csv
import io
import math

from moe_core.old_forms import BEFORE, Draft, Tally
from moe_core.storage.schema import STEP_MAX


def is_wandb(text: str) -> bool:
    """Whether a text is a CSV with a ``Step`` column."""
    try:
        header = next(csv.reader([text.lstrip().partition("\n")[0].rstrip("\r")]), [])
    except csv.Error:  # such as the carriage returns of a progress bar
        return False
    return len(header) > 1 and "Step" in header


def read_wandb(text: str, drafts: dict[str, Draft], tally: Tally, shift: int) -> None:
    """Enter a W&B CSV export into ``drafts``, one for each W&B run; several exports of one run come together.

    The columns ``__MIN`` and ``__MAX`` are what W&B drew around a line, not logged values: passed over.
    """
    lines = csv.reader(io.StringIO(text.lstrip()))
    header = next(lines)
    columns: dict[int, tuple[Draft, str]] = {}
    for at, title in enumerate(header):
        name, dash, metric = title.rpartition(" - ")
        base = title.removesuffix("__MIN").removesuffix("__MAX")
        if title == "Step":
            continue
        if base != title and base in header:
            tally.add("columns of __MIN and __MAX", title)
        elif not dash or (metric.startswith("_") and metric != "_timestamp"):
            tally.add("other columns", title)
        else:
            columns[at] = drafts.setdefault(name, Draft(name, "W&B export")), metric
    place = header.index("Step")
    for cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        said = ",".join(cells)
        if len(cells) != len(header):
            tally.add("read in part, or cut short", said)
            continue
        number = _number(cells[place])
        if number is None or number % 1 or abs(number) > STEP_MAX:  # NaN % 1 is NaN, which counts as true
            tally.add("rows without a whole step", said)
            continue
        step = int(number) + shift
        for at, (draft, metric) in columns.items():
            if cells[at].strip():
                _cell(draft, metric, step, cells[at], tally)


def _cell(draft: Draft, metric: str, step: int, cell: str, tally: Tally) -> None:
    value = _number(cell)
    if value is None:
        return tally.add("cells that are no number", f"{draft.name} - {metric}, step {step}: {cell}")
    if metric == "_timestamp":
        draft.times |= {step: value} if math.isfinite(value) else {}
    elif math.isnan(value):
        draft.say(f"the export says {metric} NaN at step {step}", max(step, 0))
    elif step < 1:
        tally.add(BEFORE, f"{metric} {value:g}")
        draft.say(f"{metric} {value:g} at step {step}", 0, {metric: value})
    elif draft.now.rows.setdefault(step, {}).setdefault(metric, value) != value:
        tally.add("other values for the same step and metric, the first one stays",
                  f"{draft.name} - {metric}, step {step}: {cell}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
