"""The button that has the experiment's report written while everything else goes on."""

from __future__ import annotations

import html
import threading
from pathlib import Path

import ipywidgets as ipw

from widgets.notes import Log

FILE = "report.html"


class WriteUp:
    """Report: writes ``report.html`` into the run's directory in a thread of its own, and says where it lies."""

    def __init__(self, run, log: Log):
        self._run, self._log = run, log
        self.button = ipw.Button(description="Report", tooltip=f"Write {FILE} into the run's directory")
        self.says = ipw.HTML()
        self.says.add_class("moe-write-up")
        self.button.on_click(lambda _: self.start())

    def start(self) -> threading.Thread:
        """Begin to write; returns the thread that does."""
        self.button.disabled = True
        self.says.value = "writing the report …"
        worker = threading.Thread(target=self._write, name="moe-report", daemon=True)
        worker.start()
        return worker

    def _write(self) -> None:
        path = Path(self._run.path) / FILE
        try:
            self._run.report(path)
            self.says.value = f"report: <code>{html.escape(str(path))}</code>"
            self._log.write(f"report written: {path.resolve()}")
        except Exception as error:  # in a thread of its own nobody else would hear of it
            self.says.value = '<span class="moe-error" role="alert">no report, see the log</span>'
            self._log.write(f"report: {type(error).__name__}: {error}", error=True)
        finally:
            self.button.disabled = False
