"""One optimizer step at a time: no files, no printing, no thread of its own.

What the host must know of a step crosses from the device once, before the update is applied, so that a
step whose loss or gradient is not finite is never applied.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_core.config import ConfigError, RunConfig
from moe_core.data import Batches
from moe_core.knobs import Knobs
from moe_core.metrics import Reading, pack, router_metrics
from moe_core.model import RouterControls, Transformer
from moe_core.optim import (
    build_optimizer,
    hessian_due,
    lr_shape,
    main_lr,
    measured_step,
    sampled_gradients,
    set_lr,
    update_sizes,
)


class NonFiniteError(ArithmeticError):
    """A loss term or the gradient of a step is not finite. The step was not applied."""


@dataclass(frozen=True)
class Routed:
    """What the routers of optimizer step ``step`` decided on in its last micro-batch, for ``Run.preview``.

    The logits stay on the device, L * T * E * 4 bytes until the next step; the noise is drawn again from ``noise``.
    """

    step: int
    values: dict[str, float]  # of the knobs
    router_logits: tuple[Tensor, ...]  # raw, [T, E] of each layer
    noise: Tensor  # the noise generator's state before that micro-batch


@dataclass(frozen=True)
class _Backward:
    """What a step knows before its update. The parameters' ``.grad`` belong to it."""

    reading: Reading
    norm: float  # of the gradient
    ghats: list[Tensor | None]  # gradients on sampled labels; empty where no Hessian pass was due
    ghat_norm: float  # 0 where none was due
    update_sizes: list[float]  # of each parameter group, by the step before
    router_logits: tuple[Tensor, ...] | None  # of the last micro-batch
    noise: Tensor  # the noise generator's state before it


@dataclass(frozen=True)
class StepRecord:
    """What optimizer step number ``step`` (the first is 1) did and saw.

    ``metrics``: the published names; loss, shares and the rest are of the forward passes of this step, hence
    of the weights before its update, and means over all its micro-batches; ``update/...`` is the update that
    made those weights, by the step before (0 in the first); ``val/...`` is of the weights after its own.
    ``shares``: float32 [2, L, E], demand and served as shares of assignments.
    """

    step: int
    metrics: dict[str, float]
    shares: np.ndarray


