"""Figures as pictures, by kaleido and the Chrome or Chromium that it finds."""

from __future__ import annotations

from collections.abc import Sequence

from moe_core.checked import first_line
from widgets.report_blocks import Picture
from widgets.report_figures import NARROW, WIDE


class PictureError(RuntimeError):
    """No picture can be made here: why, and what would be needed."""


def pictures(wanted: Sequence[Picture], kind: str) -> dict[str, bytes]:
    """The files of the figures, by name. ``kind``: "png", at twice its size, or "svg". Raises PictureError."""
    if not wanted:
        return {}
    try:
        import kaleido
    except ImportError:
        raise PictureError(f"a {kind} of a chart needs kaleido: pip install kaleido") from None
    drawn = {}
    try:
        kaleido.start_sync_server(silence_warnings=True, mathjax=False)  # which it would fetch from the network
        try:
            for one in wanted:
                size = {"width": WIDE if one.wide else NARROW, "height": int(one.figure.layout.height)}
                drawn[one.name] = kaleido.calc_fig_sync(
                    one.figure.to_plotly_json(), opts={"format": kind, "scale": 2 if kind == "png" else 1, **size})
        finally:
            kaleido.stop_sync_server(silence_warnings=True)
    except Exception as error:  # a browser fails in many ways, and each is one to the person who wants a picture
        raise PictureError(f"no {kind} of a chart by kaleido, which needs Chrome or Chromium: "
                           f"{first_line(error)}") from error
    return drawn
