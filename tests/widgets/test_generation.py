"""The view that writes: what it shows is what the run generates, coloured by expert, inert, and it can be stopped."""

import re
import time

import pytest

from widgets.charts import expert_colors
from widgets.generation import Writing
from widgets.token_html import written_html

HOSTILE = "<script>alert(1)</script></style>&\u202e"


@pytest.fixture
def writing(tiny_run):
    """A view of a run of one step; it is closed afterwards."""
    made = []

    def make(prompt="def f", **changes):
        run = tiny_run(**changes)
        run.step(1)
        made.append(Writing(run, prompt))
        return made[-1]
    yield make
    for view in made:
        view.close()
        assert view.wait(20)


def test_it_shows_what_the_run_generates(writing):
    """To the token, at the controls' values; the finished text can be looked into in every layer."""
    view = writing(HOSTILE, block_size=64)
    view.tokens.value, view.temperature.value, view.top_k.value, view.seed.value = 9, 0.8, 20, 3
    view.write.click()
    assert view.wait(60) and "9 tokens" in view.said.value
    expected = view.run.generate(HOSTILE, 9, temperature=0.8, top_k=20, seed=3)
    assert view.text.text == expected.text
    [shown] = view.shown.children
    assert shown.html.count('type="radio" class="i') == 2 and "<script" not in shown.html + view.page.value
    assert not view.write.disabled and view.halt.disabled


def test_each_token_on_its_way_has_the_colour_of_its_expert(writing):
    """In the layer that is chosen, in order, the prompt faint."""
    text = writing().run.generate("def f(x):\n", 8)
    found = written_html(text.inspection(), 1, text.n_prompt)
    spans = re.findall(r'<span style="--c:var\(--e(\d+)\)(;opacity:.6)?">', found)
    assert [int(e) for e, _ in spans] == text.experts[1, :, 0].tolist()
    assert [bool(faint) for _, faint in spans] == [True] * text.n_prompt + [False] * 8
    assert all(f"--e{e}:{color}" in found for e, color in enumerate(expert_colors(4)))


def test_it_can_be_stopped_and_started_again(writing):
    """Stop leaves what there is; the next text is whole."""
    view = writing(block_size=128, batch_size=1)
    view.start()
    while view.text is None:
        time.sleep(0.01)
    view.stop()
    assert view.wait(20)
    assert len(view.text.token_ids) < 128
    view.tokens.value = 5
    view.start()
    assert view.wait(20) and len(view.text.token_ids) == view.text.n_prompt + 5


def test_what_cannot_be_written_is_said_in_the_view(writing):
    """A prompt that is too long, in one line; the buttons are ready again. A dense model's text has no colours."""
    view = writing("word " * 200, n_experts=0)
    view.start()
    assert view.wait(20) and "must be at most 31" in view.said.value and not view.write.disabled
    view.prompt.value, view.tokens.value = "a < b", 3
    view.start()
    assert view.wait(20) and "a &lt; b" in view.page.value and "3 tokens" in view.said.value
