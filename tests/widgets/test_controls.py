import re
import threading
import time

import pytest

from widgets.controls import KnobControl, help_of
from widgets.notes import Log, NoteBox, Refusal


@pytest.fixture
def held(monkeypatch):
    """Makes a run's training wait before its next step until the returned event is set."""
    def hold(run):
        gate, advance = threading.Event(), run.advance
        monkeypatch.setattr(run, "advance", lambda **how: gate.wait(20) and advance(**how))
        return gate
    return hold


def control_of(run, name, log=None):
    return KnobControl(run.knobs[name], log or Log())


def test_a_turn_is_pending_until_it_is_applied_at_a_step(tiny_run, held):
    """Turned in mid-step: pending, then applied at the next step; rows have the value from that step on."""
    run = tiny_run()
    control, gate = control_of(run, "router_temp"), held(run)
    run.session.start(6)
    control.slider.value = 2.5
    assert "(pending)" in control.says.value
    assert control.mode.value == "hold"
    gate.set()
    assert run.session.wait(20)
    control.refresh()
    event, = run.events().to_dict("records")
    assert (event["name"], event["mode"], event["value"]) == ("router_temp", "hold", 2.5)
    assert f"applied at step {event['step']}" in control.says.value
    assert event["asked"] <= event["applied"]
    held_from = run.metrics()["router/temp"]
    assert (held_from.loc[event["step"] :] == 2.5).all()
    assert (held_from.loc[: event["step"] - 1] != 2.5).all()


def test_a_turn_at_rest_is_applied_to_the_next_step(tiny_run):
    run = tiny_run()
    control = control_of(run, "grad_clip")
    run.step(2)
    control.number.value = 0.25
    assert "applied at step 3" in control.says.value
    assert control.slider.value == 0.25


def test_a_wrong_value_is_refused_where_it_is_typed(tiny_run):
    run, log = tiny_run(), Log()
    control = control_of(run, "load_balance_alpha", log)
    control.number.value = -1
    assert "must be 0 to 100" in control.says.value
    assert "load_balance_alpha = -1.0: must be a number from 0 to 100" in log.widget.value
    assert control.number.value == pytest.approx(run.config.router.load_balance_alpha)
    assert run.events().empty
    control.number.value = 0.3
    assert "must be" not in control.says.value
    assert run.knobs["load_balance_alpha"].value == 0.3
    control.number.value = -1
    run.knobs["load_balance_alpha"].hold(0.4)  # from a cell: what was refused is no longer how things stand
    control.refresh()
    assert "must be" not in control.says.value and "applied at step 1" in control.says.value
    control.slider.value = 0.30000000000000004
    assert run.knobs["load_balance_alpha"].target == 0.3


def test_a_length_that_is_no_whole_number_is_refused_as_it_was_typed(tiny_run):
    run = tiny_run()
    control = control_of(run, "lr_scale")
    control.mode.value = "ramp"
    for typed in (1.5, 0, -5):
        control.over.value = typed
        assert "must be an integer, at least 1" in control.says.value
    control.over.value = 1.5
    control.number.value = 0.5
    assert "must be an integer" in control.says.value and run.events().empty
    control.over.value = 1e3
    assert "must" not in control.says.value
    control.number.value = 0.5
    assert (run.knobs["lr_scale"].over, len(run.events())) == (1000, 1)
    control.over.value = 8
    assert (run.knobs["lr_scale"].over, run.knobs["lr_scale"].target) == (8, 0.5)


@pytest.mark.parametrize(("changes", "words"), (
    ({}, "a top-1 choice"), ({"top_k": 2}, "which experts are picked"), ({"balance": "both"}, ""),
    ({"routing": "expert", "dropless": False, "balance": "none"}, "")))
def test_what_is_said_of_temperature_holds_for_the_runs_own_router(tiny, changes, words):
    said = help_of("router_temp", tiny(**changes))
    assert words in said and bool(said) == bool(words)
    assert help_of("grad_clip", tiny(**changes)) == ""


def test_a_ramp_waits_for_its_target(tiny_run):
    """Choosing ramp turns nothing; the value that is set next is ramped to, over the length beside it."""
    run = tiny_run()
    control = control_of(run, "lr_scale")
    assert control.over.layout.visibility == "hidden"
    control.mode.value = "ramp"
    assert control.over.layout.visibility == "visible"
    assert run.events().empty
    control.refresh()
    assert control.mode.value == "ramp"
    control.over.value = 4
    control.slider.value = 0.2
    run.step(2)
    control.refresh()
    assert (control.number.value, control.over.value, control.mode.value) == (0.2, 4, "ramp")  # where it goes
    run.step(3)
    lr_scale = run.metrics()["lr_scale"]
    assert lr_scale.to_list() == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])
    assert len(run.events()) == 1
    control.mode.value = "hold"
    assert run.knobs["lr_scale"].target == 0.2  # where it is, not where its schedule would be


def test_hold_keeps_the_present_value_and_follow_goes_back(tiny_run):
    run = tiny_run()
    control = control_of(run, "router_temp")
    run.step(3)
    present = run.knobs["router_temp"].value
    control.mode.value = "hold"
    run.step(2)
    knob = run.knobs["router_temp"]
    assert knob.value == present != knob.scheduled
    control.refresh()
    assert f"now <b>{present:.3g}</b></span><span>schedule {knob.scheduled:.3g}</span>" in control.says.value
    control.mode.value = "follow"
    assert run.knobs["router_temp"].value == run.knobs["router_temp"].scheduled
    assert run.events()["mode"].to_list() == ["hold", "follow"]


