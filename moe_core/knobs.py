"""What can be turned while a model trains, and what each knob says at each step.

A knob follows its schedule, holds a value, or ramps to one and holds it there. Its value at a step is a
pure function of its setting and the step, so a resumed or replayed run reads the same numbers.
:class:`Knobs` mirrors the values into 0-D tensors: the model reads those, so that turning a knob
recompiles nothing and waits for no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch

from moe_core.checked import is_integer, is_number, plain
from moe_core.config import RunConfig


class KnobError(ValueError):
    """A turn that cannot be: one line with the knob, the value and what would be right."""


def no_such_knob(name: str, known: Iterable[str]) -> KnobError:
    """What to raise for a knob that a run does not have; ``known``: those that it has."""
    return KnobError(f"{name}: unknown knob; this run's knobs are {', '.join(known)}")


@dataclass(frozen=True)
class KnobSpec:
    """What a knob is: the values it accepts, the range a slider offers, and the metric that records it.

    In the knob's own unit: noise in tempered logits, ``bias_update_speed`` in these per step, ``capacity_factor`` in
    fair shares, ``grad_clip`` a gradient's norm; the temperature divides and the others are factors.
    """

    name: str
    low: float
    high: float
    slider: tuple[float, float]
    metric: str
    routes: bool  # acts on the router, so a dense model has no such knob


KNOBS = {spec.name: spec for spec in (
    KnobSpec("router_temp", 0.01, 100.0, (0.1, 4.0), "router/temp", True),
    KnobSpec("router_noise_std", 0.0, 100.0, (0.0, 2.0), "router/noise_std", True),
    KnobSpec("load_balance_alpha", 0.0, 100.0, (0.0, 0.5), "router/load_balance_alpha", True),
    KnobSpec("bias_update_speed", 0.0, 10.0, (0.0, 0.01), "router/bias_update_speed", True),
    KnobSpec("router_z_loss_coef", 0.0, 10.0, (0.0, 0.02), "router/z_loss_coef", True),
    KnobSpec("capacity_factor", 0.01, 1000.0, (0.25, 4.0), "router/capacity_factor", True),
    KnobSpec("lr_scale", 0.0, 100.0, (0.0, 3.0), "lr_scale", False),
    KnobSpec("grad_clip", 1e-4, 1e6, (0.1, 5.0), "grad/clip", False),
)}


@dataclass(frozen=True)
class Setting:
    """How a knob is set, and from which step on (``since``; None: never turned). A ramp goes from ``start``."""

    mode: str = "follow"
    value: float | None = None
    over: int | None = None
    start: float | None = None
    since: int | None = None


class Knob:
    """One knob: ``at(step)`` is its value for the optimizer step with that number (the first is 1)."""

    def __init__(self, spec: KnobSpec, schedule: Callable[[int], float]):
        self.spec = spec
        self.scheduled = schedule
        self.setting = Setting()

    def at(self, step: int) -> float:
        """The value for optimizer step ``step``."""
        s = self.setting
        if s.mode == "follow":
            return self.scheduled(step)
        if s.mode == "hold" or step - s.since + 1 >= s.over:
            return s.value
        return s.start + (s.value - s.start) * (step - s.since + 1) / s.over

    def turn(self, mode: str, value: float | None, over: int | None, step: int) -> None:
        """Set the knob from ``step`` on. The request must have passed :func:`check_turn`."""
        start = self.at(max(step - 1, 1)) if mode == "ramp" else None  # no schedule says anything of a step 0
        self.setting = Setting(mode, None if value is None else float(value), over, start, since=step)


def check_turn(name: str, mode: str, value: float | None = None, over: int | None = None) -> None:
    """Refuse what no knob can do, where it is asked. Raises KnobError."""
    spec = KNOBS[name]
    if mode not in ("follow", "hold", "ramp"):
        raise KnobError(f"{name}: mode = {mode!r}: must be 'follow', 'hold' or 'ramp'")
    if mode == "follow":
        if value is not None or over is not None:
            raise KnobError(f"{name}: follow takes no value; the schedule says what it is")
        return
    if not is_number(plain(value)) or not spec.low <= value <= spec.high:
        raise KnobError(f"{name} = {value!r}: must be a number from {spec.low:g} to {spec.high:g}")
    if mode == "ramp" and not is_integer(over, 1):
        raise KnobError(f"{name}: over = {over!r}: must be an integer, at least 1")


def _linear(first: float, last: float, iters: int) -> Callable[[int], float]:
    """``first`` at step 1, ``last`` from step ``iters + 1`` on."""
    return lambda step: last if step > iters else first + (last - first) * (step - 1) / iters


def _constant(value: float) -> Callable[[int], float]:
    return lambda step: value


class Knobs(dict[str, Knob]):
    """Every knob that this run has, by name, and their present values as 0-D float32 tensors."""

    def __init__(self, config: RunConfig, device: torch.device | str = "cpu"):
        r, schedules = config.router, {}
        if config.model.n_experts:
            schedules = {
                "router_temp": _linear(r.router_temp_init, r.router_temp_final, r.router_temp_anneal_iters),
                "router_noise_std": _linear(r.router_noise_std_init, 0.0, r.router_noise_decay_iters),
            }
            if r.uses_aux_loss:
                schedules["load_balance_alpha"] = _constant(r.load_balance_alpha)
            if r.uses_bias:
                schedules["bias_update_speed"] = _constant(r.bias_update_speed)
            schedules["router_z_loss_coef"] = _constant(r.router_z_loss_coef)
            if not r.dropless:
                schedules["capacity_factor"] = _constant(r.capacity_factor)
        schedules["lr_scale"] = _constant(1.0)
        schedules["grad_clip"] = _constant(config.optim.grad_clip)
        super().__init__((name, Knob(KNOBS[name], schedule)) for name, schedule in schedules.items())
        self.tensors = {name: torch.zeros((), device=device) for name in self}
        if r.routing == "expert" and "capacity_factor" in self:
            self.tensors["capacity_factor"] = torch.zeros(())  # shapes follow it, so the host reads it

    def __missing__(self, name: str):
        raise no_such_knob(name, self)

    def read(self, step: int) -> dict[str, float]:
        """The values that hold for ``step``; the tensors are set to them."""
        values = {name: knob.at(step) for name, knob in self.items()}
        for name, value in values.items():
            self.tensors[name].fill_(value)  # a launch with a host scalar: nothing waits for the device
        return values

    def turn(self, turn: Mapping, step: int) -> None:
        """Carry out a turn as its event says it: name, mode, and value and over where the mode has them."""
        self[turn["name"]].turn(turn["mode"], turn.get("value"), turn.get("over"), step)

    def replay(self, turns: Iterable[tuple[int, Mapping]]) -> None:
        """Set every knob as these (step, turn), in order, leave it, starting from its schedule. A turn of a knob that
        this run lacks is skipped: a fork may lack one that its parent turned.
        """
        for knob in self.values():
            knob.setting = Setting()
        for step, turn in turns:
            if turn["name"] in self:
                self.turn(turn, step)

    def state_dict(self) -> dict[str, dict]:
        """Each knob's setting as plain values, fit for JSON; :meth:`load_state_dict` is its inverse."""
        return {name: asdict(knob.setting) for name, knob in self.items()}

    def load_state_dict(self, state: Mapping[str, dict]) -> None:
        """Settings by knob; those of knobs that a fork does without are left out."""
        for name, setting in state.items():
            if name in self:
                self[name].setting = Setting(**setting)
