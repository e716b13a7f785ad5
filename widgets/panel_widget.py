"""The panel's FigureWidget: plotly's own, where that costs too much or loses what it is sent.

It leans on names inside plotly that its wire protocol is made of: ``_js2py_traceDeltas`` and ``_js2py_relayout``,
``_send_update_msg``, and the default export of its JavaScript.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import plotly
import plotly.graph_objects as go
from plotly.basedatatypes import Undefined
from plotly.serializers import custom_serializers
from traitlets import Dict, observe

from widgets.figures import NOT_OFFERED

# What changes in a trace as a run grows.
MOVING = ("x", "y", "z", "customdata", "text", "mode", "line.color", "marker.symbol", "marker.opacity")

# Plotly's view listens to its model for good. After its cell is run again the first view, gone from the page,
# still hears of each update, fails in drawing it, and keeps the view that took its place from hearing of it.
_LEAVE = """
export default () => {
  const widget = PLOTLY();
  let shared, heard = null;  // the model; what the view that is being made listens to
  return {
    initialize({ model }) {
      shared = model;
      widget.initialize({ model: {
        get: (name) => model.get(name),
        set: (name, value) => model.set(name, value),
        save_changes: () => model.save_changes(),
        on: (event, handler) => { model.on(event, handler); heard?.push([event, handler]); },
      } });
    },
    render({ model, el }) {
      const own = (heard = []);
      const remove = widget.render({ model, el });
      heard = null;
      return () => { own.forEach(([event, handler]) => shared.off(event, handler)); remove(); };
    },
  };
};
"""


def _bundle() -> str:
    """Plotly's JavaScript with views that stop listening when they leave the page; as it is, if it is unlike."""
    code = (Path(plotly.__file__).parent / "package_data" / "widgetbundle.js").read_text("utf-8")
    exports = list(re.finditer(r"export\s*\{([^{}]*?),?\s*([\w$]+) as default\s*\};?", code[-20_000:]))
    if len(exports) != 1:
        return code
    found, start = exports[0], len(code) - 20_000
    return (code[: start + found.start()] + f"export {{{found[1]}}};" + _LEAVE.replace("PLOTLY", found[2])
            + code[start + found.end() :])


class PanelFigure(go.FigureWidget):
    """A FigureWidget that says when a browser has drawn it, and what part of the step axis a person looks at.

    ``drawn(edit_id)`` and ``zoomed(changes)`` are called on the kernel's thread for messages. ``guard`` is held
    meanwhile, and must be held by whoever sends.
    """

    _esm = _bundle()
    _set_trace_uid = False  # the charts' own say what a trace is
    _js2py_traceDeltas = Dict(allow_none=True).tag(sync=True, echo_update=False, **custom_serializers)

    def __init__(self, traces: list[dict], layout: dict, drawn: Callable[[int], None],
                 zoomed: Callable[[dict], None]):
        self._guard, self._drawn, self._zoomed = threading.RLock(), drawn, zoomed
        super().__init__(traces, layout)
        self._view_count = None  # nobody asks; a page would send it while it takes a closed figure off
        self._config = {"displaylogo": False, "showSendToCloud": False,
                        "modeBarButtonsToRemove": list(NOT_OFFERED)}

    @property
    def guard(self) -> threading.RLock:
        return self._guard

    def set_state(self, sync_data):
        # While a message is taken in, traitlets holds all notifications of this object, those of another
        # thread's assignments included, and merges them: an update sent meanwhile would be lost.
        with self._guard:
            super().set_state(sync_data)

    @observe("_js2py_traceDeltas")
    def _handler_js2py_traceDeltas(self, change):
        # Plotly's own handler goes on to copy the defaults of every trace into this process, which trains.
        if change["new"]:
            self._drawn(change["new"]["trace_edit_id"])
            self._js2py_traceDeltas = None

    @observe("_js2py_relayout")
    def _handler_js2py_relayout(self, change):
        if change["new"]:
            self._zoomed(change["new"]["relayout_data"])
        super()._handler_js2py_relayout(change)

    def send_whole(self) -> None:
        """Send everything that moves. Plotly sends what has changed, which a page loaded since cannot build on."""
        restyle = {path: [_at(trace, path) for trace in self._data] for path in MOVING}
        titles = {f"annotations[{i}].text": note.text for i, note in enumerate(self.layout.annotations)}
        self._send_update_msg(restyle, titles, list(range(len(self.data))))

    def keep(self) -> None:
        """Make what is shown the state that a page gets when it is loaded anew."""
        with self._guard, self.hold_sync():
            self._widget_data = deepcopy(self._data)
            self._widget_layout = deepcopy(self._layout)


def _at(trace: dict, path: str):
    """What a trace has at a dotted path; plotly's mark for nothing where it has no such thing."""
    for key in path.split("."):
        trace = trace.get(key, Undefined) if isinstance(trace, dict) else Undefined
    return trace
