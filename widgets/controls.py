"""One row for each knob: what it is set to, what the schedule says, and since which step that holds."""

from __future__ import annotations

import html
import math
import threading
from collections.abc import Callable

import ipywidgets as ipw

from moe_core.config import RunConfig
from moe_core.knobs import KnobError, check_turn
from widgets.marks import KNOB_TITLES
from widgets.notes import Log

MODES = ("follow", "hold", "ramp")
SLIDER_STEPS = 400


class KnobControl:
    """Slider, number, mode and ramp length of one knob, and a line that says what it is doing.

    A person's hand only enqueues: the run takes it up at its next step boundary, and until then the row says
    ``pending``. :meth:`refresh` brings the row up to date with the run, whoever turned the knob.
    """

    def __init__(self, knob, log: Log, turned: Callable[[], None] = lambda: None, help: str = ""):
        """``knob``: one of ``run.knobs``. ``turned`` is called after each turn by hand. ``help``: under the row."""
        self.knob, self._log, self._turned = knob, log, turned
        self.title = KNOB_TITLES.get(knob.name, knob.name)
        low, high = knob.slider
        self.slider = ipw.FloatSlider(
            description=self.title, min=low, max=high, step=_nice((high - low) / SLIDER_STEPS), readout=False,
            continuous_update=False, value=low, tooltip=help or self.title)
        self.number = ipw.FloatText(step=self.slider.step, continuous_update=False,
                                    tooltip=f"{self.title}: value")
        self.mode = ipw.Dropdown(options=MODES, tooltip=f"{self.title}: follow the schedule, hold or ramp")
        self.over = ipw.FloatText(value=100, step=1, continuous_update=False,
                                  tooltip=f"{self.title}: length of the ramp in steps")
        self.says = ipw.HTML()
        self.says.add_class("moe-knob-text")
        parts = [self.slider, self.number, self.mode, self.over, self.says]
        if help:
            parts.append(ipw.HTML(html.escape(help)))
            parts[-1].add_class("moe-help")
        self.widget = ipw.Box(parts)
        self.widget.add_class("moe-knob")

        self._own: dict[ipw.Widget, object] = {}  # what this class set last, which is nobody's wish
        self._aiming = False  # "ramp" is chosen, its target is not
        self._refused, self._refused_at = "", None  # why the last turn by hand was, and how the knob stood
        self._guard = threading.RLock()
        self.refresh()
        for widget, handler in ((self.slider, self._aim), (self.number, self._aim), (self.mode, self._choose),
                                (self.over, self._stretch)):
            widget.observe(self._by_hand(handler), "value")

    def refresh(self, focused: bool = False) -> None:
        """Show what the run says of the knob. Any thread. ``focused``: a person is at the row."""
        with self._guard:
            knob, pending = self.knob, self.knob.pending
            if self._refused_at != self._stands():
                self._refused = ""
            if not (pending or self._aiming):
                self._put(self.mode, knob.mode)
                if knob.mode != "follow":
                    self._put_value(knob.target)
                    if knob.over is not None:
                        self._put(self.over, knob.over)
                elif not focused:
                    self._put_value(knob.value)
            self.over.layout.visibility = "visible" if self.mode.value == "ramp" else "hidden"
            self.says.value = (f'<div class="moe-knob-says"><span>now <b>{knob.value:.3g}</b></span>'
                               f"<span>schedule {knob.scheduled:.3g}</span>{self._status(pending)}</div>")

    @property
    def waits(self) -> bool:
        """Whether the row says ``pending``."""
        return "(pending)" in self.says.value

    def _stands(self) -> tuple:
        return self.knob.pending, self.knob.mode, self.knob.target, self.knob.applied_at

    def _status(self, pending: bool) -> str:
        if self._refused:
            short = html.escape(self._refused.rpartition(": ")[2].replace("must be a number from", "must be"))
            return f'<span class="moe-error" role="alert" title="{html.escape(self._refused)}">{short}</span>'
        if pending:
            return '<span class="moe-pending" title="Waits for the next step boundary">(pending)</span>'
        if self._aiming:
            return "<span>set the value to ramp to</span>"
        if self.knob.applied_at is None:
            return "<span></span>"
        return f'<span class="moe-applied">applied at step {self.knob.applied_at}</span>'

    # ---- by hand -----------------------------------------------------------------------------------------

    def _by_hand(self, handler: Callable) -> Callable:
        def changed(change):
            # Compared and not flagged: the notice of a change may come on another thread than the change.
            if self._own.get(change.owner) == change.new:
                return
            self._own.pop(change.owner, None)
            guarded(change.new)
            self.refresh(focused=True)
            self._turned()
        guarded = self._log.guarded(handler, self._refuse)
        return changed

    def _refuse(self, why: str) -> None:
        self._refused, self._refused_at = why, self._stands()

    def _aim(self, value: float) -> None:
        value = float(f"{value:.10g}")  # a slider's steps add up to 1.7600000000000005
        try:
            if self.mode.value == "ramp":
                self.knob.ramp(to=value, over=whole(self.over.value))
            else:
                self.knob.hold(value)
        except KnobError:
            self._put_value(self.knob.value if self.knob.target is None else self.knob.target)
            raise
        self._aiming = False
        self._put_value(value)
        self._put(self.mode, "ramp" if self.mode.value == "ramp" else "hold")

    def _choose(self, mode: str) -> None:
        self._aiming = mode == "ramp"
        if mode == "follow":
            self.knob.follow()
        elif mode == "hold":
            self.knob.hold(self.knob.value)

    def _stretch(self, over: float) -> None:
        if self.mode.value == "ramp" and not self._aiming:
            self.knob.ramp(to=self._value, over=whole(over))
        else:
            check_turn(self.knob.name, "ramp", self.knob.low, whole(over))

    def _put_value(self, value: float) -> None:
        self._value, value = value, float(f"{value:.4g}")  # all of its digits, and those that fit
        self.slider.max = max(self.slider.max, value)  # a typed value may lie beyond what a slider offers
        self.slider.min = min(self.slider.min, value)
        self._put(self.slider, value)
        self._put(self.number, value)

    def _put(self, widget: ipw.Widget, value) -> None:
        if widget.value != value:
            self._own[widget] = value
            widget.value = value


def help_of(name: str, config: RunConfig) -> str:
    """What a person may need to know of a knob of this run; "" for nothing."""
    router = config.router
    if name != "router_temp" or router.uses_bias or router.routing != "token":
        return ""  # against a bias, or over tokens, temperature does change who is picked
    picked = "a top-1 choice" if router.top_k == 1 else "which experts are picked"
    return f"Without noise, temperature never changes {picked}, only weight and gradient."


def whole(value: float) -> int | float:
    """A number that was typed, as an int where it is one; ``run`` refuses any other in its own words.

    A box for integers would make 15 of a typed 1.5, and 0 of -3, without a word.
    """
    return int(value) if float(value).is_integer() else value


def _nice(step: float) -> float:
    """The nearest of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return float(f"{min((1, 2, 5, 10), key=lambda n: abs(n * power - step)) * power:.1g}")
