import pandas as pd
import plotly.graph_objects as go
import pytest

from moe_core.knobs import KNOBS
from widgets.marks import FEW, KNOB_TITLES, LINES, MOST, Marks, say


def events(*rows):
    return pd.DataFrame([{"text": None, "name": None, **row} for row in rows])


@pytest.mark.parametrize(("event", "words"), (
    (dict(kind="knob", name="router_temp", mode="hold", value=1.3), "Router temperature: held at 1.3"),
    (dict(kind="knob", name="router_noise_std", mode="ramp", value=0.125, over=50.0),
     "Router noise: ramps to 0.125 over 50 steps"),
    (dict(kind="knob", name="lr_scale", mode="follow", value=float("nan")),
     "Learning-rate scale: follows its schedule"),
    (dict(kind="knob", name="grad_clip", mode="hold", value=0.12345, finding="clipping"),
     "Gradient clip: held at 0.1235, in answer to clipping"),
    (dict(kind="finding", state="here", level="watch", text="too flat"), "Watch: too flat"),
    (dict(kind="finding", state="gone", level="alarm", text="too flat"), "Gone: too flat"),
    (dict(kind="note", text="sharper now"), "Note: sharper now"),
    (dict(kind="checkpoint", name="before sharpening", text=None), "Checkpoint: before sharpening"),
    (dict(kind="checkpoint", name="step 4", step=4), "Checkpoint"),
    (dict(kind="branch", text="branch sharp from step 4", step=4), "Branch sharp from step 4"),
    (dict(kind="nonfinite", text="NonFiniteError: step 9: grad is nan"), "Not finite: step 9: grad is nan"),
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
        dict(step=13, kind="mirror", text="shown elsewhere"),  # no more than the log needs to say, as are these
        *(dict(step=14, kind="finding", state=state, level=level, text="")
          for state, level in (("gone", "alarm"), ("here", "watch"))),
        dict(step=15, kind="finding", state="here", level="alarm", text="one expert has all")))
    assert marks.steps == (4, 9, 12, 15)
    assert marks.symbols == ("diamond", "circle", "x", "triangle-down")
    assert marks.texts[0] == "<b>step 4</b><br>Note: first<br>Gradient clip: held at 0.5"
    trace = marks.trace("#000000")
    at_bottom = trace["y"] == 0
    assert trace["x"][at_bottom].tolist() == [4, 9, 12, 15]
    assert [(trace["text"][i], trace["marker"]["opacity"][i]) for i in at_bottom.nonzero()[0]] == [
        (text, 1) for text in marks.texts]
    assert sum(trace["marker"]["opacity"]) == 4
    assert KNOB_TITLES.keys() == KNOBS.keys() and len(set(KNOB_TITLES.values())) == len(KNOBS)


def test_the_lines_of_many_marks_are_pale_and_the_marks_are_not():
    for n, alpha in ((0, 255), (FEW, 255), (2 * FEW, 128), (100 * FEW, 38)):
        trace = Marks(tuple(range(n)), ("circle",) * n, ("",) * n).trace("#9467bd")
        assert (trace["line"]["color"], trace["marker"]["color"]) == (f"#9467bd{alpha:02x}", "#9467bd")
        go.Scatter(trace)  # which plotly takes


def test_a_turn_whose_knob_is_turned_again_before_its_step_is_marked_superseded():
    turns = [dict(step=8, kind="knob", name=name, mode="hold", value=value)
             for name, value in (("router_temp", 9), ("grad_clip", 0.5), ("router_temp", 2))]
    text, _ = Marks.of(events(*turns, dict(step=9, kind="knob", name="router_temp", mode="follow"))).texts
    assert text.replace("<br>", " ") == (
        "<b>step 8</b> Router temperature: held at 9 (superseded before the step) Gradient clip: held at 0.5 "
        "Router temperature: held at 2")


def test_what_is_hovered_is_never_longer_than_a_chart_is_tall():
    """A long note is cut, and so is a long list of events; neither is where it is short."""
    long = dict(step=1, kind="note", text="word " * 200)
    assert Marks.of(events(long)).texts[0].count("<br>") == LINES
    text = Marks.of(events(*(dict(step=1, kind="note", text=f"short {k}") for k in range(MOST + 3)))).texts[0]
    assert text.count("short") == MOST and "short 0" in text and text.endswith("and 3 more, in the log")


def test_a_users_words_are_never_html():
    hostile = "<img src=x onerror=alert(1)> a&b " + "word " * 30
    text, = Marks.of(events(dict(step=1, kind="note", text=hostile))).texts
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; a&amp;b" in text
    assert text.count("<br>") >= 3  # long lines are broken, by our own breaks