def resolve_device(config: RunConfig) -> torch.device:
    """The device that ``config.device`` means here. Raises ConfigError where it is not to be had."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': no CUDA device is available to torch here; use 'auto' or 'cpu'")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


class Trainer:
    """Model, optimizer, knobs and batches, moved one optimizer step by :meth:`step`."""

    def __init__(self, config: RunConfig, knobs: Knobs, train: Batches, validation: Sequence[Tensor]):
        """``train`` and ``validation`` give int64 token windows [B, block_size + 1]."""
        self.config, self.knobs, self.train, self.validation = config, knobs, train, validation
        self.device = resolve_device(config)
        self.model = Transformer(
            config.model, config.router, experts_impl=config.experts_impl, seed=config.seed,
            compute_dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
        ).to(self.device)
        self.optimizer = build_optimizer(config.optim, self.model)
        self.noise = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.labels = torch.Generator(self.device).manual_seed(config.seed + 2)  # of Sophia's Hessian passes
        self.steps_done = 0
        self.clipped = 0
        self.routed: Routed | None = None  # replaced whole, so that any thread may read it

    def step(self, validate: bool = True) -> StepRecord:
        """Do one optimizer step; ``validate`` False leaves out a validation that is due.

        On an exception the weights and the next batch are as before it.
        """
        started = time.perf_counter()
        cursor, noise, labels = self.train.state_dict(), self.noise.get_state(), self.labels.get_state()
        try:
            number = self.steps_done + 1
            values = self.knobs.read(number)
            seen = self._backward()
            metrics = self._metrics(number, values, seen)
            _refuse_nonfinite(number, {**metrics, "the Hessian estimate": seen.ghat_norm})
        except BaseException:
            self.train.load_state_dict(cursor)
            self.noise.set_state(noise)
            self.labels.set_state(labels)
            raise
        self._update(number, values, seen)
        if seen.router_logits is not None:
            self.routed = Routed(number, values, seen.router_logits, seen.noise)
        self.steps_done, self.clipped = number, int(metrics["grad/clipped_cum"])
        metrics["perf/tok_s"] = self.config.tokens_per_step / (time.perf_counter() - started)
        if every := self.config.eval_interval:
            # NaN where it was not measured, so that every row has the same names.
            metrics["val/loss"] = self.evaluate() if validate and number % every == 0 else math.nan
            metrics["val/ppl"] = math.exp(min(metrics["val/loss"], 700.0))
        return StepRecord(number, metrics, seen.reading.shares)

    def _controls(self) -> RouterControls | None:
        if not self.config.model.n_experts:
            return None
        t = self.knobs.tensors
        return RouterControls(t["router_temp"], t["router_noise_std"], t.get("capacity_factor"))

    def _backward(self) -> _Backward:
        """Gradients of the mean loss over the step's micro-batches, and what the host must know of them."""
        optim, model = self.config.optim, self.config.model
        controls, report = self._controls(), None
        self.model.train()
        self.optimizer.zero_grad()
        for _ in range(optim.gradient_accumulation_steps):
            window = self.train.next().to(self.device, non_blocking=True)
            noise = self.noise.get_state()  # kept by the host, on a GPU too
            out = self.model(window[:, :-1], window[:, 1:], controls=controls, generator=self.noise)
            loss = out.losses["ce"]
            if model.n_experts:
                t = self.knobs.tensors
                loss = (loss + t["load_balance_alpha"] * out.losses["balance"]
                        + t["router_z_loss_coef"] * out.losses["z"])
            (loss / optim.gradient_accumulation_steps).backward()
            report = pack(out) if report is None else report + pack(out)
        ghats = []
        if hessian_due(optim, self.steps_done):
            ghats = sampled_gradients(self.model, window[:, :-1], controls, self.labels,
                                      self.optimizer.hessian_params())
        norms = torch.stack([_norm([g for g in grads if g is not None], self.device)
                             for grads in (ghats, [p.grad for p in self.model.parameters()])])
        sizes, end = update_sizes(self.optimizer, self.device), len(report)
        vector = torch.cat([report / optim.gradient_accumulation_steps, sizes, norms]).cpu().numpy()
        return _Backward(Reading.unpack(vector[:end], model.n_layer, model.n_experts), norm=float(vector[-1]),
                         ghats=ghats, ghat_norm=float(vector[-2]), update_sizes=vector[end:-2].tolist(),
                         router_logits=out.router_logits, noise=noise)

    def _update(self, number: int, values: dict[str, float], seen: _Backward) -> None:
        if seen.norm > values["grad_clip"]:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), values["grad_clip"],
                                                 torch.tensor(seen.norm))
        if seen.ghats:
            self.optimizer.update_hessian(seen.ghats)
        set_lr(self.optimizer, lr_shape(self.config.optim, number) * values["lr_scale"])
        measured_step(self.optimizer)

    def _metrics(self, number: int, values: dict[str, float], seen: _Backward) -> dict[str, float]:
        optim, reading, norm = self.config.optim, seen.reading, seen.norm
        share, groups = lr_shape(optim, number) * values["lr_scale"], self.optimizer.param_groups
        routed = router_metrics(reading, values["load_balance_alpha"]) if self.config.model.n_experts else {}
        aux = routed.get("router/aux_mean", 0.0)
        z = values["router_z_loss_coef"] * routed["router/z_mean"] if routed else 0.0
        if routed and optim.skips_starved:
            routed["optim/starved_skipped"] = float((reading.shares[1] == 0).sum())
        return {
            "train/loss": reading.ce + aux + z,
            "train/ce": reading.ce,
            "lr": main_lr(optim) * share,
            **{f"lr/{group['name']}": group["peak_lr"] * share for group in groups},
            **{f"update/{group['name']}": size for group, size in zip(groups, seen.update_sizes, strict=True)},
            "train/tokens_b": number * self.config.tokens_per_step / 1e9,
            "grad/norm": norm,
            "grad/clipped_cum": float(self.clipped + (norm > values["grad_clip"])),
            **{self.knobs[name].spec.metric: value for name, value in values.items()},
            **routed,
        }

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy in nats over the validation batches, without noise, at the knobs' present values."""
        self.model.eval()
        total = torch.zeros((), device=self.device)
        for window in self.validation:
            window = window.to(self.device, non_blocking=True)
            total += self.model(window[:, :-1], window[:, 1:], controls=self._controls()).losses["ce"]
        return float(total) / len(self.validation)

    def state_dict(self) -> dict:
        """All that the steps to come depend on: tensors, numbers and text, nested. It shares memory."""
        return {
            "steps_done": self.steps_done, "clipped": self.clipped, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "knobs": self.knobs.state_dict(),
            "noise": self.noise.get_state(), "labels": self.labels.get_state(), "train": self.train.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Become what :meth:`state_dict` was taken of: the same steps follow."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would share memory with the state
        self.knobs.load_state_dict(state["knobs"])
        self.noise.set_state(state["noise"].cpu())
        self.labels.set_state(state["labels"].cpu())
        self.train.load_state_dict(state["train"])
        self.steps_done, self.clipped = state["steps_done"], state["clipped"]


def _norm(grads: list[Tensor], device: torch.device) -> Tensor:
    # torch's norm of nothing is a tensor on the CPU, and to move it would make the host wait.
    return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=device)


def _refuse_nonfinite(number: int, metrics: dict[str, float]) -> None:
    for name in ("train/ce", "router/aux_mean", "router/z_mean", "grad/norm", "the Hessian estimate"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise NonFiniteError(f"step {number}: {name} is {metrics[name]}; the step was not applied")
