"""The coloured text and the charts show what the inspection holds, whatever the text is, and nothing in it acts."""

import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from lab_server import chromium_page

from widgets import specialisation
from widgets.charts import expert_colors
from widgets.figures import figure
from widgets.specialisation import Specialisation, TokenView, overview
from widgets.token_html import _chip, section_html

HOSTILE = ("<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">\n"
           "</div></style><b>bold</b> & \"quotes\" 'single' \u202eevil\u2066 \x00\x1b[31m \ufeff"
           "naïve 🧿👩‍🚀 漢字\n\tend `${1}`")


class Page(HTMLParser):
    """What a page would show: each token's classes, title and text, and every tag and attribute there is."""

    def __init__(self, text):
        super().__init__()
        self.tokens, self.tags, self.attributes, self._in = [], set(), set(), False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "span" and dict(attributes).get("class", "").startswith("l0"):
            self.tokens.append({**dict(attributes), "text": ""})
            self._in = True

    def handle_endtag(self, tag):
        self._in &= tag != "span"

    def handle_data(self, data):
        if self._in:
            self.tokens[-1]["text"] += data


@pytest.fixture
def inspected(tiny_run):
    """An inspection of two documents by a run of one step; any field of the run's config can be changed."""
    def make(texts=None, **changes):
        run = tiny_run(f"run-{random.random()}", **changes)
        run.step(1)
        return run.inspect(texts or {"code": "def f(x):\n    return 'naïve 🧿'\n", HOSTILE: HOSTILE})
    return make


@pytest.mark.parametrize("changes", ({}, dict(top_k=2, dropless=False, capacity_factor=0.4)), ids=("one", "two"))
def test_each_token_is_in_the_class_of_its_expert_in_every_layer(inspected, changes):
    """First and second pick, what was dropped, and in the tooltip every pick with its weight."""
    found = inspected(**changes)
    tokens = Page(section_html(found)).tokens
    assert len(tokens) == len(found.token_ids)
    dropped = 0
    for at, token in enumerate(tokens):
        for layer in range(found.n_layer):
            picks, kept = found.experts[layer, at], found.kept[layer, at]
            want = [f"l{layer}e{picks[0]}", *(f"l{layer}s{e}" for e in picks[1:2])]
            want += [f"l{layer}d"] * (not kept.any())
            assert [name for name in token["class"].split() if name[:2] == f"l{layer}"] == want
            line = token["title"].split("\n")[1 + layer]
            assert line.startswith(f"layer {layer}: ") and all(
                f"{e} ({w:.2f}{'' if k else ' dropped'})" in line
                for e, w, k in zip(picks, found.weights[layer, at], kept, strict=True))
            dropped += not kept.any()
    assert (dropped > 0) == (not changes.get("dropless", True))
    form = r'<table class="typical at(\d)"><thead><tr><th>layer (\d).*?<tbody>(.*?)</table>'
    tables = re.findall(form, section_html(found))
    assert [(at, layer) for at, layer, _ in tables] == [("0", "0"), ("1", "1")]
    for layer, (*_, inside) in enumerate(tables):
        rows = re.findall(r'expert (\d+)</th><td class="share">(.*?)</td><td>(.*?)</td></tr>', inside)
        assert [(e, share) for e, share, _ in rows] == [
            (str(e), f"{share:.1%}") for e, share in enumerate(found.shares()[layer])]
        for expert, (*_, chips) in enumerate(rows):
            assert re.findall('title="(.*?)"', chips) == [
                f"{row['count']} of {row['total']}, {row['lift']:.1f} times its share, z {row['z']:.1f}"
                for _, row in found.tokens_of(layer, expert, 8).iterrows()]
            assert re.findall('">([^<]*)</span>', chips) == list(map(_chip, found.tokens_of(layer, expert, 8)["token"]))
    assert _chip("'<b>  x'") == "&lt;b&gt;␣␣x" and _chip("b'\\xff'") == "b&#x27;\\xff&#x27;"


def test_a_hostile_text_is_shown_whole_and_is_inert(inspected):
    """No tag or attribute comes of a text or a kind; what it says can be read back; what hides is shown by its code."""
    page = Page(section_html(found := inspected()))
    assert page.tags == {"div", "style", "span", "input", "label", "br", "p", "i", "small", "table", "thead", "tbody",
                         "tr", "th", "td"}
    assert not [name for name in page.attributes if name.startswith("on")]
    bytes_shown = re.compile(r"(?:[0-9A-F]{2} )+")
    shown = "".join(t["text"] for t, piece in zip(page.tokens, found.pieces, strict=True) if piece)
    want = "def f(x):\n    return 'naïve 🧿'\n" + HOSTILE
    for char in "\u202e\u2066\x00\x1b\ufeff\u200d":
        want = want.replace(char, f"\\u{{{ord(char):x}}}")
    assert shown == want
    parts = [t["text"] for t, piece in zip(page.tokens, found.pieces, strict=True) if not piece]
    assert parts and all(map(bytes_shown.fullmatch, parts))
    assert "".join(t["text"] for t in page.tokens).count("🧿") == 2


def test_the_text_is_bounded_and_says_so(inspected):
    found = inspected("one two three\n" * 40)
    for tokens in (1, 17):
        page = section_html(found, tokens=tokens)
        assert len(Page(page).tokens) == tokens and f"the first {tokens} of {len(found.token_ids):,} tokens" in page
    deep = replace(found, **{name: np.repeat(getattr(found, name), 300, 0) for name in ("experts", "weights", "kept")},
                   blocks=tuple(range(600)))
    assert len(Page(section_html(deep, typical=0)).tokens) == 30_000 // 600


