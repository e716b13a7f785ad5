"""What the routers would do with the last batch at other knob values, without training.

The raw logits of that batch are routed again by the function that routed them, with the same noise, and read by
the code that reads a step; so at the same values every number is the batch's own.

L layers, T tokens, E experts, K picks of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from torch import Tensor

from moe_core.checked import plain
from moe_core.config import RunConfig
from moe_core.knobs import KnobError, check_turn, no_such_knob
from moe_core.metrics import Reading, pack, router_metrics
from moe_core.model import Output, RouterControls, RouterStats, draw_noise
from moe_core.model.router import route, routing_options
from moe_core.trainer import Routed, Trainer

ROUTES = ("router_temp", "router_noise_std", "capacity_factor")  # the knobs that a forward pass reads
# What is shown of all layers, and below it of each. The rest of a step's router metrics is in ``now`` and ``then``.
SHOWN = ("router/entropy_mean", "router/top1_p_mean", "router/max_frac_mean", "router/max_frac_max",
         "router/active_min", "router/drop_frac_mean")
SHOWN_BY_LAYER = ("router/entropy_mean", "router/top1_p_mean", "router/max_frac_mean", "router/drop_frac_mean")


@dataclass(frozen=True)
class Preview:
    """Now -> then, of the last micro-batch of step ``step``; metrics by their published names, per layer too."""

    step: int
    values_now: dict[str, float]  # the knobs, as the batch was routed
    values_then: dict[str, float]
    now: dict[str, float]
    then: dict[str, float]
    shares_now: np.ndarray  # float32 [2, L, E], demand and served as shares of the layer's assignments
    shares_then: np.ndarray
    unknown: tuple[str, ...]  # what this cannot know, one sentence each

    def table(self):
        """DataFrame, index metric: now, then and change; first over the layers, then layer by layer."""
        import pandas as pd

        layers = range(self.shares_now.shape[1])
        names = [*SHOWN, *(f"{name}/layer_{layer}" for layer in layers for name in SHOWN_BY_LAYER)]
        frame = pd.DataFrame({"now": [self.now[n] for n in names], "then": [self.then[n] for n in names]},
                             index=pd.Index(names, name="metric"))
        return frame.assign(change=frame["then"] - frame["now"])

    def turned(self) -> str:
        """The knobs that differ, "router_temp 1.30 -> 1.60"; "" where none does."""
        return ", ".join(f"{name} {now:.4g} -> {self.values_then[name]:.4g}"
                         for name, now in self.values_now.items() if _differs(self.values_then[name], now))

    def __repr__(self) -> str:
        rows = "".join(f"\n  {name:24} {self.now[name]:8.4f} -> {self.then[name]:8.4f}" for name in SHOWN)
        return f"Preview of step {self.step}: {self.turned() or 'nothing turned'}{rows}" + "".join(
            f"\n  {sentence}" for sentence in self.unknown)

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{self.now[name]:.4f}</td><td>{self.then[name]:.4f}</td>"
                       f"<td>{self.then[name] - self.now[name]:+.4f}</td></tr>" for name in SHOWN)
        notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.unknown)
        return (f"<p>What if, on the last micro-batch of step {self.step}: {escape(self.turned() or 'nothing turned')}"
                f"</p><table><thead><tr><th>metric</th><th>now</th><th>then</th><th>change</th></tr></thead>"
                f"<tbody>{rows}</tbody></table><ul>{notes}</ul>")


def preview(trainer: Trainer | None, config: RunConfig, turns: Mapping[str, float]) -> Preview:
    """The last batch of ``trainer`` at its own knob values, and with ``turns`` in their place.

    Any thread may ask while another trains. Raises KnobError for a knob that this run has not or a value out of
    its range, RuntimeError where no step was taken since the run was opened.
    """
    if not config.model.n_experts:
        raise KnobError("preview: a dense model has no router to ask")
    routed = None if trainer is None else trainer.routed  # read once: the training thread may replace it
    if routed is None:
        raise RuntimeError("preview: no batch is at hand yet; run.step(1) first")
    then = dict(routed.values)
    for name, value in turns.items():
        if name not in then:
            raise no_such_knob(name, then)
        value = plain(value)
        check_turn(name, "hold", value)
        then[name] = float(value)
    vectors = _route_again(routed, [routed.values, then], config, trainer.device)
    (now_metrics, now_shares), (then_metrics, then_shares) = (
        _read(vector, values, config) for vector, values in zip(vectors, (routed.values, then), strict=True))
    return Preview(routed.step, dict(routed.values), then, now_metrics, then_metrics, now_shares, then_shares,
                   tuple(_unknown(routed.values, then, config)))


@torch.no_grad()
def _route_again(routed: Routed, settings: list[dict[str, float]], config: RunConfig,
                 device: torch.device) -> np.ndarray:
    """What :func:`pack` says of the batch at each of the settings, [len(settings), n]; one copy to the host."""
    router, logits = config.router, routed.router_logits
    own = torch.Generator(device)  # never the run's
    own.set_state(routed.noise)
    noise_LTE = draw_noise(router.router_noise_type, (len(logits), *logits[0].shape), own, device)
    return torch.stack([_packed(routed, noise_LTE, values, config, device) for values in settings]).cpu().numpy()


def _packed(routed: Routed, noise_LTE: Tensor, values: Mapping[str, float], config: RunConfig,
            device: torch.device) -> Tensor:
    router, bias_LE = config.router, routed.bias_LE
    controls = RouterControls.constant(values["router_temp"], values["router_noise_std"],
                                       values.get("capacity_factor", router.capacity_factor), device)
    biases = [None] * len(noise_LTE) if bias_LE is None else bias_LE
    routings = [route(logits_TE, controls, noise_TE, bias_E, **routing_options(router),
                      n_sequences=len(logits_TE) // config.model.block_size)
                for logits_TE, noise_TE, bias_E in zip(routed.router_logits, noise_LTE, biases, strict=True)]
    packed = pack(Output(losses={"ce": torch.zeros((), device=device)},
                         balance_L=torch.stack([r.balance_loss for r in routings]),
                         sequence_L=torch.stack([r.sequence_loss for r in routings]),
                         z_L=torch.stack([r.z_loss for r in routings]),
                         stats=RouterStats.stack([r.stats for r in routings]), router_logits=None, logits_BSV=None))
    return packed if bias_LE is None else torch.cat([packed, bias_LE.flatten()])


def _read(vector: np.ndarray, values: Mapping[str, float], config: RunConfig) -> tuple[dict[str, float], np.ndarray]:
    reading = Reading.unpack(vector, config.model.n_moe_layer, config.model.n_experts)
    return router_metrics(reading, values.get("load_balance_alpha", 0.0), config.router), reading.shares


def _differs(a: float, b: float) -> bool:
    return np.float32(a) != np.float32(b)  # the router reads float32


def _unknown(now: Mapping[str, float], then: Mapping[str, float], config: RunConfig) -> list[str]:
    """What no routing of a batch that is over can tell, of the knobs that differ."""
    turned = [name for name in now if _differs(then[name], now[name])]
    said = [f"{name} acts only through training: it moves no token of this batch"
            for name in turned if name not in ROUTES]
    if "load_balance_alpha" in turned:
        said[said.index(next(s for s in said if s.startswith("load_balance_alpha")))] += (
            "; router/aux_mean is the same balance loss at the new coefficient")
    quiet = then["router_noise_std"] == now["router_noise_std"] == 0 and not config.router.uses_bias
    quiet = quiet and config.router.routing == "token"  # between tokens it does
    if "router_temp" in turned and quiet:
        said.append("without noise the temperature changes the weights, never the choice of experts")
    if config.model.n_moe_layer > 1 and any(name in ROUTES for name in turned):
        said.append("each layer is shown on the inputs that it had: how another choice in one layer would change "
                    "the inputs of the next is not known")
    if config.optim.gradient_accumulation_steps > 1:
        said.append(f"it is the last of {config.optim.gradient_accumulation_steps} micro-batches of the step, so "
                    "\"now\" differs from the step's own row, which is the mean over all of them")
    return said
