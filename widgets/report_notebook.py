"""A report as a notebook that draws its figures again from the run's store."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from widgets.record import Record
from widgets.report_blocks import Document, Heading, Picture, Pictures
from widgets.report_markdown import block_text, inline


def render(document: Document, records: Sequence[Record], out: Path, drawings: Mapping[str, bytes]) -> str:
    """The file's text. ``drawings``: PNG by a picture's name, stored as outputs; those without one run first."""
    cells = [new_markdown_cell(f"# {inline(document.title)}\n\n{inline(document.subtitle)}"),
             new_code_cell(_loading(records, out))]
    words: list[str] = []

    def say() -> None:
        if words:
            cells.append(new_markdown_cell("\n\n".join(words)))
            words.clear()
    for block in document.blocks:
        if isinstance(block, Heading) and block.level == 2:
            say()
        if isinstance(block, Pictures):
            say()
            cells += [(_drawing if picture.again else _shown)(picture, drawings.get(picture.name))
                      for picture in block.pictures]
        else:
            words.append(block_text(block, _no_picture))
    say()
    for k, cell in enumerate(cells):
        cell["id"] = f"report-{k}"  # the same report is the same file
    kernel = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
              "language_info": {"name": "python"}}
    notebook = new_notebook(cells=cells, metadata=kernel)
    nbformat.validate(notebook)
    return nbformat.writes(notebook)


def _loading(records: Sequence[Record], out: Path) -> str:
    lines = ["from widgets import compare", "from widgets.record import Record",
             "from widgets.report_figures import draw", "", "# Each is read from its store alone, while it trains too."]
    lines += ["runs = ["] + [f"    Record.read({_path(record, out)!r}, branch={record.branch!r}, told=False),"
                             for record in records] + ["]"]
    return "\n".join([*lines, "figures = draw(runs[0]) | (compare.draw(runs) if len(runs) > 1 else {})"])


def _path(record: Record, out: Path) -> str:
    """From the notebook's folder, so that both can be moved together."""
    try:
        return Path(os.path.relpath(record.path.resolve(), out.resolve().parent)).as_posix()
    except ValueError:  # on another drive
        return str(record.path.resolve())


def _drawing(picture: Picture, png: bytes | None) -> dict:
    cell = new_code_cell(f"figures[{picture.name!r}]")
    if png is not None:
        cell.outputs.append(new_output("display_data", {"image/png": base64.b64encode(png).decode(),
                                                        "text/plain": picture.alt}))
    return cell


def _shown(picture: Picture, png: bytes | None) -> dict:
    """A picture inside a cell of text."""
    if png is None:
        return new_markdown_cell(f"{inline(picture.alt)}: not drawn, for want of kaleido and Chrome or Chromium.")
    name = f"{picture.name}.png"
    return new_markdown_cell(f"![{inline(picture.alt)}](attachment:{name})",
                             attachments={name: {"image/png": base64.b64encode(png).decode()}})


def _no_picture(picture: Picture) -> str:
    raise TypeError(f"{picture.name} is drawn by a cell")
