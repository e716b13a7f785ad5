"""Command lines as configs: the dialects of three legacy training scripts (``moe_core.dialects``), and our own.

Which dialect a line is written in: the script's name says it. Where that is absent or unknown: the dialect that knows
the most of its flags; among equals the one that alone knows the most; then the one that writes flags as the line does,
with dashes or underscores; then the one with the most of them; then the top-1 MoE before the top-2 before the dense
one. A field of the config goes by its own name in every dialect. ``--preset``, or no flag that any script has, makes
a line this project's own, with the preset's values as defaults ("nano" where none is named).
"""

from __future__ import annotations

import difflib
import shlex
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_core.config import OPTIMIZERS, ConfigError, RunConfig
from moe_core.dialects import pasted
from moe_core.dialects.flags import ANYWHERE, DENSE, DIALECTS, EXPERIMENTAL, FIELDS, LAUNCH, Dialect, Flag
from moe_core.presets import PRESETS, preset

OWN = "moe train"
PRESET = Flag("preset", "preset")
_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Line:
    """How a command line was understood. ``given``: the fields that it names, with their values."""

    dialect: str  # a script's name, or OWN
    preset: str | None  # of a line of our own
    config: RunConfig
    given: dict[str, Any]


def parse(command: str | Sequence[str]) -> RunConfig:
    """The config that a command line means, pasted whole or as its words. Raises ConfigError."""
    return read(command).config


def read(command: str | Sequence[str]) -> Line:
    """:func:`parse`, with how the line was understood. Raises ConfigError."""
    script, place, said = pasted.split(pasted.words(command))
    dialect = DIALECTS[script] if script in DIALECTS else _guess(said, script)
    given = {} if place is None else {"checkpoint_dir": place}
    typed, chosen = {}, "nano"
    for one in said:
        flag, turned = _resolve(one, dialect)
        value = _value(flag, one, turned)
        if flag is PRESET:
            chosen = value
        else:
            given[flag.field], typed[flag.field] = value, one.typed
    base = preset(chosen) if dialect is None else dialect.base
    try:
        config = base.replace(**{**_implied(given, base, dialect), **given})
    except ConfigError as error:
        field = str(error).partition(" = ")[0]
        if pasted.key(typed.get(field, field)) == field:
            raise
        raise ConfigError(f"{typed[field]}: {error}") from None
    return Line(OWN if dialect is None else dialect.script, chosen if dialect is None else None, config, given)


def _guess(said: list[pasted.Said], script: str | None) -> Dialect | None:
    """The dialect of these flags; None: our own. The rule is this file's first paragraph."""
    scripts, names = (EXPERIMENTAL, LAUNCH, DENSE), [_unturned(one.key) for one in said]
    if "preset" in names:
        return None
    if not any(name in d.flags for name in names for d in scripts):
        if script is not None:
            raise ConfigError(f"{script}: must be one of {', '.join(DIALECTS)}, or have flags that one of these has")
        return None
    dashed = sum("-" in one.typed.strip("-") for one in said) - sum("_" in one.typed for one in said)

    def rank(d: Dialect) -> tuple[int, int, bool, int]:
        own = [name for name in names if name in d.flags]
        alone = [name for name in own if not any(name in other.flags for other in scripts if other is not d)]
        return sum(name in d.flags or name in ANYWHERE for name in names), len(alone), \
            dashed != 0 and d.dashed == (dashed > 0), len(own)
    return max(scripts, key=rank)  # the first of equals


def _unturned(name: str) -> str:
    bare = name.removeprefix("no_")
    return bare if bare in ANYWHERE or any(bare in d.flags for d in DIALECTS.values()) else name


def _resolve(one: pasted.Said, dialect: Dialect | None) -> tuple[Flag, bool]:
    """The flag that was typed, and whether its --no- form was. ConfigError names the closest."""
    known = {**ANYWHERE, **({"preset": PRESET} if dialect is None else dialect.flags)}
    if one.key in known:
        return known[one.key], False
    bare = one.key.removeprefix("no_")
    if bare in known and known[bare].is_switch:
        return known[bare], True
    if bare in known:
        raise ConfigError(f"{one.typed}: there is no such flag; --{bare} takes a value and has no --no- form")
    elsewhere = [d.flags[bare].field for d in DIALECTS.values() if bare in d.flags]
    spelled = {flag.field: name for name, flag in known.items()}
    close = [spelled[field] for field in elsewhere] or difflib.get_close_matches(one.key, known, n=1, cutoff=0.0)
    name = close[0].replace("_", "-") if "-" in one.typed.strip("-") else close[0]
    where = "" if dialect is None else f" in {dialect.script}"
    raise ConfigError(f"{one.typed}: there is no such flag{where}; the closest is --{name}")


