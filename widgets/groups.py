"""Each optimizer group's rate and how far its last update moved it, in a section that is closed until asked for."""

from __future__ import annotations

import html

import ipywidgets as ipw
import numpy as np

from moe_core.store import RunStore, Steps
from widgets.spark import spark

RECENT = 200  # steps that the small charts look back
HEAD = ("group", "learning rate", "", "update / weight", "")


class Groups:
    """A section that :meth:`refresh` keeps current while it is open; while it is closed nothing is read or sent."""

    def __init__(self):
        self._table, self._shown = ipw.HTML(), None
        self._table.add_class("moe-groups")
        self.widget = ipw.Accordion([self._table], titles=("Optimizer groups: rates and update sizes",),
                                    selected_index=None)

    def refresh(self, store: RunStore, branch: int, step: int) -> None:
        """Show the newest rows of a branch (an id) at ``step``, if somebody looks."""
        if self.widget.selected_index is None or (branch, step) == self._shown:
            return
        self._shown = branch, step
        self._table.value = table(store.read_steps(branch, max(step - RECENT, 0), shares=False))


def table(rows: Steps) -> str:
    """HTML: a row for each group with its rate, the size of its update relative to its weights, and both over steps.

    The update that a row tells of is that of the step before: the first step of a run has none.
    """
    groups = [name.removeprefix("update/") for name in rows.names if name.startswith("update/")]
    if not groups or not len(rows):
        return '<p>Nothing yet: train a step.</p>'
    lines = []
    for group in groups:
        rate, size = rows.column(f"lr/{group}"), rows.column(f"update/{group}").copy()
        size[rows.steps == 1] = np.nan
        cells = [f"<th>{html.escape(group)}</th>"]
        for values, words in ((rate, "learning rate"), (size, "update relative to weight")):
            said = "–" if np.isnan(values[-1]) else f"{values[-1]:.3g}"
            cells.append(f"<td>{said}</td><td>{spark(rows.steps, values, label=f'{group}: {words}, now {said}')}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{words}</th>" for words in HEAD)
    return f'<table><tr>{head}</tr>{"".join(lines)}</table>'
