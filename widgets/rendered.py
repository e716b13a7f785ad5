"""What a person wrote in Markdown, as HTML that can do nothing, and as Markdown that can do nothing.

HTML in it is text; links lead to http and https alone; pictures, which would reach for the network, are links.
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.token import Token

_WEB = re.compile(r"https?://", re.IGNORECASE)


def _reader(html: bool) -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": html}).enable(["table", "strikethrough"])
    reader.validateLink = lambda url: bool(_WEB.match(url))
    return reader


_SAFE, _FREE = _reader(html=False).disable("image"), _reader(html=True)
_FREE.validateLink = lambda url: True  # to see every link that another reader might make


def note_html(text: str) -> str:
    """The note as HTML: tags that Markdown makes, everything else escaped."""
    return _SAFE.render(text)


def note_markdown(text: str) -> str:
    """The note as a quotation in Markdown; as HTML on one line where another reader could make more of it."""
    quoted = "\n".join(f"> {line}".rstrip() for line in text.splitlines())
    if not any(_could_act(token) for token in _FREE.parse(quoted)):
        return quoted
    # A line of HTML ends only at a blank line: in code a newline is an entity, elsewhere it is a space anyway.
    return f"<blockquote>{note_html(text).strip().replace(chr(10), '&#10;')}</blockquote>"


def _could_act(token: Token) -> bool:
    link = token.attrGet("href") if token.type == "link_open" else None
    return (token.type in ("html_block", "html_inline", "image") or (link is not None and not _WEB.match(str(link)))
            or any(_could_act(child) for child in token.children or ()))
