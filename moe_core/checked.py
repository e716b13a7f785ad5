"""Frozen dataclasses whose fields are checked the moment they are made: types, ranges, choices."""

from __future__ import annotations

import itertools
import math
import numbers
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import field, fields

import numpy as np


class ConfigError(ValueError):
    """A field that cannot be: one line with the field, the value and what would be right."""


def plain(value):
    """``value`` as Python's own bool, int or float where it is a number of another library (NumPy's); else itself."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def is_integer(value, least: float, most: float = math.inf) -> bool:
    """Whether ``value`` is an int from ``least`` to ``most``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value) -> bool:
    """Whether ``value`` is a finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def whole(name: str, value, error: type[ValueError] = ValueError) -> int:
    """``value`` as an int of at least 1. Raises ``error``, which calls it ``name``."""
    if not is_integer(value := plain(value), 1):
        raise error(f"{name} = {value!r}: must be an integer, at least 1")
    return value


def first_line(error: BaseException) -> str:
    """What an error says, up to the end of its first line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def numbered(name: str) -> Iterator[str]:
    """``name``, ``name-2``, ``name-3``, ...: candidates for a name that is still free."""
    yield name
    yield from (f"{name}-{n}" for n in itertools.count(2))


_BOUNDS = (("ge", lambda v, b: v >= b, "at least"), ("gt", lambda v, b: v > b, "more than"),
           ("le", lambda v, b: v <= b, "at most"), ("lt", lambda v, b: v < b, "less than"))


def field_of(default, help: str, *, ge=None, gt=None, le=None, lt=None, choices=None):
    """A dataclass field with what it means, and the bounds that :class:`Checked` holds it to."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    return field(default=default, metadata={"help": help, **bounds})


def described(cls: type) -> Iterator[str]:
    """A line for each field: its name, default, range and meaning. Fields that are dataclasses themselves stand last,
    each with its own lines, further in.
    """
    parts = [f for f in fields(cls) if isinstance(f.default, Checked)]
    for f in fields(cls):
        if f not in parts:
            may = [f"{words} {f.metadata[key]}" for key, _, words in _BOUNDS if f.metadata[key] is not None]
            may += [", ".join(f.metadata["choices"])] if f.metadata["choices"] else []
            yield f"{f.name} = {f.default!r}" + f" ({', '.join(may)})" * bool(may) + f": {f.metadata['help']}"
    for part in parts:
        yield f"{part.name}: {type(part.default).__doc__.splitlines()[0]}"
        yield from (f"  {line}" for line in described(type(part.default)))


def documented(cls: type) -> type:
    """A decorator of a dataclass: its docstring says of each field what :func:`described` does."""
    cls.__doc__ = f"{cls.__doc__ or ''}\n\n" + textwrap.indent("\n".join(described(cls)), "    ")
    return cls


def _matches(value, hint) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if hint is float:
        return is_number(value)
    if hint is int:
        return is_integer(value, -math.inf)
    return isinstance(value, hint)


def _spoken(hint) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_spoken(option) for option in typing.get_args(hint))
    return {int: "an integer", float: "a finite number", bool: "True or False", str: "text",
            type(None): "None"}.get(hint, hint.__name__)


class Checked:
    """Types and ranges of a frozen dataclass, from its annotations and its fields' metadata."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value, bound = plain(getattr(self, f.name)), f.metadata
            object.__setattr__(self, f.name, value)
            if not _matches(value, hints[f.name]):
                raise ConfigError(f"{f.name} = {value!r}: must be {_spoken(hints[f.name])}")
            if value is None or not bound:
                continue
            if bound["choices"] and value not in bound["choices"]:
                raise ConfigError(f"{f.name} = {value!r}: must be one of {', '.join(map(repr, bound['choices']))}")
            for key, holds, words in _BOUNDS:
                if bound[key] is not None and not holds(value, bound[key]):
                    raise ConfigError(f"{f.name} = {value!r}: must be {words} {bound[key]}")
        self._check()

    def _check(self):
        """What no single field can say; each dataclass overrides it where it has such rules."""
