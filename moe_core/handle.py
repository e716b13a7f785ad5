"""A run's knobs in a user's hand: what each says now, and turning it.

Turning enqueues a command, which the run's session applies at the next step boundary.
"""

from __future__ import annotations

from moe_core.checked import plain
from moe_core.knobs import Knob, check_turn, no_such_knob
from moe_core.session import Command


class KnobHandle:
    """The knob ``name`` of ``run``, which is asked how it stands and for a turn of it."""

    def __init__(self, run, name: str):
        self._run, self.name = run, name

    @property
    def _knob(self) -> Knob:
        return self._run._knobs[self.name]

    @property
    def low(self) -> float:
        """The least value that is accepted."""
        return self._knob.spec.low

    @property
    def high(self) -> float:
        """The greatest value that is accepted."""
        return self._knob.spec.high

    @property
    def slider(self) -> tuple[float, float]:
        """The range worth offering on a slider."""
        return self._knob.spec.slider

    @property
    def mode(self) -> str:
        """"follow", "hold" or "ramp"."""
        return self._knob.setting.mode

    @property
    def target(self) -> float | None:
        """What is held or ramped to; None while the schedule is followed."""
        return self._knob.setting.value

    @property
    def over(self) -> int | None:
        """The length of a ramp in steps; None in other modes."""
        return self._knob.setting.over

    @property
    def value(self) -> float:
        """What the next step will use."""
        return self._knob.at(self._run.current_step + 1)

    @property
    def scheduled(self) -> float:
        """What the schedule says for the next step."""
        return self._knob.scheduled(self._run.current_step + 1)

    @property
    def pending(self) -> bool:
        """Whether a turn of this knob waits for a step boundary."""
        return any(c.kind == "knob" and c.payload["name"] == self.name for c in self._run.session.pending())

    @property
    def applied_at(self) -> int | None:
        """The first step that the last turn acted on; None if it was never turned."""
        return self._knob.setting.since

    def follow(self) -> None:
        """Go back to the schedule."""
        self._post("follow")

    def hold(self, value: float, finding: str | None = None, why: str | None = None) -> None:
        """Stay at ``value``. Raises KnobError out of range. ``finding`` and ``why`` are for the log: the rule of the
        finding that this answers, and its text.
        """
        self._post("hold", finding, why, value=value)

    def ramp(self, to: float, over: int) -> None:
        """Move linearly to ``to`` in ``over`` steps, then stay there. Raises KnobError out of range."""
        self._post("ramp", value=to, over=over)

    def _post(self, mode: str, finding: str | None = None, why: str | None = None, **how) -> None:
        how = {key: plain(value) for key, value in how.items()}
        check_turn(self.name, mode, **how)
        said = {key: text for key, text in (("finding", finding), ("why", why)) if text is not None}
        self._run.session.post(Command("knob", {"name": self.name, "mode": mode, **how, **said}))

    def __repr__(self) -> str:
        held = "" if self.target is None else f" {self.target:g}"
        return f"{self.name} = {self.value:g} ({self.mode}{held}; schedule {self.scheduled:g})"


class KnobHandles(dict[str, KnobHandle]):
    """The handles by name; a name that is none raises KnobError with those that are."""

    def __missing__(self, name: str):
        raise no_such_knob(name, self)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.values()))
