"""An experiment written up from its store: ``write(run, "first.html")``, also .md and .ipynb.

A reader of the store is all that it takes, so a run is written up while it trains, and an imported one as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moe_core import gates as gate_lines
from moe_core.checked import is_integer, plain
from moe_core.inspect import Inspection
from widgets.record import Record
from widgets.report_contents import document
from widgets.report_files import ReportError, checked, save

__all__ = ["ReportError", "write"]

def write(run, out: str | os.PathLike, *, static: bool = False, gates: Sequence[str] = (), baselines: Sequence = (),
          snapshots: Sequence[int] | None = None, title: str | None = None,
          inspection: Inspection | None = None) -> Path:
    """Write ``run`` up in ``out``, an .html, .md or .ipynb file, and return its path.

    ``run``, ``baselines``: runs, stores, or paths of runs, which are only read. ``gates``: lines of
    :mod:`moe_core.gates`. ``snapshots``: steps (None: about each quarter of the way). ``static``: an HTML without
    script, its charts as SVG. ``inspection``: what ``run.inspect()`` found, for a section on the experts.

    Raises ReportError, GateError or StoreError before anything is written, PictureError where pictures are needed
    and cannot be made.
    """
    out = checked(out)
    wanted = [gate_lines.parse(line) for line in ([gates] if isinstance(gates, str) else gates)]
    record = Record.read(run)
    gate_lines.refuse_unknown(wanted, record.metrics)
    for step in snapshots or ():
        if not record.last_step:
            raise ReportError(f"snapshots = {step!r}: must be None, this run has no steps yet")
        if not is_integer(plain(step), 1, record.last_step):
            raise ReportError(f"snapshots = {step!r}: must be a step of this run, 1 to {record.last_step}")
    if isinstance(baselines, str | os.PathLike):
        baselines = [baselines]
    others = [Record.read(baseline, told=False) for baseline in baselines]
    answers = gate_lines.check(wanted, record.metrics)
    whole = document(record, answers, others, [gate_lines.check(wanted, other.metrics) for other in others],
                     snapshots, title, inspection)
    return save(whole, [record, *others], out, static=static)
