"""A metric over its last steps in the space of a word: inline SVG, no plotly."""

from __future__ import annotations

import html
import math

import numpy as np

from widgets.series import thin

WIDTH, HEIGHT, POINTS = 168, 34, 84


def spark(steps: np.ndarray, values: np.ndarray, low: float | None = None, high: float | None = None,
          since: int | None = None, label: str = "") -> str:
    """The line of a metric with its healthy band from ``low`` to ``high`` (None: no end on that side).

    What was after step ``since`` is drawn in the element's own ``color``, what was before in a paler one. ``label``
    is what a screen reader says. "" where no value is a number.
    """
    steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    seen = np.isfinite(values)
    if not seen.any():
        return ""
    x, y = (a.astype(np.float64) for a in thin(steps[seen], values[seen], POINTS))
    ends = [end for end in (low, high) if end is not None and math.isfinite(end)]
    bottom, top = min(y.min(), *ends, y.max()), max(y.max(), *ends, y.min())
    room = 0.08 * (top - bottom) or 1.0
    bottom, top = bottom - room, top + room

    def across(step):
        return 1 + (WIDTH - 5) * (step - x[0]) / max(x[-1] - x[0], 1)

    def up(value):
        return HEIGHT * (top - np.clip(value, bottom, top)) / (top - bottom)

    parts = []
    if ends:
        above, below = up(math.inf if high is None else high), up(-math.inf if low is None else low)
        parts.append(f'<rect class="moe-band" x="0" y="{above:.1f}" width="{WIDTH}" height="{below - above:.1f}"/>')
    new = x >= (x[0] if since is None else since)
    joint = max(int(np.argmax(new)) - 1, 0) if new.any() else len(x) - 1  # the two parts of the line meet
    for name, part in (("moe-old", slice(0, joint + 1)), ("moe-new", slice(joint, None))):
        points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(x[part], y[part], strict=True))
        parts.append(f'<polyline class="{name}" points="{points}"/>')
    parts.append(f'<circle cx="{across(x[-1]):.1f}" cy="{up(y[-1]):.1f}" r="2"/>')
    return (f'<svg class="moe-spark" role="img" aria-label="{html.escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}">{"".join(parts)}</svg>')
