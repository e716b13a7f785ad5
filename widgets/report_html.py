"""A report as one HTML file that opens anywhere offline and lets nothing in it act but its own charts."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping

from plotly.offline import get_plotlyjs

from widgets.figures import LEFT, NOT_OFFERED
from widgets.rendered import note_html
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
from widgets.report_figures import NARROW
from widgets.report_style import STYLE
from widgets.spark import spark

USUAL = ("knob", "note", "checkpoint", "branch", "imported", "ok", "watch", "alarm")  # other kinds of entry went wrong

# Draws every chart in the width that it has. A page that is printed is laid out anew without telling its charts: they
# are drawn in the width of paper before, with the room for numbers that they were laid out with, and as they were
# behind it.
OPTIONS = {"responsive": True, "displaylogo": False, "showSendToCloud": False, "modeBarButtonsToRemove": NOT_OFFERED}
DRAW = f"const options = {json.dumps(OPTIONS)}, LEFT = {LEFT};" + """
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const {data, layout} = JSON.parse(document.getElementById("chart-" + figure.dataset.chart).textContent);
  figure.firstElementChild.left = layout.xaxis.domain[0];
  Plotly.newPlot(figure.firstElementChild, data, layout, options);
}
const fit = (size, left) => document.querySelectorAll(".js-plotly-plot").forEach((plot) =>
  Plotly.relayout(plot, {...size, "xaxis.domain[0]": left ?? plot.left}));
addEventListener("beforeprint", () => fit({autosize: false, width: 660}, LEFT / 660));
addEventListener("afterprint", () => fit({autosize: true, width: null}));
"""


def render(document: Document, drawings: Mapping[str, bytes] | None = None) -> str:
    """The file's text. ``drawings``: SVG by a picture's name, in place of charts that a script draws."""
    first = 1 if document.blocks and isinstance(document.blocks[0], Tiles) else 0  # before the list of sections
    body = [_block(block, drawings) for block in document.blocks]
    scripts = [] if drawings is not None or not document.pictures() else [get_plotlyjs(), DRAW]
    heads = [block.text for block in document.blocks if isinstance(block, Heading) and block.level == 2]
    nav = "".join(f'<a href="#{_anchor(text)}">{_inline(text)}</a>' for text in heads)
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(document.title)}</title>", f"<style>{STYLE}</style>", "</head>", "<body>", "<main>",
        f"<header><h1>{html.escape(document.title)}</h1><p>{_inline(document.subtitle)}</p></header>",
        *body[:first], f'<nav aria-label="Sections">{nav}</nav>', *body[first:],
        "<footer>Made from the run's store by the MoE workbench.</footer>", "</main>",
        *(f"<script>{script}</script>" for script in scripts), "</body>", "</html>", ""])


def _policy(scripts: list[str]) -> str:
    """Which scripts may run: these and no other; and nothing may be fetched."""
    sums = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in sums) or "'none'"
    return (f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
            "base-uri 'none'; form-action 'none'")


def _block(block, drawings: Mapping[str, bytes] | None) -> str:
    match block:
        case Heading(text, level):
            own = f' id="{_anchor(text)}"' if level == 2 else ""
            return f"<h{level}{own}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
        case Code(text, _):
            return f"<pre><code>{html.escape(text)}</code></pre>"
        case Note(text):
            return f'<div class="said">{note_html(text)}</div>'
        case Table():
            return _table(block)
        case Tiles(tiles):
            inside = (f'<div class="tile {level}"><span>{_inline(what)}</span><b>{_inline(value)}</b>'
                      f"<small>{_inline(more)}</small></div>" for what, value, more, level in tiles)
            return f'<div class="tiles">{"".join(inside)}</div>'
        case Pictures(pictures):
            return f'<div class="pictures">{"".join(_picture(picture, drawings) for picture in pictures)}</div>'
        case Entry(at, kind, title, blocks):
            inside = "".join(_block(part, drawings) for part in blocks)
            return (f'<section class="entry {kind if kind in USUAL else "wrong"}"><h4><span>{_inline(at)}</span>'
                    f"{_inline(title)}</h4>{inside}</section>")
    raise TypeError(f"{type(block).__name__} is no block")


def _table(table: Table) -> str:
    def row(cells, tag: str) -> str:
        return "".join(f"<{tag}{_number(k, table)}>{_cell(cell)}</{tag}>" for k, cell in enumerate(cells))
    head = f"<thead><tr>{row(table.head, 'th')}</tr></thead>" if any(table.head) else ""
    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _number(column: int, table: Table) -> str:
    return ' class="number"' if column in table.numbers else ""


def _cell(cell: Cell) -> str:
    if isinstance(cell, Spark):
        return spark(cell.steps, cell.values, cell.low, cell.high, label=cell.words)
    if isinstance(cell, State):
        return f'<span class="state {cell.level}">{_inline(cell.text)}</span>'
    return _inline(cell)


def _picture(picture: Picture, drawings: Mapping[str, bytes] | None) -> str:
    wide = ' class="wide"' if picture.wide else ""
    label = html.escape(picture.alt)
    if drawings is not None:
        drawn = re.sub(r'(<svg[^>]*?) width="[\d.]+" height="[\d.]+"', r"\1", drawings[picture.name].decode(), count=1)
        return f'<figure{wide} role="img" aria-label="{label}">{drawn}</figure>'
    # A script element ends at the first "</script": inside JSON "<" can be said another way.
    data = json.dumps(json.loads(picture.figure.to_json()), separators=(",", ":")).replace("<", "\\u003c")
    height = int(picture.figure.layout.height)
    entries = sum(trace.showlegend is not False for trace in picture.figure.data)
    least = max(54 * min(entries, 16) + 80, 820) if picture.wide else NARROW  # below it a figure is scrolled
    return (f'<figure{wide} data-chart="{picture.name}" role="figure" aria-label="{label}">'
            f'<div style="height:{height}px;min-width:{least}px"></div></figure>'
            f'<script type="application/json" id="chart-{picture.name}">{data}</script>')


def _inline(text: str) -> str:
    def coded(part: str) -> str:
        return f"<code{' class=long' if len(part) > 40 else ''}>{html.escape(part)}</code>"
    return "".join(coded(part) if is_code else html.escape(part) for part, is_code in pieces(text))


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
