"""One optimizer step at a time: no files, no printing, no thread of its own.

What the host must know of a step crosses from the device once, and a step whose loss or gradient is not finite is
never applied. On a CPU the host looks before it updates. A GPU would stand idle meanwhile, so where another step
follows at once, the host asks for that step before it reads the numbers of this one. The device itself then withholds
an update that is not finite, and every update after it, until the host has seen it and takes that step again.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_core.compiled import Computing, pays
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
from moe_core.metrics import pack, packed_demand, step_metrics
from moe_core.model import RouterControls, Transformer
from moe_core.model.balance import follow_load
from moe_core.optim import (
    build_optimizer,
    hessian_due,
    lr_shape,
    measured_step,
    sampled_gradients,
    set_lr,
    update_sizes,
)
from moe_core.records import Asked, Backward, OnItsWay, Place, Routed, StepRecord

__all__ = ["MemoryLimitError", "NonFiniteError", "Routed", "StepRecord", "Trainer", "resolve_device"]


@functools.cache  # the GPU of the thread that asks first, for all threads: a new thread's present one is GPU 0
def resolve_device(config: RunConfig) -> torch.device:
    """The device that ``config.device`` means here. Raises ConfigError where it is not to be had."""
    there = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise ConfigError("device = 'cuda': no CUDA device is available to torch here; use 'auto' or 'cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if there else torch.device("cpu")


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
    the model runs under torch.compile, ``runs_ahead`` whether a step may be asked of the device before the one in
    front of it was read: on a GPU.
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
        self.steps_done = self.clipped = self.skipped = self.tokens = 0
        self.whole = True
        self.routed: Routed | None = None  # replaced whole, so that any thread may read it
        self._sequence_alpha = config.router.sequence_balance_alpha if config.model.n_experts else 0.0
        self._forward = Computing(self.model, pays(config, self.device, self.model.flops_per_token()))
        self._alerts = self._forward.alerts
        self.runs_ahead = self.device.type == "cuda"
        self._ahead: Asked | Exception | None = None
        self._waited = 0.0  # seconds, for data, in the present call of step()

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled; False too once torch could not compile it."""
        return self._forward.compiles

    @property
    def under_way(self) -> bool:
        """Whether the device is at a step that :meth:`step` has not returned yet. Weights are then of no known step."""
        return self._ahead is not None

    def step(self, validate: bool = True, more: bool = False) -> StepRecord:
        """Do one optimizer step; ``validate`` False leaves out a validation that is due.

        ``more``: another follows at once, with no knob turned between them, so that it may be :attr:`under_way` when
        this returns. On an exception nothing is under way, and the weights, the next batch and every random number
        are as before the step. Raises NonFiniteError and MemoryLimitError; after the latter, and after any exception
        in the update itself, look at ``whole``.
        """
        started, number, self._waited = time.perf_counter(), self.steps_done + 1, 0.0
        validate = validate and bool(self.config.eval_interval) and number % self.config.eval_interval == 0
        ahead = more and self.runs_ahead and not validate
        asked, self._ahead = self._ahead or self._ask(number, unread=ahead), None
        if isinstance(asked, Exception):
            raise asked
        if ahead:
            self._ahead = self._ask_ahead(number + 1, asked.found_inf)
        if asked.found_inf is not None and not asked.seen.told.is_finite:
            asked = self._look_again(asked)
        metrics = self._metrics(number, asked.values, asked.seen)  # while a GPU is busy with the update
        if asked.seen.router_logits is not None:
            self.routed = Routed(number, asked.values, asked.seen.router_logits, asked.seen.batches[-1][1],
                                 asked.seen.bias_LE)
        self.steps_done, self.clipped = number, int(metrics["grad/clipped_cum"])
        self.tokens += self.config.tokens_per_step
        took = time.perf_counter() - started
        metrics |= {"perf/tok_s": self.config.tokens_per_step / took, "perf/data_wait": self._waited / took}
        if self.config.eval_interval:
            # NaN where it was not measured, so that every row has the same names.
            metrics["val/loss"] = self._validate(number) if validate else math.nan
            metrics["val/ppl"] = math.exp(min(metrics["val/loss"], 700.0))
        alerts = tuple(self._alerts)
        self._alerts.clear()
        return StepRecord(number, metrics, asked.seen.told.reading.shares, alerts)

    def _ask(self, number: int, unread: bool, found_inf: Tensor | None = None) -> Asked:
        """All of a step but its record. ``unread``: the update is the device's to withhold, the host does not look.

        ``found_inf`` of the step before, where that was not read.
        """
        if not self.whole:
            raise RuntimeError("the last update was cut short, so these weights are of no step; load a saved state")
        values = self.knobs.read(number)
        begins = Place(self.train.state_dict(), self.noise.get_state(), self.labels.get_state())
        seen = self._forward.or_eager(lambda: self._attempt(number, values, begins, unread))
        if unread:
            found_inf = seen.found_inf if found_inf is None else torch.maximum(seen.found_inf, found_inf)
        asked = Asked(number, values, begins, seen, found_inf)
        self._update(asked)
        return asked

    def _ask_ahead(self, number: int, found_inf: Tensor | None) -> Asked | Exception:
        """What stops it is raised by the call of :meth:`step` that it is due in: the step before must not be lost."""
        try:
            return self._ask(number, unread=True, found_inf=found_inf)
        except Exception as error:
            return error

    def _look_again(self, asked: Asked) -> Asked:
        """A step that the device withheld, asked again from where it began, with the host looking before the update."""
        self._ahead = None  # it was withheld too
        self._go_to(asked.begins)
        for group, size in zip(self.optimizer.param_groups, asked.seen.update_sizes, strict=True):
            group["update_size"] = size
        return self._ask(asked.number, unread=False)

    def _go_to(self, place: Place) -> None:
        self.noise.set_state(place.noise)
        self.labels.set_state(place.labels)
        self.train.load_state_dict(place.cursor)

    def _attempt(self, number: int, values: dict[str, float], begins: Place, unread: bool) -> Backward:
        """All of a step but its update. On an exception it is as if nothing had been done."""
        try:
            seen = self._backward(number)
            if not unread and not seen.told.is_finite:
                terms = {**self._metrics(number, values, seen), "the Hessian estimate": seen.told.ghat_norm}
                if term := nonfinite_term(terms):
                    raise NonFiniteError(number, term, terms[term], self._where(term, seen))
            return seen
        except BaseException as error:
            self._go_to(begins)
            self.skipped += isinstance(error, NonFiniteError)
            if not isinstance(error, torch.OutOfMemoryError):
                raise
        # Out here, because the exception held the frames of the pass and so its tensors.
        raise self._out_of_memory(f"step {number} was not applied")

    def _metrics(self, number: int, values: dict[str, float], seen: Backward) -> dict[str, float]:
        return step_metrics(self.config, self.optimizer.param_groups, number, values, seen.told,
                            self.clipped, self.skipped, self.tokens)

    def _out_of_memory(self, said: str) -> MemoryLimitError:
        self.optimizer.zero_grad()
        gc.collect()
        return memory_limit(said, self.config, self.device)

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

    def _backward(self, number: int) -> Backward:
        """Gradients of the mean loss over the step's micro-batches, and what the host must know of them."""
        optim, model, t = self.config.optim, self.config.model, self.knobs.tensors
        controls, packed, batches = self._controls(), None, []
        self.model.train()
        self.optimizer.zero_grad()
        for _ in range(optim.gradient_accumulation_steps):
            asked = time.perf_counter()
            window = self.train.next()
            self._waited += time.perf_counter() - asked
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
            packed = pack(out) if packed is None else packed + pack(out)
        ghats = []
        if hessian_due(optim, number - 1):
            ghats = sampled_gradients(self._forward, window[:, :-1], controls, self.labels,
                                      self.optimizer.hessian_params(), optim.mtp_coef)
        norms = torch.stack([_norm([g for g in grads if g is not None], self.device)
                             for grads in (ghats, [p.grad for p in self.model.parameters()])])
        sizes, routed = update_sizes(self.optimizer, self.device), (model.n_moe_layer, model.n_experts)
        bias_LE = None if self.model.balance_bias is None else self.model.balance_bias.clone()
        means = [packed / optim.gradient_accumulation_steps, *([] if bias_LE is None else [bias_LE.flatten()])]
        report = torch.cat([*means, sizes, norms])
        return Backward(
            OnItsWay(report), (*routed, model.n_mtp), found_inf=(~report.isfinite().all()).float(), update_sizes=sizes,
            norm=norms[1], ghats=ghats, router_logits=out.router_logits, batches=batches,
            demand_LE=packed_demand(packed, *routed) if model.n_experts else None, bias_LE=bias_LE)

    def _update(self, asked: Asked) -> None:
        self.whole = False
        try:
            self._apply(asked)
            self.whole = True
        except torch.OutOfMemoryError:
            pass
        if not self.whole:
            raise self._out_of_memory(f"step {asked.number} was cut short in its update")

    def _apply(self, asked: Asked) -> None:
        seen, values, found_inf, bias_LE = asked.seen, asked.values, asked.found_inf, self.model.balance_bias
        self.optimizer.found_inf = found_inf
        if found_inf is not None or seen.told.norm > values["grad_clip"]:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), values["grad_clip"], seen.norm)
        if seen.ghats:
            self.optimizer.update_hessian(seen.ghats)
        set_lr(self.optimizer, lr_shape(self.config.optim, asked.number) * values["lr_scale"])
        measured_step(self.optimizer)
        if bias_LE is not None:
            follow_load(bias_LE, seen.demand_LE, self.knobs.tensors["bias_update_speed"])
            if found_inf is not None:
                bias_LE.copy_(torch.where(found_inf > 0, seen.bias_LE, bias_LE))

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
            return self._forward.or_eager(self.evaluate)
        except torch.OutOfMemoryError:
            pass
        # The step is done and its row must not be lost.
        self._alerts.append(f"no val/loss: {self._out_of_memory(f'the validation after step {number} did not fit')}")
        return math.nan

    def state_dict(self) -> dict:
        """All that the steps to come depend on: tensors, numbers and text, nested. It shares memory.

        Raises RuntimeError while a step is under way.
        """
        if self.under_way:
            raise RuntimeError(f"step {self.steps_done + 1} is under way; finish it with step() first")
        return {
            "steps_done": self.steps_done, "clipped": self.clipped, "skipped": self.skipped, "tokens": self.tokens,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "noise": self.noise.get_state(),
            "labels": self.labels.get_state(), "knobs": self.knobs.state_dict(), "train": self.train.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Become what :meth:`state_dict` was taken of: the same steps follow, under the rates of this trainer's own
        config. A step under way is given up. Where it raises, the state is neither.
        """
        self._ahead = self.routed = None
        self.model.load_state_dict(state["model"])
        load_gathered(self.optimizer, state["optimizer"])
        self.knobs.load_state_dict(state["knobs"])
        foreign = len(state["noise"]) != len(self.noise.get_state())  # a GPU's means nothing to a CPU, nor vice versa
        for generator, saved in ((self.noise, state["noise"]), (self.labels, state["labels"])):
            generator.manual_seed(generator.initial_seed()) if foreign else generator.set_state(saved.cpu())
        if foreign:
            self._alerts.append("the state is of another kind of device: random numbers begin anew from the seed")
        self.train.load_state_dict(state["train"])
        self.steps_done, self.clipped, self.skipped = state["steps_done"], state["clipped"], state.get("skipped", 0)
        self.tokens = state.get("tokens", self.steps_done * self.config.tokens_per_step)  # old states have it not
        self.whole = True


def load_gathered(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Give an optimizer what a saved one had gathered. Rates, decay and the like stay its own: those of its config."""
    groups = optimizer.state_dict()["param_groups"]
    for own, then in zip(groups, saved["param_groups"], strict=True):
        own.pop("update_size", None)
        own |= {name: then[name] for name in ("update_size",) if name in then}
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    # What need not change its device or its type is the saved one itself.
    shared = {id(value) for entry in saved["state"].values() for value in entry.values()}
    for entry in optimizer.state.values():
        entry |= {name: copy.deepcopy(value) for name, value in entry.items() if id(value) in shared}


def _norm(grads: list[Tensor], device: torch.device) -> Tensor:
    # torch's norm of nothing is a tensor on the CPU, and to move it would make the host wait.
    return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=device)