def _value(flag: Flag, one: pasted.Said, turned: bool) -> Any:
    """What the words after a flag mean for its field. Raises ConfigError where they are not one value."""
    words = list(one.words)
    if flag.is_switch:
        on = _SWITCH.get(words[0].lower()) if words else True
        value = None if on is None else (on is not turned)
        if words and on is not None:
            words.pop(0)
        value = flag.words[value] if flag.words and value is not None else value
    elif not words:
        raise ConfigError(f"{one.typed}: must be followed by a value")
    else:
        value = _converted(flag, one.typed, words.pop(0))
    if words:
        what = "takes no value" if flag.is_switch else "takes one value"
        raise ConfigError(f"{one.typed}: {what}; {words[0]!r} was not expected after it")
    return value


def _converted(flag: Flag, typed: str, text: str) -> Any:
    if flag.words is not None:
        if not flag.open and text.lower() not in flag.words:
            raise ConfigError(f"{typed} = {text!r}: must be one of {', '.join(flag.words)}")
        return flag.words.get(text.lower(), text)
    hint = FIELDS.get(flag.field, str)
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in hints and text.lower() == "none":
        return None
    try:
        if int in hints:
            return int(text)
        if float in hints:
            return float(text)
    except ValueError:
        raise ConfigError(f"{typed} = {text!r}: must be {'an integer' if int in hints else 'a number'}") from None
    return ",".join(part.strip() for part in text.split(",")) if flag.field in ("opt_list", "mirrors") else text


def _implied(given: dict[str, Any], base: RunConfig, dialect: Dialect | None) -> dict[str, Any]:
    """Fields that follow from those that were named. What is named itself goes before them."""
    more = {}
    if (first := given.get("opt_list", "").split(",")[0]) in OPTIMIZERS:
        more["optimizer"] = first
    own_floor = dialect is None or "min_lr" in dialect.flags
    if "learning_rate" in given and (not own_floor or given["learning_rate"] < base.optim.min_lr):
        more["min_lr"] = base.optim.min_lr * (given["learning_rate"] / base.optim.learning_rate)
    if dialect is None:
        return more
    if given.get("dataset_name", base.data.dataset_name) != base.data.dataset_name:
        more |= {"dataset_config": None, "val_split": None}  # the defaults are of another data set
    if "max_iters" in given and "lr_decay_iters" not in dialect.flags:
        more["lr_decay_iters"] = given["max_iters"]
    if dialect is EXPERIMENTAL and given.get("wandb_project"):
        more["mirrors"] = "wandb"
    if any((given.get(name) or 0) % 8 for name in ("d_model", "expert_width")):
        more["experts_impl"] = "loop"  # the scripts took any width
    return more


def from_preset(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """The preset that a config differs least from, and the fields that differ, with the config's values."""
    now = config.flat()
    changes = {name: {field: value for field, value in now.items() if value != theirs[field]}
               for name, theirs in ((name, preset(name).flat()) for name in PRESETS)
               if bool(theirs["n_experts"]) == bool(config.model.n_experts)}
    name = min(changes, key=lambda known: len(changes[known]))
    return name, changes[name]


def spell(config: RunConfig) -> str:
    """The ``moe train`` line that makes this config: the preset that it differs least from, then the differences."""
    name, changes = from_preset(config)
    if config.opt_list:
        changes["optimizer"] = config.optim.optimizer  # else it would be the list's first
    return " ".join(["moe train --preset", name, *(_spelled(*change) for change in changes.items())])


def _spelled(field: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{field}" if value else f"--no-{field}"
    if isinstance(value, str) and pasted.is_flag(value):
        return shlex.quote(f"--{field}={value}")
    return f"--{field} {'none' if value is None else shlex.quote(str(value))}"
