"""Weights for a run to begin with: another run's, a checkpoint's, a dense model's made into experts.

A new run's schedules, step counter and random numbers are its own. What must agree is what gives a weight its shape
or its meaning; a mismatch is refused by its field. The tokenizer comes with the weights.

**Upcycling** (Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055) copies a dense model's SwiGLU into every
expert, each with a little noise of its own so that they can grow apart, and draws a fresh router. Where a token's
weights add up to one (``norm_topk_prob``, or every expert picked with softmax), the model computes what the dense one
did. Else its branch would come out multiplied by the sum of the picked scores, with K = 1 by that of the winner, little
more than 1/E before the router has learned: there each expert's output is divided by the mean of that sum, so that the
branch is the dense one's on average, though not for each token. The mean is taken over 4,096 random directions, through
the router as drawn, at the temperature of the first step and without noise; as the router sharpens it grows, and
training follows. A dense model of three layers of 96, with a validation loss of 3.948 after 250 steps, begins so with
8 experts at 3.954 for K = 1 and at 3.950 for K = 2; undivided it would at 4.596 and at 4.161.

Shapes: D model width, E experts, K picks of a token, T tokens.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_core import checkpoint, probe
from moe_core.config import ConfigError, ModelConfig, RunConfig
from moe_core.data import settled, tokenizer_of
from moe_core.data.pretrained import Pretrained, adopted, load_pretrained
from moe_core.history import other_shape
from moe_core.knobs import Knobs
from moe_core.model import RouterControls, Transformer
from moe_core.origin import Origin
from moe_core.store import RunStore

NOISE = 0.02  # of upcycling, relative to the root mean square of each matrix
DIRECTIONS = 4096


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights as they were found."""

    name: str
    config: RunConfig
    model: dict[str, Tensor]
    optimizer: dict | None
    parent: dict


def prepare(config: RunConfig, say: Callable[[str], None], *, init_from=None, keep_optimizer: bool = False,
            upcycle_from=None, upcycle_noise: float = NOISE,
            init_from_hf=None) -> tuple[RunConfig, Origin | None]:
    """The settled config of a new run, and what it begins with; see ``Run.create``. Raises ConfigError, DataError,
    CheckpointError, StoreError.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(f"config = {config!r}: must be a RunConfig, such as preset(...) gives")
    given = {name: value for name, value in (("init_from", init_from), ("upcycle_from", upcycle_from),
                                             ("init_from_hf", init_from_hf)) if value is not None}
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: only one of them can be given; a run's weights come from one place")
    if keep_optimizer and init_from is None:
        raise ConfigError("keep_optimizer = True: must be False without init_from, there is no optimizer to keep")
    if not given:
        return settled(config, say), None
    if init_from_hf is not None:
        from moe_core.hf.folder import begin_with

        return begin_with(config, init_from_hf, say)
    source = find(init_from if upcycle_from is None else upcycle_from, keep_optimizer)
    config = with_tokenizer(config, tokenizer_of(source.config, say), source.config.model.vocab_size, source.config,
                            source.name, say)
    if upcycle_from is not None:
        model, parent = upcycled(config, source, upcycle_noise, say), {"how": "upcycle_from", "noise": upcycle_noise}
    else:
        check(config, source, keep_optimizer)
        for field, (now, was) in computes_otherwise(source.config, config).items():
            say(f"{field} = {now!r}: it was {was!r} in {source.name}, so the same weights compute something else here")
        model, parent = fitted(config, source, say), {"how": "init_from", "optimizer": keep_optimizer}
    return config, Origin(model, source.optimizer if keep_optimizer else None, source.parent | parent)


# ---- where weights are ---------------------------------------------------------------------------------------

def find(source, optimizer: bool = False) -> Source:
    """The weights of a run as they are now, of a run's directory, or of the file of a checkpoint.

    ``optimizer``: its state too. Raises ConfigError, StoreError, CheckpointError.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.suffix == checkpoint.SUFFIX:
            return _of_file(path)
        with RunStore.open(path) as store:
            try:
                return _of_run(probe.Saved(store), optimizer)
            except ValueError as error:
                raise ConfigError(str(error)) from error
    if not hasattr(source, "store"):
        raise ConfigError(f"init_from = {source!r}: must be a run, its directory, or the file of a checkpoint")
    return _of_run(source, optimizer)


def _of_run(run, optimizer: bool) -> Source:
    weights, path = probe.weights_of(run, None, optimizer), Path(run.store.path).resolve()
    if optimizer and not (weights.optimizer and weights.optimizer["state"]):
        raise ConfigError(f"keep_optimizer = True: must be False; {path} has not taken a step, so there is no state of "
                          "its optimizer to keep")
    return Source(str(path), run.config, weights.model, weights.optimizer,
                  {"path": str(path), "branch": run._branch.id, "step": weights.step})