def test_a_turn_from_a_cell_shows_in_the_panel_and_turns_nothing_else(tiny_run):
    """Moving a control to what the run says is nobody's wish: it writes no event."""
    run = tiny_run()
    control = control_of(run, "router_z_loss_coef")
    run.knobs["router_z_loss_coef"].hold(1.5)  # beyond the slider's range
    control.refresh()
    assert (control.slider.value, control.number.value, control.mode.value) == (1.5, 1.5, "hold")
    run.step(1)
    run.knobs["router_z_loss_coef"].follow()
    control.refresh()
    assert control.mode.value == "follow"
    assert control.number.value == run.knobs["router_z_loss_coef"].scheduled
    run.knobs["router_z_loss_coef"].ramp(to=0.123456, over=7)
    control.refresh()
    assert (control.number.value, control.over.value, control.mode.value) == (0.1235, 7, "ramp")
    assert len(run.events()) == 3
    control.over.value = 9
    assert run.knobs["router_z_loss_coef"].target == 0.123456  # and not what the box has room for


def test_a_row_that_has_the_focus_does_not_move(tiny_run):
    """A schedule that goes on does not overwrite what a person is typing."""
    run = tiny_run()
    control = control_of(run, "router_temp")
    before = control.number.value
    run.step(3)
    control.refresh(focused=True)
    assert control.number.value == before
    control.refresh()
    assert control.number.value == pytest.approx(run.knobs["router_temp"].value, rel=1e-3)


def test_a_note_is_pinned_to_the_step_it_was_made_at(tiny_run):
    run, log = tiny_run(), Log()
    box = NoteBox(run, log)
    run.step(2)
    box.text.value = "  "
    box.button.click()
    assert run.events().empty
    box.text.value = "look <here>"
    box.button.click()
    note, = run.events().to_dict("records")
    assert (note["kind"], note["step"], note["text"]) == ("note", 2, "look <here>")
    assert box.text.value == ""


def test_the_log_says_which_of_several_turns_before_a_step_was_applied(tiny_run):
    """The last one of its knob alone, whether they are heard of together or one by one; another knob's is its own."""
    run = tiny_run()
    for heard in (lambda log: log.write_events(run.store.read_events()),
                  lambda log: [log.write_events([event]) for event in run.store.read_events()]):
        for name, value in (("router_temp", 9.0), ("grad_clip", 0.5), ("router_temp", 2.0)):
            run.knobs[name].hold(value)
        log = Log()
        heard(log)
        lines = re.findall(r"<span>([^<]*held[^<]*)</span>", log.widget.value)[:3]
        assert lines == ["Router temperature: held at 2 · applied at step 1",
                         "Gradient clip: held at 0.5 · applied at step 1",
                         "Router temperature: held at 9 · superseded before step 1"]
        run.step(1)
        run.rewind(0)


def test_the_log_supersedes_no_turn_of_another_step_or_branch_and_marks_what_went_wrong():
    """Where each line stands, newest first, at the time when it happened."""
    turn = {"kind": "knob", "name": "grad_clip", "mode": "hold", "value": 0.5}
    finding, fault = {"kind": "finding", "level": "alarm", "text": "one has all"}, "NonFiniteError: grad"
    events = [{"id": k, "step": step, "branch": branch, "kind": said["kind"], "payload": said, "applied": 60.0 * k}
              for k, (step, branch, said) in enumerate((
                  (1, "main", turn), (1, "b", turn), (2, "b", turn), (3, "b", finding | {"state": "here"}),
                  (4, "b", finding | {"state": "gone"}), (5, "b", {"kind": "nonfinite", "text": fault})))]
    log = Log()
    log.write_events(events[::-1])
    lines = re.findall(r"<div><span>(.*?)</span><span( class=\"moe-error\")?>(.*?)</span></div>", log.widget.value)
    assert [(words, bool(wrong)) for _, wrong, words in lines] == [
        ("Not finite: grad · step 5", True), ("Gone: one has all · step 4", False),
        ("Alarm: one has all · step 3", True),
        *((f"Gradient clip: held at 0.5 · applied at step {step}", False) for step in (2, 1, 1))]
    assert [clock for clock, *_ in lines] == [
        time.strftime("%H:%M:%S", time.localtime(60 * k)) for k in range(5, -1, -1)]


def test_the_log_shows_what_a_handler_raises_escaped_and_forgets_the_oldest():
    log, refused = Log(lines=3), Refusal()
    for i in range(5):
        log.guarded(lambda i=i: {}[f"<b>{i}</b>"], refused)()
    shown = log.widget.value
    assert "<b>" not in shown + refused.widget.value and "&lt;b&gt;4" in refused.widget.value
    assert [f"&lt;b&gt;{i}&lt;/b&gt;" in shown for i in range(5)] == [False, False, True, True, True]
    assert shown.index("&gt;4&lt;") < shown.index("&gt;3&lt;")  # the newest is on top
    assert "KeyError" in shown
