"""Every kind of block in every form: as it was typed, in its place, and nothing in it acts."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
from markdown_it import MarkdownIt

from widgets import report_html, report_markdown
from widgets.report_blocks import (
    Bullets,
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
    code,
    number,
)

BAD = ("</script><script>alert(1)</script><img src=x onerror=alert(2)> &amp; \"q\" 'p' [a](javascript:alert(3)) "
       "![b](http://c.invalid) **x** _y_ ~~z~~ | # 1\\*")


@pytest.fixture
def document():
    """Each kind of block with hostile words wherever words can stand; a name that was chosen is code."""
    figure = go.Figure(layout={"title": {"text": BAD}, "height": 100})
    spark = Spark(np.arange(3), np.arange(3.0), 1, None, BAD)
    rows = ((BAD, State(BAD, "alarm"), code(BAD)), (code(f"`{BAD}"), "2", spark))
    return Document(BAD, BAD, (
        Tiles(((BAD, BAD, BAD, "ok"),)), Heading(BAD), Heading(BAD, 3), Text(BAD), Text(code(BAD)), Bullets((BAD, BAD)),
        Table((BAD, "n", ""), rows, (1,)), Table(("", "|"), ((code("a | b"), "c | d"),)),
        Pictures((Picture("name", figure, BAD),)), Code(f"{BAD}\n```\n"), Text("two\n# lines"),
        Note(f"{BAD}\n\n```\n<b>\n\n**fenced**\n```"),
        Entry(BAD, "knob", BAD, (Text(BAD),)), Entry("step 1", "nonfinite", "wrong")))


class Page(HTMLParser):
    """What a browser would make of it: tags, attributes, what is read, and the JSON of its charts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.json = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        if self.cdata_elem is None:
            self.words.append(data)
        elif ("type", "application/json") in self.attributes[-2:]:
            self.json += data


def test_html_shows_hostile_words_as_they_are(document):
    page = Page(report_html.render(document))
    assert set(page.tags) == {
        "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "h4", "p", "nav", "a",
        "ul", "li", "pre", "code", "div", "section", "span", "b", "small", "table", "thead", "tbody", "tr", "th", "td",
        "svg", "rect", "polyline", "circle", "figure", "script", "footer"} | {"strong", "em", "s"}  # of a note
    assert page.tags.count("script") == 3  # plotly, what draws, and a chart's numbers
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert {value for name, value in page.attributes if name == "href"} == {
        "#script-script-alert-1-script-img-src-x-onerror-alert-2-amp-q-p-a-javascript-alert-3-b-http-c-invalid-x-y-z-1",
        "http://c.invalid"}
    shown = "".join(page.words)
    assert shown.count(BAD) == 22 and shown.count("alert(2)") == 23  # a note's own signs are Markdown
    assert [value for name, value in page.attributes if name == "aria-label"].count(BAD) == 2
    assert json.loads(page.json)["layout"]["title"]["text"] == BAD
    policy = next(value for _, value in page.attributes if value and "default-src" in value)
    assert re.fullmatch(r"default-src 'none'; script-src( 'sha256-[\w+/=]{44}'){2}; style-src 'unsafe-inline'; "
                        "img-src data: blob:; base-uri 'none'; form-action 'none'", policy)
    classes = [value for name, value in page.attributes if name == "class"]
    assert {"entry knob", "entry wrong", "state alarm", "tile ok"} <= set(classes) and classes.count("number") == 3


def test_markdown_shows_hostile_words_as_they_are(document):
    """As a reader that knows tables, strikethrough and HTML takes it."""
    text = report_markdown.render(document, "out <dir>")
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    inside = [child for token in tokens for child in token.children or ()]
    assert {token.content for token in inside if token.type == "html_inline"} == {"<code>", "</code>"}
    assert [token.content[:15] for token in tokens if token.type == "html_block"] == ["<blockquote><p>"]  # the note
    assert {token.type for token in inside} <= {"text", "text_special", "code_inline", "html_inline", "strong_open",
                                                "strong_close", "image"}
    shown = "".join(token.content for token in inside if token.type.startswith("text"))
    assert shown.count(BAD) == 18 and [token.type for token in tokens].count("heading_open") == 3
    image, = (token for token in inside if token.type == "image")
    assert image.attrs["src"] == "out%20%3Cdir%3E/name.png"
    bold = [inside[k + 1].content for k, token in enumerate(inside) if token.type == "strong_open"]
    assert len(bold) == 3 and bold[2] == "Step 1"  # of a tile and of each entry
    fence, = (token for token in tokens if token.type == "fence")
    assert fence.content == f"{BAD}\n```\n\n"
    cells = [token.type for token in tokens].count("td_open")
    assert cells == 2 * 2 + 2  # a small chart's column is left out, and a bar ends no cell
    assert "| <code>a &#124; b</code> | c \\| d |" in text
    assert [token.attrs.get("style") for token in tokens if token.type == "th_open"][:2] == [None, "text-align:right"]
    assert f"❌ {report_markdown.inline(BAD)}" in text and f"✅ {report_markdown.inline(BAD)}" in text


@pytest.mark.parametrize("value, said", [
    (1234.4, "1234"), (12345.6, "12,346"), (0.000123456, "0.0001235"), (float("nan"), "–"),
    (None, "–")])
def test_a_number_is_written_for_a_person(value, said):
    assert number(value) == said
