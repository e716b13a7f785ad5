"""The note box, and the log under it: what was done and what went wrong, where a person sees it.

Whatever a handler or a background thread prints is shown nowhere, or in whichever cell ran last; this log is
where it belongs. All that it shows is escaped.
"""

from __future__ import annotations

import html
import threading
import time
from collections import deque
from collections.abc import Callable

import ipywidgets as ipw

from widgets.marks import SYMBOLS, say

LINES = 100


class Log:
    """The newest lines, newest first, in one HTML widget fed from a bounded deque. Any thread may write."""

    def __init__(self, lines: int = LINES):
        self.widget = ipw.HTML()
        self._lines: deque[str] = deque(maxlen=lines)
        self._turned: dict[str, tuple[tuple, str, str]] = {}  # knob -> its last turn's place, line, and line if lost
        self._guard = threading.Lock()
        self._write([])

    def write(self, text: str, error: bool = False) -> None:
        """One line of plain text, now."""
        self._write([_line(text, error, time.time())])

    def write_events(self, events: list[dict]) -> None:
        """Events as ``RunStore.read_events`` gives them: turns of knobs, notes, what stopped training.

        A turn whose knob is turned again before its step is said to be superseded.
        """
        lines = []
        for event in sorted(events, key=lambda event: event["id"]):
            said, step = say({**event, **event["payload"]}), f"step {event['step']}"
            if event["kind"] == "knob":
                place, name = (event["branch"], event["step"]), event["payload"]["name"]
                line, lost = (_line(f"{said} · {words}", False, event["applied"])
                              for words in (f"applied at {step}", f"superseded before {step}"))
                if name in self._turned and self._turned[name][0] == place:
                    self._replace(lines, *self._turned[name][1:])
                self._turned[name] = place, line, lost
                lines.append(line)
            else:
                here = "" if said.endswith(step) else f" · {step}"
                lines.append(_line(f"{said}{here}", _is_wrong(event), event["applied"]))
        self._write(lines)

    def guarded(self, handler: Callable, tell: Callable[[str], None] = lambda why: None) -> Callable:
        """``handler``, with what it raises written here: a refused value in its own words, and all else.

        ``tell`` is called with the same words, to say them where the hand is, and with "" before each try.
        """
        def run(*args, **kwargs):
            tell("")
            try:
                return handler(*args, **kwargs)
            except Exception as error:
                tell(str(error))
                known = isinstance(error, ValueError)
                self.write(f"{'refused' if known else type(error).__name__}: {error}", error=True)
        return run

    def _replace(self, newer: list[str], old: str, new: str) -> None:
        """Say a line otherwise, wherever it is: among ``newer``, shown, or gone by now."""
        with self._guard:
            for lines in (newer, self._lines):
                if old in lines:
                    lines[lines.index(old)] = new

    def _write(self, lines: list[str]) -> None:
        with self._guard:
            self._lines += lines
            inside = "".join(reversed(self._lines))
            self.widget.value = f'<div class="moe-log" role="log" aria-label="Log" tabindex="0">{inside}</div>'


class Refusal:
    """Why what was just asked for cannot be, beside the button that asked: ``widget``, and a call with the words."""

    def __init__(self):
        self.widget = ipw.HTML()
        self.widget.add_class("moe-refused")

    def __call__(self, why: str) -> None:
        self.widget.value = f'<span class="moe-error" role="alert">{html.escape(why)}</span>' if why else ""


def _is_wrong(event: dict) -> bool:
    said = event["payload"]
    return event["kind"] not in SYMBOLS or (said.get("state"), said.get("level")) == ("here", "alarm")


def _line(text: str, error: bool, at: float) -> str:
    """``at``: seconds since 1970."""
    clock, mark = time.strftime("%H:%M:%S", time.localtime(at)), ' class="moe-error"' if error else ""
    return f"<div><span>{clock}</span><span{mark}>{html.escape(text)}</span></div>"


class NoteBox:
    """A line of text that is pinned to the run's current step, by its button or the Enter key, which the page hears."""

    def __init__(self, run, log: Log, posted: Callable[[], None] = lambda: None):
        self._run, self._posted = run, posted
        self.text = ipw.Text(placeholder="A note, pinned to the current step", continuous_update=False,
                             tooltip="Note, pinned to the current step")
        self.button = ipw.Button(description="Add note", tooltip="Pin the note to the current step")
        add = log.guarded(self.add)
        self.button.on_click(lambda _: add())
        self.widget = ipw.Box([self.text, self.button])
        self.widget.add_class("moe-note")

    def add(self) -> None:
        """Pin what the box says, and empty it. An empty box is left alone."""
        if self.text.value.strip():
            self._run.note(self.text.value)
            self.text.value = ""
            self._posted()
