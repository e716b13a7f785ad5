"""An experiment written up from its store: ``write(run, "first.html")``, also .md and .ipynb.

A reader of the store is all that it takes, so a run is written up while it trains, and an imported one as well.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moe_core import gates as gate_lines
from moe_core.inspect import Inspection
from widgets import report_html, report_markdown, report_notebook
from widgets.record import Record
from widgets.report_blocks import Document
from widgets.report_contents import document
from widgets.report_pictures import PictureError, pictures

FORMS = (".html", ".md", ".ipynb")


class ReportError(ValueError):
    """A report that cannot be: one line with the field, the value and what would be right."""


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
    out = _checked(out)
    wanted = [gate_lines.parse(line) for line in ([gates] if isinstance(gates, str) else gates)]
    record = Record.read(run)
    for step in snapshots or ():
        if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= record.last_step:
            raise ReportError(f"snapshots = {step!r}: must be a step of this run, 1 to {record.last_step}")
    if isinstance(baselines, str | os.PathLike):
        baselines = [baselines]
    others = [Record.read(baseline, told=False) for baseline in baselines]
    answers = gate_lines.check(wanted, record.metrics)
    whole = document(record, answers, others, [gate_lines.check(wanted, other.metrics) for other in others],
                     snapshots, title, inspection)
    return save(whole, [record, *others], out, static=static)


def save(whole: Document, records: Sequence[Record], out: str | os.PathLike, static: bool = False) -> Path:
    """A document as the file that its name's end asks for. Raises ReportError, PictureError."""
    out = _checked(out)
    if out.suffix == ".html":
        _put(out, report_html.render(whole, pictures(whole.pictures(), "svg") if static else None))
    elif out.suffix == ".md":
        folder = out.with_name(f"{out.stem}_files")
        drawn = pictures(whole.pictures(), "png")
        if drawn:
            folder.mkdir(exist_ok=True)
        for name, png in drawn.items():
            _put(folder / f"{name}.png", png)
        _put(out, report_markdown.render(whole, folder.name))
    else:
        try:
            drawn = pictures(whole.pictures(), "png")
        except PictureError:
            drawn = {}  # its cells draw them when they run
        _put(out, report_notebook.render(whole, records, out, drawn))
    return out


def _checked(out: str | os.PathLike) -> Path:
    out = Path(out)
    if out.suffix not in FORMS:
        raise ReportError(f"out = {str(out)!r}: must end in {', '.join(FORMS)}")
    if not out.parent.is_dir():
        raise ReportError(f"out = {str(out)!r}: there is no folder {str(out.parent)!r}")
    return out


def _put(path: Path, content: str | bytes) -> None:
    """Whole or not at all."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode(errors="replace") if isinstance(content, str) else content)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
