import pandas as pd
import pytest

from widgets.marks import Marks, say


def events(*rows):
    return pd.DataFrame([{"text": None, "name": None, **row} for row in rows])


@pytest.mark.parametrize(("event", "words"), (
    (dict(kind="knob", name="router_temp", mode="hold", value=1.3), "Router temperature: held at 1.3"),
    (dict(kind="knob", name="router_noise_std", mode="ramp", value=0.1, over=50.0),
     "Router noise: ramps to 0.1 over 50 steps"),
    (dict(kind="knob", name="lr_scale", mode="follow", value=float("nan")),
     "Learning-rate scale: follows its schedule"),
    (dict(kind="note", text="sharper now"), "Note: sharper now"),
    (dict(kind="checkpoint", name="before sharpening", text=None), "Checkpoint: before sharpening"),
    (dict(kind="error", text="RuntimeError: no memory"), "Error: RuntimeError: no memory"),
))
def test_an_event_says_what_it_was(event, words):
    assert say(event) == words


def test_each_step_has_one_mark_that_says_all_of_it():
    """Marks stand at their steps, in order; what shares a step shares a mark, which shows the gravest of it."""
    marks = Marks.of(events(
        dict(step=9, kind="note", text="late"), dict(step=4, kind="note", text="first"),
        dict(step=4, kind="knob", name="grad_clip", mode="hold", value=0.5),
        dict(step=12, kind="error", text="stopped"), dict(step=12, kind="note", text="why?"),
        dict(step=13, kind="mirror", text="shown elsewhere")))  # no more than the log needs to say
    assert marks.steps == (4, 9, 12)
    assert marks.symbols == ("diamond", "circle", "x")
    assert marks.texts[0] == "<b>step 4</b><br>Note: first<br>Gradient clip: held at 0.5"
    trace = marks.trace("#000")
    at_bottom = trace["y"] == 0
    assert trace["x"][at_bottom].tolist() == [4, 9, 12]
    assert [trace["text"][i] for i in at_bottom.nonzero()[0]] == list(marks.texts)


def test_a_users_words_are_never_html():
    hostile = "<img src=x onerror=alert(1)> a&b " + "word " * 30
    text, = Marks.of(events(dict(step=1, kind="note", text=hostile))).texts
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; a&amp;b" in text
    assert text.count("<br>") >= 3  # long lines are broken, by our own breaks
