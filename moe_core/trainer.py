"""One optimizer step at a time: no files, no printing, no thread of its own.

What the host must know of a step crosses from the device once, before the update is applied, so that a
step whose loss or gradient is not finite is never applied.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from moe_core.compiled import compiled, is_compilers, pays
from moe_core.config import ConfigError, RunConfig
from moe_core.data import Batches
from moe_core.faults import (
    MemoryLimitError,
    NonFiniteError,
    first_in_backward,
    first_in_forward,
    memory_limit,
    nonfinite_term,
)
from moe_core.knobs import Knobs
from moe_core.metrics import Reading, pack, packed_demand, router_metrics
from moe_core.model import Output, RouterControls, Transformer
from moe_core.model.balance import follow_load
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
from moe_core.records import Backward, Routed, StepRecord

__all__ = ["MemoryLimitError", "NonFiniteError", "Routed", "StepRecord", "Trainer", "resolve_device"]

Got = TypeVar("Got")


def resolve_device(config: RunConfig) -> torch.device:
    """The device that ``config.device`` means here. Raises ConfigError where it is not to be had."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': no CUDA device is available to torch here; use 'auto' or 'cpu'")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """What ``config.compute_dtype`` means on a device: "auto" is bfloat16 where a GPU computes in it."""
    if config.compute_dtype != "auto":
        return getattr(torch, config.compute_dtype)
    quick = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if quick else torch.float32


