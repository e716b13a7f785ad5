"""What a shoot-out compares: entries by label, all on the same batches."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moe_core.checked import whole
from moe_core.config import OPTIMIZERS, ConfigError, RunConfig
from moe_core.shootout.peaks import stretched, with_rates

# What makes batches and validation the same for all entries.
SHARED = ("vocab_size", "block_size", "batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval",
          "eval_iters")


def planned(models: RunConfig | Mapping[str, RunConfig], optimizers: Sequence[str] | None, steps: int | None,
             peaks: Mapping[str, Mapping[str, object]]) -> dict[str, RunConfig]:
    """The entries by label, checked; see :meth:`moe_core.shootout.Shootout.create`. Raises ConfigError."""
    for name in optimizers or ():
        one_of("optimizer", name, OPTIMIZERS)
    if steps is not None:
        whole("steps", steps, ConfigError)
    if isinstance(models, RunConfig):
        entries = {name: models.replace(optimizer=name) for name in optimizers or [models.optim.optimizer]}
    elif optimizers:
        entries = {f"{label}-{name}": config.replace(optimizer=name)
                   for label, config in models.items() for name in optimizers}
    else:
        entries = dict(models)
    if not entries:
        raise ConfigError(f"models = {models!r}: must name at least one")
    for key in peaks:
        one_of("peaks", key, [*entries, *(config.optim.optimizer for config in entries.values())])
    for label, config in entries.items():
        named(label)
        config = stretched(config, steps or config.optim.max_iters)
        for key in dict.fromkeys((config.optim.optimizer, label)):
            config = with_rates(config, **peaks.get(key, {}))
        # What says where one run lies is not for all of them.
        entries[label] = config.replace(opt_list="", csv=None, wandb_run_name=None, checkpoint_dir=None,
                                        resume=None, auto_resume=False)
    (first, one), *others = entries.items()
    for label, other in others:
        if one.data != other.data:
            raise ConfigError(f"{label}: its data are not those of {first}; all entries must see the same batches")
        values, wanted = other.flat(), one.flat()
        for name in SHARED:
            if values[name] != wanted[name]:
                raise ConfigError(f"{name} = {values[name]!r} of {label}: must be {wanted[name]!r} as in {first}; "
                                  "all entries must see the same batches")
    return entries


def named(label: str) -> str:
    """``label``, of which a run's directory and the rows of a table are made. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", label):
        raise ConfigError(f"label = {label!r}: must be letters, digits, '.', '_' and '-', as it names a directory")
    return label


def one_of(name: str, value: str, known) -> str:
    if value not in known:
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(dict.fromkeys(known))}")
    return value
