"""Reading a run's experts on a probe, beside its training: what ``run.inspect()`` and ``run.saturation()`` do.

The weights of one step are copied and read in a model of their own, in eval mode and without noise, so that
nothing of the run moves: no weight, no random number, no place in the data. While the run trains, the copy is
taken between two steps, by the training thread, which then goes on.

S block_size, T tokens of the probe.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_core import checkpoint, origin
from moe_core.checked import is_integer, plain
from moe_core.config import RunConfig
from moe_core.data import open_data, tokenizer_of
from moe_core.history import History
from moe_core.inspect import Inspection
from moe_core.knobs import Knobs
from moe_core.model import RouterControls, Routing, Transformer
from moe_core.model.router import Router
from moe_core.session import BUSY, Command
from moe_core.store import Branch, RunStore
from moe_core.token_text import TokenText, classes_of, pieces_of
from moe_core.trainer import Trainer, resolve_device, resolve_dtype

PROBE_TOKENS = 4096  # of the validation text, where no text is given; one window at least
MAX_TOKENS = 1 << 16  # of given texts: what is kept is 13 bytes a pick and layer
WAIT = 0.2  # seconds between two looks whether training still goes


@dataclass(frozen=True)
class Probe:
    """The documents of a probe as token ids."""

    documents: list[list[int]]
    windows: list[list[int]]  # what the model reads, in the documents' order; none is longer than S
    kinds: list[str | None]


@dataclass(frozen=True)
class Source:
    """What a run's data say of text, kept from one call to the next."""

    validation: list[Tensor]
    text: TokenText
    end_of_text: int | None


_sources: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def inspect(run, texts=None, step: int | str | None = None) -> Inspection:
    """See ``Run.inspect``, which is this; ``run`` may also be a :class:`Saved`. Raises ValueError."""
    probe = _probe(run, texts)
    return _read(run.config, weights_of(run, step), probe, _source(run).text)


def saturation(run, steps: int | str | Iterable[int | str] | None = None, texts=None):
    """See ``Run.saturation``, which is this; ``run`` may also be a :class:`Saved`. Raises ValueError."""
    import pandas as pd

    probe, source = _probe(run, texts), _source(run)
    now = _read(run.config, weights_of(run, None), probe, source.text)
    frames, steps = [], [steps] if isinstance(steps, str | int | np.integer) else steps
    for step in sorted({0, *_kept(run)} - {now.step}) if steps is None else steps:
        then = _read(run.config, weights_of(run, step), probe, source.text)
        frames.append(now.changed_since(then).reset_index().assign(step=then.step, compared_with=now.step))
    columns = ["step", "layer", "saturation", "changed", "chance", "compared_with"]
    return pd.concat(frames)[columns].reset_index(drop=True) if frames else pd.DataFrame(columns=columns)


class Saved:
    """A run as its directory alone shows it, for :func:`inspect` and :func:`saturation` where there is no ``Run``: in
    another process than the one that trains it, or in a report. Now is the newest state that is saved.

    ``store`` is only read. Raises ValueError for an imported log, which has no weights, and DataError.
    """

    session = _trainer = None

    def __init__(self, store: RunStore):
        if store.get_meta("imported") is not None:
            raise ValueError(f"{store.path}: is an imported log, which has no weights to look into")
        self.store, self.config = store, RunConfig.from_dict(store.config)
        origin.restore_tokenizer(store, self.config.data.tokenizer)
        self.history = History(store, 0, 1)

    @property
    def _branch(self) -> Branch:
        current = self.store.branch_id()
        return next(branch for branch in self.store.branches() if branch.id == current)

    @property
    def current_step(self) -> int:
        return self.store.last_step(self._branch.id)


# ---- the probe -------------------------------------------------------------------------------------------------

def _probe(run, texts) -> Probe:
    config, source = run.config, _source(run)
    if not config.model.n_experts:
        raise ValueError("inspect: a dense model has no experts to ask")
    if config.router.routing == "expert":
        raise ValueError("inspect: routing = 'expert': must be 'token'; a token's experts depend on the tokens "
                         "read with it, so it has none of its own")
    if texts is None:
        return _of_validation(source, config.model.block_size)
    documents, kinds = [], []
    for kind, text in _named(texts):
        if ids := source.text.encode(text):
            documents.append(ids)
            kinds.append(kind)
    total = sum(map(len, documents))
    if not 0 < total <= MAX_TOKENS:
        raise ValueError(f"texts: {total:,} tokens; must be 1 to {MAX_TOKENS:,}")
    size = config.model.block_size
    return Probe(documents, [ids[at : at + size] for ids in documents for at in range(0, len(ids), size)], kinds)