def _of_file(path: Path) -> Source:
    about, state = checkpoint.about(path), checkpoint.load(path)
    if "config" not in about:
        raise ConfigError(f"init_from = {str(path)!r}: must be a checkpoint of a run")
    with checkpoint.damage(path):
        return Source(str(path), RunConfig.from_dict(about["config"]), state["model"], state["optimizer"],
                      {"path": str(path.resolve()), "branch": about["branch"], "step": about["step"]})


# ---- whether they fit ----------------------------------------------------------------------------------------

def check(config: RunConfig, source: Source, keep_optimizer: bool) -> None:
    """Raise ConfigError with the first field that keeps the weights, or the optimizer's state, from fitting."""
    there, here = comparable(source.config.model), comparable(config.model)
    if not keep_optimizer:  # it is left out or begins at zero, see `fitted`
        there["router_bias"] = here["router_bias"]
    refuse_other(there, here, source.name, source.config if keep_optimizer else None, config)
    if source.config.router.uses_bias and not config.router.uses_bias and config.model.n_experts:
        raise ConfigError(f"balance = {config.router.balance!r}: must be 'bias' or 'both', as in {source.name}: its "
                          "balance bias takes part in who is picked (bias_update_speed = 0 holds it where it is)")


def refuse_other(there: dict, here: dict, name: str, keep: RunConfig | None, config: RunConfig) -> None:
    """Raise ConfigError where two models, as :func:`comparable` gives them, or their optimizers are not one shape."""
    optim = dataclasses.asdict(config.optim)
    kept = optim if keep is None else dataclasses.asdict(keep.optim)
    field = other_shape({"model": there, "optim": kept}, {"model": here, "optim": optim})
    if field is not None:
        now, wanted = (here[field], there[field]) if field in here else (optim[field], kept[field])
        raise ConfigError(f"{field} = {now!r}: must be {wanted!r}, as in {name}, whose weights it begins with")


def comparable(model: ModelConfig) -> dict:
    """A model's fields with what None stands for, and without those that no weight of it depends on."""
    fields = dataclasses.asdict(model) | {"n_kv_heads": model.kv_heads, "mlp_width": model.dense_width}
    if model.n_moe_layer == model.n_layer:
        fields |= {"mlp": None, "mlp_width": None}
    if model.n_experts:
        fields["expert_width"] = model.ff_width
    else:
        fields |= dict.fromkeys(("expert_width", "skip_first_n_moe", "router_bias"))
    if model.use_rope:
        fields["block_size"] = None
    return fields


def computes_otherwise(there: RunConfig, here: RunConfig) -> dict[str, tuple]:
    """Fields that change what the same weights compute, each with (here, there)."""
    now, was = here.flat(), there.flat()
    names = ["norm_eps", *["qk_norm_eps"] * here.model.qk_norm, *["rope_theta"] * here.model.use_rope,
             *["routing", "top_k", "router_scores", "norm_topk_prob"] * bool(here.model.n_experts)]
    return {name: (now[name], was[name]) for name in names if now[name] != was[name]}


def fitted(config: RunConfig, source: Source, say: Callable[[str], None]) -> dict[str, Tensor]:
    """The weights under the names that the config's model has; biases of routing that it lacks begin at zero."""
    model = dict(source.model)
    for name, shape in shapes(config).items():
        if name not in model:
            model[name] = torch.zeros(shape)
        elif model[name].shape != shape:
            raise ConfigError(f"{source.name}: is damaged: {name} is of shape {tuple(model[name].shape)}, and by its "
                              f"config of {tuple(shape)}")
    left = {name: model.pop(name) for name in list(model) if name not in shapes(config)}
    if largest := max((float(bias.abs().max()) for bias in left.values()), default=0.0):
        say(f"router_bias = False: the router's biases in {source.name}, up to {largest:.3g}, are left out, and some "
            "tokens go to another expert")
    return model


def shapes(config: RunConfig) -> dict[str, torch.Size]:
    """Every tensor of a model's state, by name."""
    with torch.device("meta"):
        return {name: value.shape for name, value in Transformer(config.model, config.router).state_dict().items()}


# ---- the tokenizer that comes with them ----------------------------------------------------------------------