def test_charts_draw_what_the_tables_say(inspected):
    """Bars of normalised mutual information, a cell of lift for each pair that is not too rare, a line a layer."""
    found = inspected(n_layer=3)
    table = found.mutual_information()
    bars = specialisation.information(found).traces
    assert [bar["uid"] for bar in bars] == ["information-token-class", "information-document-kind"]
    for bar, (_, rows) in zip(bars, table.groupby("about", sort=False), strict=True):
        np.testing.assert_allclose(np.array(bar["y"], float), rows["normalised"], rtol=1e-6)
        np.testing.assert_allclose(bar["customdata"], rows[["nats", "chance", "spread"]])
        ratio = rows["normalised"] / rows["nats"]
        np.testing.assert_allclose(np.array(bar["error_y"]["array"], float), 2 * rows["spread"] * ratio, rtol=1e-5)
    counts, lift = found.coactivation(1)
    chart = specialisation.coactivation(found, 1)
    assert chart.traces[0]["hovertemplate"].startswith("expert %{y} in layer 1, %{x} in layer 2<br>")
    assert (chart.y["title"], chart.x["title"]) == ("expert in layer 1", "expert in layer 2")
    heat = np.array(chart.traces[0]["z"], float)
    drawn = ~np.isnan(heat)
    assert drawn.any()
    np.testing.assert_array_equal(drawn, (counts / lift >= 5).to_numpy() | ((counts == 0) & (np.outer(
        counts.sum(axis=1), counts.sum(axis=0)) / counts.to_numpy().sum() >= 5)).to_numpy())
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(heat[drawn], np.clip(np.log2(lift.to_numpy()[drawn]), -2, 2))
    assert [t.uid for t in overview(found).data] == [*(b["uid"] for b in bars), "coactivation-0", "coactivation-1"]


def test_saturation_is_drawn_to_the_step_that_it_is_compared_with(tiny_run):
    run = tiny_run(save_interval=1)
    run.step(3)
    table = run.saturation()
    assert set(table["step"]) == {0, 1, 2} and set(table["compared_with"]) == {3}
    lines = specialisation.saturation(table).traces
    for layer, line in enumerate(lines):
        assert line["x"].tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(line["y"], [*table[table["layer"] == layer]["saturation"], 1.0], rtol=1e-6)
    figure(specialisation.saturation(table.iloc[:0])).to_json()
    drawn = overview(run.inspect(), since=table)
    assert {line["uid"] for line in lines} < {trace.uid for trace in drawn.data}
    assert drawn.layout.xaxis2.matches is None  # steps do not move with the layers beside them


def test_a_view_holds_the_text_and_the_charts(inspected):
    """Without a page: one text, one figure, both of the inspection, and buttons of its own."""
    found = inspected()
    one, two = Specialisation(found, layer=1), Specialisation(found)
    assert isinstance(one.text, TokenView) and one.text.layer == 1 and one.text.uid != two.text.uid
    assert one.text.html == section_html(found, layer=1, uid=one.text.uid)
    drawn, want = one.children[1], overview(found)
    assert [note.text for note in drawn.layout.annotations] == [note.text for note in want.layout.annotations]
    np.testing.assert_array_equal(drawn.data[0].y, want.data[0].y)


@pytest.mark.parametrize("page_color", ("#ffffff", "#111111"), ids=("light", "dark"))
def test_in_a_real_page_the_layer_buttons_recolour_the_text_without_a_script(inspected, page_color):
    """Each token has its expert's colour in the layer chosen, legible letters, and nothing of the text has run."""
    found = inspected()
    colors = expert_colors(found.n_experts)
    with chromium_page() as page:
        page.context.set_offline(True)
        letters = "#111111" if page_color == "#ffffff" else "#eeeeee"
        page.set_content(f'<title>whole</title><body style="background:{page_color};color:{letters}">'
                         f"{section_html(found)}{section_html(found)}")
        section = page.locator(".moe-spec").nth(1)
        for layer in (1, 0):
            section.locator(f'label[title^="layer {layer} "]').click()
            seen = section.locator(".text span").evaluate_all(
                "spans => spans.map(s => [getComputedStyle(s).getPropertyValue('--c'),"
                " getComputedStyle(s).backgroundColor])")
            assert [color for color, _ in seen] == [f"var(--e{e})" for e in found.experts[layer, :, 0]] or [
                color.strip() for color, _ in seen] == [colors[e] for e in found.experts[layer, :, 0]]
            for _, background in seen:
                *rgb, alpha = map(float, re.findall(r"[\d.]+", background.removeprefix("color(srgb")))
                assert contrast(rgb, alpha, page_color, letters) > 4.5  # WCAG 2, level AA
            shown = section.locator("table.typical").evaluate_all(
                "tables => tables.map(t => getComputedStyle(t).display !== 'none')")
            assert shown == [layer == 0, layer == 1]
        assert page.locator(".moe-spec").nth(0).locator("input.i0").is_checked()  # each piece has its own buttons
        section.locator('label[title="bring out expert 2"]').click()
        dim = section.locator(".text span").evaluate_all("spans => spans.map(s => getComputedStyle(s).opacity < 1)")
        assert dim == [bool(e != 2) for e in found.experts[0, :, 0]]
        assert page.title() == "whole"


def contrast(rgb, alpha, page_color, letters):
    """Contrast of letters on a colour laid over the page, as WCAG 2 defines it."""
    def light(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def parsed(code):
        return [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    over = [alpha * c + (1 - alpha) * p for c, p in zip(rgb, parsed(page_color), strict=True)]
    dark, bright = sorted((light(over), light(parsed(letters))))
    return (bright + 0.05) / (dark + 0.05)
