"""Frozen dataclasses whose fields are checked the moment they are made: types, ranges, choices."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import field, fields


class ConfigError(ValueError):
    """A field that cannot be: one line with the field, the value and what would be right."""


def field_of(default, *, ge=None, gt=None, le=None, lt=None, choices=None):
    """A dataclass field with the bounds that :class:`Checked` holds it to."""
    return field(default=default, metadata={"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices})


def _matches(value, hint) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spoken(hint) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_spoken(option) for option in typing.get_args(hint))
    return {int: "a whole number", float: "a finite number", bool: "True or False", str: "text",
            type(None): "None"}.get(hint, hint.__name__)


class Checked:
    """Types and ranges of a frozen dataclass, from its annotations and its fields' metadata."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value, bound = getattr(self, f.name), f.metadata
            if not _matches(value, hints[f.name]):
                raise ConfigError(f"{f.name} = {value!r}: must be {_spoken(hints[f.name])}")
            if value is None or not bound:
                continue
            if bound["choices"] and value not in bound["choices"]:
                raise ConfigError(f"{f.name} = {value!r}: must be one of {', '.join(map(repr, bound['choices']))}")
            for key, holds, words in (("ge", lambda v, b: v >= b, "at least"), ("gt", lambda v, b: v > b, "more than"),
                                      ("le", lambda v, b: v <= b, "at most"), ("lt", lambda v, b: v < b, "less than")):
                if bound[key] is not None and not holds(value, bound[key]):
                    raise ConfigError(f"{f.name} = {value!r}: must be {words} {bound[key]}")
        self._check()

    def _check(self):
        """What no single field can say; each dataclass overrides it where it has such rules."""
