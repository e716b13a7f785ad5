"""A button whose work takes seconds: done in a thread of its own, so that everything else goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import ipywidgets as ipw

from widgets.notes import Log


class Errand:
    """``button`` starts ``work``, and ``says`` tells how it goes; what goes wrong stands in the log."""

    def __init__(self, words: str, tooltip: str, busy: str, work: Callable[[], str], log: Log):
        """``busy``: said while it goes on. ``work`` returns the HTML that is said when it is done."""
        self._name, self._busy, self._work, self._log = words.lower(), busy, work, log
        self.button = ipw.Button(description=words, tooltip=tooltip)
        self.says = ipw.HTML()
        self.says.add_class("moe-errand")
        self.button.on_click(lambda _: self.start())

    def start(self) -> threading.Thread:
        """Begin; returns the thread that does it."""
        self.button.disabled = True
        self.says.value = self._busy
        worker = threading.Thread(target=self._go, name=f"moe-{self._name.replace(' ', '-')}", daemon=True)
        worker.start()
        return worker

    def _go(self) -> None:
        try:
            said = self._work()
        except Exception as error:  # in a thread of its own nobody else would hear of it
            self._log.write(f"{self._name}: {type(error).__name__}: {error}", error=True)
            said = '<span class="moe-error" role="alert">failed; see the log</span>'
        self.button.disabled = False
        self.says.value = said  # last: what it speaks of is there