def _named(texts) -> Iterator[tuple[str | None, str]]:
    """(kind, text) of each document; the kind None where the caller named none."""
    groups = texts.items() if isinstance(texts, Mapping) else [(None, texts)]
    for kind, group in groups:
        group = [group] if isinstance(group, str) else group
        if not isinstance(group, Sequence) or not all(isinstance(text, str) for text in group):
            raise ValueError(f"texts = {str(texts)[:60]!r}: must be a text, a list of texts, or a mapping of the "
                             "documents' kinds to those")
        yield from ((None if kind is None else str(kind), text) for text in group)


def _of_validation(source: Source, size: int) -> Probe:
    """Windows spread evenly over the run's validation, as validation reads them: the same at every call."""
    rows = torch.cat([batch[:, :-1] for batch in source.validation])
    n = min(len(rows), max(1, PROBE_TOKENS // size))
    windows = rows[torch.arange(n) * len(rows) // n].tolist()
    documents = []
    for window in windows:
        documents.append([])  # a window begins somewhere in a document
        for token in window:
            documents[-1].append(token)
            if token == source.end_of_text:
                documents.append([])
        if not documents[-1]:
            documents.pop()
    return Probe(documents, windows, [None] * len(documents))


def _source(run) -> Source:
    if run not in _sources:
        trainer, tokenizer = run._trainer, tokenizer_of(run.config, print)
        if trainer is not None and run.config.data.tokenizer:
            validation = trainer.validation  # what was streamed from afar is not streamed again
        else:
            data = open_data(run.config, pin=False, say=print)
            data.train.close()
            validation = data.validation
        text = TokenText(None if tokenizer is None else tokenizer.backend)
        _sources[run] = Source(validation, text, None if tokenizer is None else tokenizer.end_of_text)
    return _sources[run]


# ---- the weights -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Weights:
    """A model's state after ``step``, that nobody else writes to, and the knob values of the step after it."""

    step: int
    model: dict[str, Tensor]
    knobs: dict[str, float]
    optimizer: dict | None = None  # its state, where it was asked for and the step has one


def weights_of(run, step: int | str | None, optimizer: bool = False) -> Weights:
    """Of a run or a :class:`Saved`; ``step`` as of :func:`inspect`. Raises ValueError, CheckpointError."""
    if step is None:
        return _present(run, optimizer)
    if isinstance(step, str):
        found = [c for c in run.store.checkpoints() if c.name == step]
        if not found:
            names = ", ".join(repr(c.name) for c in run.store.checkpoints() if c.name is not None)
            raise ValueError(f"step = {step!r}: no checkpoint of that name; available: {names or 'none'}")
        return _loaded(run, found[-1])
    if not is_integer(step := plain(step), 0):
        raise ValueError(f"step = {step!r}: must be a step, the name of a checkpoint, or None for now")
    states = [s for s in run.history.states(run._branch.id, step) if s.step == step]
    if states:
        return _loaded(run, states[0])
    if step == 0:
        return _initial(run)
    if step == run.current_step and (present := _present(run)).step == step:
        return present
    raise ValueError(f"step = {step}: no saved state at this step; available: "
                     f"{', '.join(map(str, sorted({0, *_kept(run)})))}; run.checkpoint(name) saves the present one")


def _kept(run) -> list[int]:
    """Steps of the current line whose state is at hand, ascending."""
    return sorted({s.step for s in run.history.states(run._branch.id, run.current_step)})


def _present(run, optimizer: bool = False) -> Weights:
    """The weights now: a copy taken between two steps, or the newest saved state where none is in memory yet."""
    answer: concurrent.futures.Future = concurrent.futures.Future()

    def look(trainer: Trainer | None) -> None:
        # It runs on the training thread, which no error of this may stop.
        if answer.set_running_or_notify_cancel():
            try:
                # Weights of an update that was cut short are of no step: the newest saved state is shown instead.
                answer.set_result(_copied(trainer, optimizer) if trainer is not None and trainer.whole else None)
            except Exception as error:
                answer.set_exception(error)

    if run.session is not None:
        run.session.post(Command("look", {"look": look}))
        while not concurrent.futures.wait([answer], WAIT).done:
            if run.session.state not in BUSY:  # training failed meanwhile: what was posted waits for the next wish
                run.session.post(Command("look", {"look": lambda trainer: None}))
        if (present := answer.result()) is not None:
            return present
    failed = None
    for state in run.history.states(run._branch.id, run.current_step):
        try:
            return _loaded(run, state)
        except checkpoint.CheckpointError as error:  # damaged, or dropped meanwhile by who trains
            failed = error
    if failed is not None:
        raise failed
    return _initial(run)


def _copied(trainer: Trainer, optimizer: bool) -> Weights:
    """On the trainer's own device: to bring all of a large model to the host would make training wait."""
    state = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    kept = copy.deepcopy(trainer.optimizer.state_dict()) if optimizer else None
    return Weights(trainer.steps_done, state, _values(trainer.knobs, trainer.steps_done), kept)


def _loaded(run, state) -> Weights:
    """Of a snapshot or a checkpoint. Raises CheckpointError where its file is not whole."""
    values = getattr(state, "state", None)
    if values is None:
        values = checkpoint.load(run.store.path / state.path)
    knobs = Knobs(run.config)
    knobs.load_state_dict(values["knobs"])
    return Weights(values["steps_done"], values["model"], _values(knobs, values["steps_done"]), values["optimizer"])


def _initial(run) -> Weights:
    config, start = run.config, origin.read(run.store)
    if start is not None:
        return Weights(0, start["model"], _values(Knobs(config), 0), start["optimizer"])
    model = Transformer(config.model, config.router, experts_impl=config.experts_impl, seed=config.seed)
    return Weights(0, model.state_dict(), _values(Knobs(config), 0))


def _values(knobs: Knobs, step: int) -> dict[str, float]:
    return {name: knob.at(step + 1) for name, knob in knobs.items()}


# ---- the reading -----------------------------------------------------------------------------------------------

def built(config: RunConfig, weights: Weights) -> Transformer:
    """A model of its own with these weights, in eval mode, on the config's device."""
    device = resolve_device(config)
    with torch.device("meta"):  # no weight is drawn, and no memory taken
        model = Transformer(config.model, config.router, experts_impl=config.experts_impl,
                            compute_dtype=resolve_dtype(config, device))
    model.load_state_dict(weights.model, assign=True)
    return model.to(device).eval()


class _Enough(Exception):
    """Every router has answered."""


@torch.no_grad()
def _read(config: RunConfig, weights: Weights, probe: Probe, text: TokenText) -> Inspection:
    """Each window by itself, so that short ones need no padding and room is counted over real tokens alone."""
    model, device = built(config, weights), resolve_device(config)
    controls = RouterControls.constant(weights.knobs["router_temp"], 0.0, weights.knobs.get(
        "capacity_factor", config.router.capacity_factor), device)
    routed: list[Routing] = []

    def hear(router: Router, inputs: tuple, routing: Routing) -> None:
        routed.append(routing)
        if len(routed) == config.model.n_moe_layer:
            raise _Enough  # the head would be a third of the work, and [S, V] logits that nobody reads

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(hear)
    by_window = []
    for window in probe.windows:
        with contextlib.suppress(_Enough):
            model(torch.tensor([window], device=device), controls=controls)
        by_window.append([torch.stack([getattr(routing, name) for routing in routed]).cpu()
                          for name in ("experts_TK", "weights_TK", "kept_TK")])
        routed.clear()
    experts, picked, kept = (_frozen(torch.cat(parts, 1).numpy()) for parts in zip(*by_window, strict=True))
    return Inspection(
        step=weights.step, n_experts=config.model.n_experts, experts=experts, weights=picked, kept=kept,
        blocks=tuple(range(config.model.n_layer - config.model.n_moe_layer, config.model.n_layer)),
        windows=_frozen(np.repeat(np.arange(len(probe.windows)), [len(w) for w in probe.windows])),
        **_as_text(probe, text))


def _as_text(probe: Probe, text: TokenText) -> dict:
    token_bytes, pieces, classes = [], [], []
    for ids in probe.documents:
        own = [text.bytes_of(token) for token in ids]
        shown = pieces_of(own)
        token_bytes += own
        pieces += shown
        classes.append(classes_of(shown, [text.is_special(token) for token in ids]))
    sizes = [len(ids) for ids in probe.documents]
    return {
        "token_ids": _frozen(np.concatenate([np.array(ids, np.int64) for ids in probe.documents])),
        "token_bytes": tuple(token_bytes), "pieces": tuple(pieces), "classes": _frozen(np.concatenate(classes)),
        "documents": _frozen(np.repeat(np.arange(len(sizes)), sizes)), "kinds": tuple(probe.kinds)}


def _frozen(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values
