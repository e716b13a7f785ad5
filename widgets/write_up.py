"""The button that has the experiment's report written while everything else goes on."""

from __future__ import annotations

import html
from pathlib import Path

from widgets.errand import Errand
from widgets.notes import Log

FILE = "report.html"


def write_up(run, log: Log) -> Errand:
    """Report: writes ``report.html`` into the run's directory, and says where it lies."""
    path = Path(run.path) / FILE

    def work() -> str:
        run.report(path)
        log.write(f"report written: {path.resolve()}")
        return f"report: <code>{html.escape(str(path))}</code>"
    return Errand("Report", f"Write {FILE} into the run's directory", "writing the report …", work, log)