class Trainer:
    """Model, optimizer, knobs and batches, moved one optimizer step by :meth:`step`.

    ``whole`` is False once an update was cut short half-way: such weights belong to no step, and only
    :meth:`load_state_dict` makes the trainer usable again. ``skipped`` counts the attempts that were refused
    because they were not finite; a replay of the steps makes none of them, so it is told. ``compiles`` says whether
    the model runs under torch.compile.
    """

    def __init__(self, config: RunConfig, knobs: Knobs, train: Batches, validation: Sequence[Tensor]):
        """``train`` and ``validation`` give int64 token windows [B, block_size + 1]."""
        self.config, self.knobs, self.train, self.validation = config, knobs, train, validation
        self.device = resolve_device(config)
        self.model = Transformer(
            config.model, config.router, experts_impl=config.experts_impl, seed=config.seed,
            compute_dtype=resolve_dtype(config, self.device),
            activation_checkpointing=config.activation_checkpointing).to(self.device)
        self.optimizer = build_optimizer(config.optim, self.model)
        self.noise = torch.Generator(self.device).manual_seed(config.seed + 1)  # of selection, then of dropout
        self.labels = torch.Generator(self.device).manual_seed(config.seed + 2)  # of Sophia's Hessian passes
        self.steps_done = self.clipped = self.skipped = 0
        self.whole = True
        self.routed: Routed | None = None  # replaced whole, so that any thread may read it
        self._sequence_alpha = config.router.sequence_balance_alpha if config.model.n_experts else 0.0
        self.compiles = pays(config, self.device, self.model.flops_per_token())
        self._compute = compiled(self.model.compute) if self.compiles else self.model.compute
        self._alerts: list[str] = []

    def step(self, validate: bool = True) -> StepRecord:
        """Do one optimizer step; ``validate`` False leaves out a validation that is due.

        On an exception the weights, the next batch and every random number are as before it. Raises
        NonFiniteError and MemoryLimitError; after the latter, and after any exception in the update itself,
        look at ``whole``.
        """
        if not self.whole:
            raise RuntimeError("the last update was cut short, so these weights are of no step; load a saved state")
        started = time.perf_counter()
        number = self.steps_done + 1
        values = self.knobs.read(number)
        seen = self._or_eager(lambda: self._attempt(number, values))
        self._update(number, values, seen)
        metrics = self._metrics(number, values, seen)  # while a GPU is busy with the update
        if seen.router_logits is not None:
            self.routed = Routed(number, values, seen.router_logits, seen.batches[-1][1], seen.bias_LE)
        self.steps_done, self.clipped = number, int(metrics["grad/clipped_cum"])
        took = time.perf_counter() - started
        metrics |= {"perf/tok_s": self.config.tokens_per_step / took, "perf/data_wait": seen.waited / took}
        if every := self.config.eval_interval:
            # NaN where it was not measured, so that every row has the same names.
            metrics["val/loss"] = self._validate(number) if validate and number % every == 0 else math.nan
            metrics["val/ppl"] = math.exp(min(metrics["val/loss"], 700.0))
        alerts, self._alerts = tuple(self._alerts), []
        return StepRecord(number, metrics, seen.reading.shares, alerts)

    def _attempt(self, number: int, values: dict[str, float]) -> Backward:
        """All of a step but its update."""
        cursor, noise, labels = self.train.state_dict(), self.noise.get_state(), self.labels.get_state()
        try:
            seen = self._backward()
            if not seen.is_finite:
                told = {**self._metrics(number, values, seen), "the Hessian estimate": seen.ghat_norm}
                if term := nonfinite_term(told):
                    raise NonFiniteError(number, term, told[term], self._where(term, seen))
            return seen
        except BaseException as error:
            self.noise.set_state(noise)
            self.labels.set_state(labels)
            self.train.load_state_dict(cursor)
            self.skipped += isinstance(error, NonFiniteError)
            if not isinstance(error, torch.OutOfMemoryError):
                raise
        # Out here, because the exception held the frames of the pass and so its tensors.
        raise self._out_of_memory(f"step {number} was not applied")

    def _out_of_memory(self, said: str) -> MemoryLimitError:
        self.optimizer.zero_grad()
        gc.collect()
        return memory_limit(said, self.config, self.device)

    def _or_eager(self, work: Callable[[], Got]) -> Got:
        """What ``work`` gives; where the compiler fails, what it gives without it, from now on."""
        try:
            return work()
        except Exception as error:
            if not self.compiles or not is_compilers(error):
                raise
            self._compute, self.compiles = self.model.compute, False
            self._alerts.append("compile: torch could not compile the model, so it runs without: "
                                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return work()

    def _where(self, term: str, seen: Backward) -> str:
        """The first place that is not finite, in a pass through the step's micro-batches, else in its gradients."""
        named = list(self.model.named_parameters())
        if term == "the Hessian estimate":
            ghats = dict(zip(self.optimizer.hessian_params(), seen.ghats, strict=True))
            return first_in_backward((name, ghats.get(p)) for name, p in named)
        try:
            found = first_in_forward(self.model, seen.batches, self._controls())
        except torch.OutOfMemoryError:
            found = "not found, for want of memory to look again"
        return found or first_in_backward((name, p.grad) for name, p in named)

    def _controls(self) -> RouterControls | None:
        if not self.config.model.n_experts:
            return None
        t = self.knobs.tensors
        return RouterControls(t["router_temp"], t["router_noise_std"], t.get("capacity_factor"))

    def _forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None, *, controls: RouterControls | None,
                 generator: torch.Generator | None = None, return_logits: bool = False) -> Output:
        """The model, compiled where it is."""
        return self._compute(tokens_BS, targets_BS, controls, *self.model.draw(tokens_BS, generator), return_logits)

    def _backward(self) -> Backward:
        """Gradients of the mean loss over the step's micro-batches, and what the host must know of them."""
        optim, model, t = self.config.optim, self.config.model, self.knobs.tensors
        controls, report, batches, waited = self._controls(), None, [], 0.0
        self.model.train()
        self.optimizer.zero_grad()
        for _ in range(optim.gradient_accumulation_steps):
            asked = time.perf_counter()
            window = self.train.next()
            waited += time.perf_counter() - asked
            window = window.to(self.device, non_blocking=True)
            batches.append((window, self.noise.get_state()))  # the state is kept by the host, on a GPU too
            out = self._forward(window[:, :-1], window[:, 1:], controls=controls, generator=self.noise)
            loss = out.losses["ce"]
            for coefficient, term in (("load_balance_alpha", "balance"), ("router_z_loss_coef", "z")):
                if coefficient in t:
                    loss = loss + t[coefficient] * out.losses[term]
            if self._sequence_alpha:
                loss = loss + self._sequence_alpha * out.losses["sequence"]
            if "mtp" in out.losses:
                loss = loss + optim.mtp_coef * out.losses["mtp"]
            (loss / optim.gradient_accumulation_steps).backward()
            report = pack(out) if report is None else report + pack(out)
        ghats = []
        if hessian_due(optim, self.steps_done):
            ghats = sampled_gradients(self._forward, window[:, :-1], controls, self.labels,
                                      self.optimizer.hessian_params())
        norms = torch.stack([_norm([g for g in grads if g is not None], self.device)
                             for grads in (ghats, [p.grad for p in self.model.parameters()])])
        sizes, routed = update_sizes(self.optimizer, self.device), (model.n_moe_layer, model.n_experts)
        bias_LE = None if self.model.balance_bias is None else self.model.balance_bias.clone()
        mean = report / optim.gradient_accumulation_steps
        if bias_LE is not None:
            mean = torch.cat([mean, bias_LE.flatten()])
        vector = torch.cat([mean, sizes, norms]).cpu().numpy()
        return Backward(
            Reading.unpack(vector[:len(mean)], *routed, model.n_mtp), norm=float(vector[-1]), ghats=ghats,
            ghat_norm=float(vector[-2]), update_sizes=vector[len(mean):-2].tolist(), router_logits=out.router_logits,
            batches=batches, is_finite=bool(np.isfinite(vector).all()), bias_LE=bias_LE, waited=waited,
            demand_LE=packed_demand(report, *routed) if model.n_experts else None)

    def _update(self, number: int, values: dict[str, float], seen: Backward) -> None:
        self.whole = False
        try:
            self._apply(number, values, seen)
            self.whole = True
        except torch.OutOfMemoryError:
            pass
        if not self.whole:
            raise self._out_of_memory(f"step {number} was cut short in its update")

    def _apply(self, number: int, values: dict[str, float], seen: Backward) -> None:
        if seen.norm > values["grad_clip"]:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), values["grad_clip"],
                                                 torch.tensor(seen.norm))
        if seen.ghats:
            self.optimizer.update_hessian(seen.ghats)
        set_lr(self.optimizer, lr_shape(self.config.optim, number) * values["lr_scale"])
        measured_step(self.optimizer)
        if seen.bias_LE is not None:
            follow_load(self.model.balance_bias, seen.demand_LE, self.knobs.tensors["bias_update_speed"])

    def _metrics(self, number: int, values: dict[str, float], seen: Backward) -> dict[str, float]:
        optim, reading, norm = self.config.optim, seen.reading, seen.norm
        share, groups = lr_shape(optim, number) * values["lr_scale"], self.optimizer.param_groups
        routed = {}
        if self.config.model.n_experts:
            routed = router_metrics(reading, values.get("load_balance_alpha", 0.0), self.config.router)
        aux = routed.get("router/aux_mean", 0.0) + routed.get("router/seq_aux_mean", 0.0)
        z = values["router_z_loss_coef"] * routed["router/z_mean"] if routed else 0.0
        if routed and optim.skips_starved:
            routed["optim/starved_skipped"] = float((reading.shares[1] == 0).sum())
        further = {}
        if len(reading.mtp_N):
            further = {"train/mtp": float(reading.mtp_N.mean()),
                       **{f"train/mtp_{k}": float(ce) for k, ce in enumerate(reading.mtp_N, 1)}}
        return {
            "train/loss": reading.ce + aux + z + optim.mtp_coef * further.get("train/mtp", 0.0),
            "train/ce": reading.ce,
            **further,
            "lr": main_lr(optim) * share,
            **{f"lr/{group['name']}": group["peak_lr"] * share for group in groups},
            **{f"update/{group['name']}": size for group, size in zip(groups, seen.update_sizes, strict=True)},
            "train/tokens_b": number * self.config.tokens_per_step / 1e9,
            "grad/norm": norm,
            "grad/clipped_cum": float(self.clipped + (norm > values["grad_clip"])),
            "grad/skipped_cum": float(self.skipped),
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
            total += self._forward(window[:, :-1], window[:, 1:], controls=self._controls()).losses["ce"]
        return float(total) / len(self.validation)

    def _validate(self, number: int) -> float:
        try:
            return self._or_eager(self.evaluate)
        except torch.OutOfMemoryError:
            pass
        # The step is done and its row must not be lost.
        self._alerts.append(f"no val/loss: {self._out_of_memory(f'the validation after step {number} did not fit')}")
        return math.nan

    def state_dict(self) -> dict:
        """All that the steps to come depend on: tensors, numbers and text, nested. It shares memory."""
        return {
            "steps_done": self.steps_done, "clipped": self.clipped, "skipped": self.skipped,
            "model": self.model.state_dict(),
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
        self.steps_done, self.clipped, self.skipped = state["steps_done"], state["clipped"], state.get("skipped", 0)
        self.whole = True


def _norm(grads: list[Tensor], device: torch.device) -> Tensor:
    # torch's norm of nothing is a tensor on the CPU, and to move it would make the host wait.
    return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=device)

