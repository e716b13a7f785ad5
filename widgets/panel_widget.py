"""The panel's FigureWidget: plotly's own, where that costs too much or loses what it is sent.

It leans on names inside plotly that its wire protocol is made of: ``_js2py_traceDeltas`` and ``_js2py_relayout``,
``_send_update_msg``, and the default export of its JavaScript.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import plotly
import plotly.graph_objects as go
from plotly.basedatatypes import Undefined
from plotly.serializers import custom_serializers
from traitlets import Dict, Unicode, observe

from widgets.figures import NOT_OFFERED

# What changes in a trace as a run grows.
MOVING = ("x", "y", "z", "customdata", "text", "mode", "line.color", "marker.symbol", "marker.opacity")

_PLOTLY = Path(plotly.__file__).parent / "package_data" / "widgetbundle.js"

# anywidget gives a widget two seconds to be ready, and no message ever after. A busy browser takes longer to read
# plotly's five megabytes, and the figure would stand still; so what anywidget waits for is this, which reads them.
# Plotly's view listens to its model for good. After its cell is run again the first view, gone from the page,
# still hears of each update, fails in drawing it, and keeps the view that took its place from hearing of it.
_ESM = """
export default () => {
  let shared, plotly, heard = null;  // the model; plotly's widget, once it is read; what the view being made listens to
  const read = async () => {
    const script = URL.createObjectURL(new Blob([shared.get("_script")], { type: "text/javascript" }));
    const { default: made } = await import(script);
    const widget = typeof made === "function" ? await made() : made;  // as anywidget takes it
    URL.revokeObjectURL(script);
    widget.initialize({ model: {
      get: (name) => shared.get(name),
      set: (name, value) => shared.set(name, value),
      save_changes: () => shared.save_changes(),
      on: (event, handler) => { shared.on(event, handler); heard?.push([event, handler]); },
    } });
    return widget;
  };
  return {
    initialize({ model }) {
      shared = model;
      plotly = read();
    },
    async render({ model, el }) {
      const widget = await plotly, own = (heard = []);
      const remove = widget.render({ model, el });
      heard = null;
      return () => { own.forEach(([event, handler]) => shared.off(event, handler)); remove(); };
    },
  };
};
"""


class PanelFigure(go.FigureWidget):
    """A FigureWidget that says when a browser has drawn it, and what part of the step axis a person looks at.

    ``drawn(edit_id)`` and ``zoomed(changes)`` are called on the kernel's thread for messages. ``guard`` is held
    meanwhile, and must be held by whoever sends.
    """

    _esm = _ESM
    _script = Unicode(_PLOTLY.read_text("utf-8")).tag(sync=True)
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
