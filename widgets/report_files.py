"""A report's document as a file: which form its name asks for, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from widgets import report_html, report_markdown, report_notebook
from widgets.record import Record
from widgets.report_blocks import Document
from widgets.report_pictures import PictureError, pictures

FORMS = (".html", ".md", ".ipynb")


class ReportError(ValueError):
    """A report that cannot be: one line with the field, the value and what would be right."""


def save(whole: Document, records: Sequence[Record], out: str | os.PathLike, static: bool = False) -> Path:
    """A document as the file that its name's end asks for. Raises ReportError, PictureError."""
    out = checked(out)
    if out.suffix == ".html":
        _put(out, report_html.render(whole, pictures(whole.pictures(), "svg") if static else None))
    elif out.suffix == ".md":
        folder = out.with_name(f"{out.stem}_files")
        drawn = pictures(whole.pictures(), "png")
        if drawn:
            folder.mkdir(exist_ok=True)
        for name, png in drawn.items():
            _put(folder / f"{name}.png", png)
        _put(out, report_markdown.render(whole, folder.name))
    else:
        try:
            drawn = pictures(whole.pictures(), "png")
        except PictureError:
            drawn = {}  # its cells draw them when they run
        _put(out, report_notebook.render(whole, records, out, drawn))
    return out


def checked(out: str | os.PathLike) -> Path:
    """``out`` as a path that a report can go to. Raises ReportError."""
    out = Path(out)
    if out.suffix not in FORMS:
        raise ReportError(f"out = {str(out)!r}: must end in {', '.join(FORMS)}")
    if not out.parent.is_dir():
        raise ReportError(f"out = {str(out)!r}: there is no folder {str(out.parent)!r}")
    return out


def _put(path: Path, content: str | bytes) -> None:
    """Whole or not at all. Raises ReportError."""
    try:
        _written(path, content)
    except OSError as error:
        raise ReportError(f"{path}: not written: {error.strerror or error}") from error


def _written(path: Path, content: str | bytes) -> None:
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode(errors="replace") if isinstance(content, str) else content)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
