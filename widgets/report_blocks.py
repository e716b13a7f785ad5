"""What a report is made of, before it is HTML, Markdown or a notebook. Nothing in a block is marked up yet.

In a sentence, what stands in backticks is code; so are the names of metrics and knobs. A name that a person chose
goes through :func:`code`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from moe_core.knobs import KNOBS

_CODE = re.compile(r"`([^`]+)`|((?:train|val|router|grad|perf|lr|update|optim)/[\w*]+(?:/layer_[\d*]+)?|"
                   rf"\b(?:{'|'.join(KNOBS)})\b)")


_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # all that ends a line somewhere, and all control characters


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Spark:
    """A metric's course in a table's cell, with its healthy range."""

    steps: np.ndarray
    values: np.ndarray
    low: float | None
    high: float | None
    words: str


@dataclass(frozen=True)
class State:
    """A word that is judged at a glance: "ok", "watch", "alarm" or "none" is its ``level``."""

    text: str
    level: str


Cell = str | Spark | State


@dataclass(frozen=True)
class Table:
    """``numbers``: the columns that are read from the right."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Picture:
    """``name``: a file's, and the key under which :func:`widgets.report_figures.draw` has it.

    ``again`` False: it is not drawn from the store, so a notebook can only show it.
    """

    name: str
    figure: go.Figure
    alt: str
    wide: bool = False
    again: bool = True


@dataclass(frozen=True)
class Pictures:
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Code:
    text: str
    language: str = ""


@dataclass(frozen=True)
class Note:
    """What a person wrote, in Markdown."""

    text: str


@dataclass(frozen=True)
class Entry:
    """Something that happened or was found ``at`` a step or more.

    ``kind``: knob, note, checkpoint, branch; a finding's level; any other is what went wrong.
    """

    at: str
    kind: str
    title: str
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Tiles:
    """A few figures to begin with: (what, value, more about it, level)."""

    tiles: tuple[tuple[str, str, str, str], ...]


Block = Heading | Text | Bullets | Table | Pictures | Code | Note | Entry | Tiles


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    blocks: tuple[Block, ...]

    def pictures(self) -> list[Picture]:
        return [picture for block in self.blocks if isinstance(block, Pictures) for picture in block.pictures]


def code(name: object) -> str:
    """A name that a person chose, for a sentence: on one line, and no backtick of its own ends it."""
    said = _BREAKS.sub(" ", str(name).replace("`", "'"))
    return f"`{said}`" if said.strip() else "``"


def pieces(text: str) -> list[tuple[str, bool]]:
    """A sentence in parts: (text, whether it is code)."""
    parts, at = [], 0
    for found in _CODE.finditer(text):
        parts += [(text[at:found.start()], False), (found[1] or found[2], True)]
        at = found.end()
    return [part for part in [*parts, (text[at:], False)] if part[0]]


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A number for a person: so many significant digits, with its sign in front on request; a dash for NaN."""
    if value is None or value != value:
        return "–"
    form = f"{'+' if sign else ''},.0f" if abs(value) >= 10**digits else f"{'+' if sign else ''}.{digits}g"
    return format(value, form).replace("-", "−") if sign else format(value, form)
