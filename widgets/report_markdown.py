"""A report as Markdown that GitHub shows, with its pictures in a folder beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

from widgets.rendered import note_markdown
from widgets.report_blocks import (
    Bullets,
    Cell,
    Code,
    Document,
    Entry,
    Heading,
    Note,
    Picture,
    Pictures,
    Spark,
    State,
    Table,
    Text,
    Tiles,
    pieces,
)

SIGNS = {"ok": "✅ ", "watch": "⚠️ ", "alarm": "❌ ", "none": ""}


def render(document: Document, folder: str) -> str:
    """The file's text; picture NAME is expected as ``folder/NAME.png``."""
    def picture(one: Picture) -> str:
        return f"![{inline(one.alt)}]({quote(folder)}/{quote(one.name)}.png)"
    parts = [f"# {inline(document.title)}", inline(document.subtitle)]
    parts += [block_text(block, picture) for block in document.blocks]
    return "\n\n".join(parts) + "\n"


def block_text(block, picture: Callable[[Picture], str]) -> str:
    """One block as Markdown, its pictures as ``picture`` says them."""
    match block:
        case Heading(text, level):
            return f"{'#' * level} {inline(text)}"
        case Text(text):
            return inline(text)
        case Bullets(items):
            return "\n".join(f"- {inline(item)}" for item in items)
        case Code(text, language):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}{language}\n{text}\n{fence}"
        case Note(text):
            return note_markdown(text)
        case Table():
            return _table(block)
        case Tiles(tiles):
            return "\n".join(f"- **{inline(what)}**: {SIGNS[level]}{inline(value)} ({inline(more)})"
                             for what, value, more, level in tiles)
        case Pictures(pictures):
            return "\n\n".join(picture(one) for one in pictures)
        case Entry(at, _, title, blocks):
            return "\n\n".join([f"**{inline(at.capitalize())}** · {inline(title)}",
                                *(block_text(part, picture) for part in blocks)])
    raise TypeError(f"{type(block).__name__} is no block")


def _table(table: Table) -> str:
    kept = [k for k in range(len(table.head)) if not any(isinstance(row[k], Spark) for row in table.rows)]
    lines = [[_cell(table.head[k]) for k in kept], ["---:" if k in table.numbers else "---" for k in kept]]
    lines += [[_cell(row[k]) for k in kept] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    if isinstance(cell, State):
        return SIGNS[cell.level] + inline(cell.text)
    return inline(cell, cell=True)


def inline(text: str, cell: bool = False) -> str:
    """A sentence on one line of Markdown, in which nothing but its code is marked up."""
    parts = pieces(" ".join(text.splitlines()))
    return "".join(_code(part, cell) if is_code else _escaped(part) for part, is_code in parts)


def _code(part: str, cell: bool) -> str:
    # A bar ends a table's cell even in code, and a tag in code is one to readers that look for tags first; as an
    # entity neither is, nor any other sign.
    if "<" in part or (cell and "|" in part):
        return f"<code>{re.sub(r'[^A-Za-z0-9 .-]', lambda sign: f'&#{ord(sign[0])};', part)}</code>"
    return f"`{part}`"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>#~|!])", r"\\\1", text.replace("&", "&amp;"))