def with_tokenizer(config: RunConfig, theirs: Pretrained | None, vocab_size: int, data_of: RunConfig | None, name: str,
                   say: Callable[[str], None]) -> RunConfig:
    """The config, settled, with the tokenizer of the weights where it names none.

    ``vocab_size``: of the weights. ``data_of``: the run that they were trained in, whose data are the same tokens
    again. Raises ConfigError where it names another.
    """
    own = config.data.tokenizer
    if own is not None:
        given = load_pretrained(own)
        if theirs is not None and (given.backend.get_vocab(), given.end_of_text) != (theirs.backend.get_vocab(),
                                                                                   theirs.end_of_text):
            raise ConfigError(f"tokenizer = {own!r}: must be the one that the weights of {name} were trained with "
                              f"({theirs.name}); left None, it is")
        return settled(config, say, vocab_size)
    same = data_of is not None and (data_of.data, data_of.model.vocab_size) == (config.data, config.model.vocab_size)
    if theirs is None or same:
        return settled(config, say)
    if data_of is not None and data_of.data.tokenizer and not Path(theirs.name).is_dir():
        return config.replace(tokenizer=theirs.name)  # a name of the hub, to be found as it was
    folder = adopted(theirs)
    say(f"tokenizer = {str(folder)!r}: the {theirs.vocab_size:,} tokens of {name}")
    return config.replace(tokenizer=str(folder))


# ---- upcycling -----------------------------------------------------------------------------------------------

@torch.no_grad()
def upcycled(config: RunConfig, source: Source, noise: float, say: Callable[[str], None]) -> dict[str, Tensor]:
    """A MoE's weights from a dense model's; see the top of this file. Raises ConfigError."""
    dense, model = source.config.model, config.model
    if dense.n_experts:
        raise ConfigError(f"upcycle_from = {source.name!r}: must be a dense model, this one has n_experts = "
                          f"{dense.n_experts}; init_from goes on with it")
    if not model.n_experts:
        raise ConfigError("n_experts = 0: must be at least 1 to upcycle a dense model")
    if dense.mlp != "swiglu":
        raise ConfigError(f"mlp = {dense.mlp!r} in {source.name}: must be 'swiglu', as experts are")
    if not isinstance(noise, int | float) or not 0 <= noise < float("inf"):
        raise ConfigError(f"upcycle_noise = {noise!r}: must be a number, at least 0")
    routed = dataclasses.replace(dense, n_experts=model.n_experts, expert_width=dense.dense_width,
                                 skip_first_n_moe=model.skip_first_n_moe, router_bias=model.router_bias)
    refuse_other(comparable(routed), comparable(model), source.name, None, config)
    whole = Transformer(model, config.router, seed=config.seed)
    state = whole.state_dict()
    state |= {name: value.cpu() for name, value in source.model.items() if name in state}
    whole.load_state_dict(state)
    generator = torch.Generator().manual_seed(config.seed + 3)  # the trainer's own are seeded with 1 and 2 more
    for at, block in enumerate(whole.blocks[whole.n_dense :], whole.n_dense):
        experts, mlp = block.mlp.experts, f"blocks.{at}.mlp"
        for own, name in zip((*experts.weights(), *experts.biases()), _dense_names(model), strict=True):
            value = source.model[f"{mlp}.{name}"].cpu()
            own.copy_(value.mT if value.ndim == 2 else value)  # the same for all E
            if value.ndim == 2:
                own += noise * value.square().mean().sqrt() * torch.randn(own.shape, generator=generator)
        whole_weight = config.router.top_k == model.n_experts and config.router.router_scores == "softmax"
        if not config.router.norm_topk_prob and not whole_weight:
            share = _picked(block, config, generator)
            for own in (experts.w_down, *experts.biases()[2:]):
                own /= share
            say(f"block {at}: a token's experts have {share:.3f} of the router's weight between them, so their output "
                "is divided by that")
    return whole.state_dict()


def _dense_names(model: ModelConfig) -> list[str]:
    """Of a dense SwiGLU, in the order of an expert's weights and biases."""
    return [f"{part}_proj.{kind}" for kind in ("weight", "bias")[: 1 + model.bias] for part in ("gate", "up", "down")]


def _picked(block, config: RunConfig, generator: torch.Generator) -> float:
    """The mean sum of a token's K weights in a block, over directions of the stream drawn at random."""
    x_TD = block.mlp_norm(torch.randn(DIRECTIONS, config.model.d_model, generator=generator))
    temp = Knobs(config)["router_temp"].at(1)
    routing = block.mlp.router(x_TD, RouterControls.constant(temp, 0.0, config.router.capacity_factor))
    weights_TK = routing.weights_TK
    if routing.tokens_EC is not None:
        weights_TK = weights_TK * routing.kept_TK
    return float(weights_TK.sum(-1).mean())
