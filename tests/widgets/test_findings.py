import html
import re

import numpy as np
import pytest

from moe_core import health
from moe_core.health import RULES, Reading, Rule, healthy_band, spike
from moe_core.rules import move
from widgets import report_contents
from widgets.findings import LASTS, Findings
from widgets.notes import Log
from widgets.record import Record
from widgets.spark import HEIGHT, POINTS, WIDTH
from widgets.spark import spark as draw


@pytest.fixture
def panel(tiny_run):
    """A run and its findings; ``look`` as the panel's thread does."""
    def make(**changes):
        run, log = tiny_run(**changes), Log()
        findings = Findings(run, log)
        return run, findings, log
    return make


@pytest.fixture
def rules(monkeypatch):
    """Only these rules, for a test."""
    def only(*chosen):
        monkeypatch.setattr("moe_core.health.RULES", list(chosen))
    return only


def high_loss(level, above, name="high loss"):
    """Fires while any of the last 50 steps has a cross-entropy above the line; its words may be hostile."""
    return Rule(name, "train/ce", level, spike(above=above, enough=1), "train/ce <b>is</b> {value:.2f}",
                RULES[0].levers)


def told(run):
    return [(e["step"], e["state"], e["level"], e["rule"]) for e in run.events().to_dict("records")
            if e["kind"] == "finding"]


def press(findings, rule, knob):
    """Click the button that turns ``knob`` in the row of ``rule``."""
    row = next(row for row in findings.view.rows if row["rule"] == rule)
    keys = map(html.unescape, re.findall(r'data-lever="([^"]*)"', row["levers"]))
    key = next(key for key in keys if key.split("|")[2].startswith(knob))
    findings.view._handle_custom_msg({"lever": key}, [])


def test_a_collapse_in_training_is_found_at_once_and_apply_brings_the_router_back(panel):
    """Alpha 0 at a low temperature: an alarm before 20 collapsed steps; left alone it goes on, answered it ends."""
    run, findings, _ = panel(n_experts=8, load_balance_alpha=0.0, router_temp_init=0.05, router_temp_final=0.05,
                             router_noise_std_init=0.0, learning_rate=3e-2, seed=2)
    while not any(row["rule"] == "collapsed" for row in findings.view.rows):
        run.step(5)
        findings.look(run.current_step, busy=False)
        assert run.metrics()["router/collapsed"].sum() < 20
    found, row = run.health()[0], findings.view.rows[0]
    assert (row["rule"], row["level"], findings.view.summary.count("alarm")) == ("collapsed", "alarm", 2)
    at = run.current_step
    run.step(100)
    assert run.metrics()["router/collapsed"].loc[at + 51 :].sum() > 10
    run.rewind(at)
    findings.look(at, busy=False)
    for lever in found.levers:
        press(findings, "collapsed", lever.knob)
    findings.look(at, busy=False)
    assert "data-lever" not in findings.view.rows[0]["levers"]  # answered: not again before its effect is seen
    run.step(100)
    assert run.metrics()["router/collapsed"].loc[at + 51 :].sum() == 0
    findings.look(run.current_step, busy=False)
    assert not any(row["rule"] == "collapsed" for row in findings.view.rows)
    turned = run.events().query("kind == 'knob'")
    assert turned[["name", "value", "finding"]].to_numpy().tolist() == [
        [lever.knob, pytest.approx(lever.value_to), "collapsed"] for lever in found.levers]
    assert [state for _, state, _, rule in told(run) if rule == "collapsed"] == ["here", "gone"]


def test_what_apply_offers_at_rest_begins_at_what_the_knob_was_turned_to(panel, rules):
    """Turned from a cell between two steps: the button's own numbers follow, without a step. A page that still shows
    the last ones turns to what they say; older ones turn nothing."""
    run, findings, log = panel(top_k=2, norm_topk_prob=True)
    lever = move("grad_clip", 0.5)
    rules(Rule("high loss", "train/ce", "alarm", spike(above=0.1, enough=1), "of {K} in {E}", (lever,)))
    run.step(2)
    shown = []
    for value in (0.2, 0.3, 0.4):
        run.knobs["grad_clip"].hold(value)
        findings.look(2, busy=False)
        row = findings.view.rows[0]
        assert re.search(f"{value}0* →", row["levers"]) and "of 2 in 4" in row["says"]
        shown.append(re.search('data-lever="([^"]*)"', row["levers"])[1])
    for key, value in ((shown[0], 0.4), (shown[1], 0.8)):
        findings.view._handle_custom_msg({"lever": html.unescape(key)}, [])
        assert run.knobs["grad_clip"].target == value
    assert "Apply: the finding has changed since; nothing was turned" in log.widget.value
    findings.look(2, busy=False)
    assert "data-lever" not in findings.view.rows[0]["levers"]
    run.rewind(1)  # where it was not answered
    findings.look(1, busy=False)
    assert "data-lever" in findings.view.rows[0]["levers"]


def test_a_script_applies_what_the_button_applies(tiny_run):
    """Its turns say what they answer, in the report once a step, though no panel wrote the finding down."""
    run = tiny_run()
    run.step(1)
    run._trainer.model.blocks[0].mlp.router.bias.data[1] += 9.0
    run.step(2)
    found = run.health()[0]
    health.answer(run, found, found.levers[0])
    assert run.knobs[found.levers[0].knob].value == pytest.approx(found.levers[0].value_to)
    assert run.events().iloc[-1][["finding", "why"]].tolist() == [found.rule, found.text]
    assert len(run.events()) == 1
    health.answer(run, found)
    assert str(report_contents._timeline(Record.read(run))).count(f"In answer to: {found.text}.") == 1


def test_findings_come_and_go_in_the_log_once_each(panel, rules):
    """An alarm counts when it is read, a watch when it is read twice, and either is gone when it stayed away."""
    run, findings, _ = panel()
    rules(high_loss("alarm", 6.0), high_loss("watch", 0.1, "any loss"))
    for _ in range(4):
        run.step(1)
        findings.look(run.current_step, busy=False)
        findings.look(run.current_step, busy=False)  # nothing is new: nothing is read
    assert told(run) == [(1, "here", "alarm", "high loss"), (2, "here", "watch", "any loss")]
    rules(high_loss("watch", 0.1, "any loss"))
    for step in (5, 10, 4 + LASTS):
        run.step(step - run.current_step)
        findings.look(step, busy=False)
    assert told(run)[2:] == [(4 + LASTS, "gone", "alarm", "high loss")]
    assert "<b>is" not in str(findings.view.rows) + findings.view.summary
    assert "&lt;b&gt;is&lt;/b&gt;" in findings.view.rows[0]["says"]


def test_a_row_says_the_worst_where_else_it_is_and_what_each_button_turns_until_it_has_gone(panel, rules):
    """An alarm of each layer beside a watch of both: eased when it stayed away, past, then gone; its words are text."""
    run, findings, _ = panel(router_temp_init=1.3, router_temp_final=1.3)
    run.step(3)
    seen = {("alarm", 0): 0.75, ("alarm", 1): 0.625, ("watch", None): 0.5}

    def rule(name, level, turn):
        def test(view):
            value = seen.get((level, view.layer)) if name == "<r>" else seen.get(name)
            return None if value is None else Reading("sustained", value, 2, 3, None, 0.4)
        return Rule(name, "router/max_frac_mean", level, test, "takes <{value}>", (turn,), "once <calm>")

    def of_r():
        return [(state, level) for _, state, level, rule in told(run) if rule == "<r>"]
    temp = move("router_temp", 0.3)
    rules(rule("<r>", "alarm", temp), rule("<r>", "watch", temp), rule("mine", "watch", move("grad_clip", 1.0)),
          rule("fine", "ok", temp))
    seen |= {"mine": 0.6, "fine": 0.1}
    findings.look(3, busy=False)
    first, second = findings.view.rows
    assert (first["rule"], first["level"], second["rule"], second["level"]) == ("<r>", "alarm", "mine", "watch")
    assert first["says"] == (
        "<b>alarm</b> layer 0: takes &lt;0.75&gt;<small>router/max_frac_mean/layer_0 · steps 2 to 3 · also layer 1 "
        "(0.625), all layers (0.5)</small><small>Undo: once &lt;calm&gt;.</small>")
    now = run.metrics(per_layer=True)["router/max_frac_mean/layer_0"]
    assert first["line"] == draw(now.index, now.to_numpy(), None, healthy_band("router/max_frac_max", 4)[1], 2,
                                 f"router/max_frac_mean/layer_0, now {now.iloc[-1]:.3g}, healthy to 0.7")
    key = "router_temp 1.30 -&gt; 1.60"
    assert first["levers"] == (f'<button data-lever="&lt;r&gt;|0|{key}" title="hold {key}">'
                               "<b>Apply</b> Router temperature 1.30 → 1.60</button>")
    assert findings.view.summary == (
        '<span class="moe-alarm"><b>1 alarm</b></span><span class="moe-watch"><b>1 to watch</b></span>'
        "<i>takes &lt;0.1&gt;</i> ")
    event = run.events().iloc[-1]
    assert event[["metric", "value", "first", "last"]].tolist() == ["router/max_frac_mean/layer_0", 0.75, 2, 3]
    press(findings, "<r>", "router_temp")
    assert [name for name, knob in run.knobs.items() if knob.mode == "hold"] == ["router_temp"]
    findings.look(3, busy=False)
    assert findings.view.rows[0]["levers"].endswith("after step 54\">✓ Router temperature, from step 4</button>")
    for step, offered in ((53, False), (54, True)):
        findings.look(step, busy=False)
        assert ("data-lever" in findings.view.rows[0]["levers"]) == offered
    del seen["alarm", 0], seen["alarm", 1]
    Findings(run, Log()).look(2 + LASTS, busy=False)  # opened again, it is not gone before it stayed away
    assert of_r()[1:] == []
    for step, news in ((54 + LASTS - 1, []), (54 + LASTS, [("here", "watch")])):
        findings.look(step, busy=False)
        assert findings.view.rows[0]["level"] == "watch" and of_r()[1:] == news
    for name in (("watch", None), "mine"):
        del seen[name]
    findings.look(60 + LASTS, busy=False)
    assert [(row["rule"], row["past"], row["levers"]) for row in findings.view.rows] == [
        ("<r>", True, ""), ("mine", True, "")]
    assert "watch" not in findings.view.summary
    findings.look(60 + 2 * LASTS, busy=False)
    assert findings.view.rows == [] and of_r()[2:] == [("gone", "watch")]
    Findings(run, Log()).look(60 + 3 * LASTS, busy=False)
    assert len(of_r()) == 3 and "fine" not in {rule for *_, rule in told(run)}


def test_a_run_that_is_opened_again_or_goes_back_does_not_repeat_what_is_written(panel, rules):
    """What stands is read from the events of the line that the run is on."""
    run, findings, _ = panel()
    rules(high_loss("alarm", 0.1))
    run.step(2)
    findings.look(2, busy=False)
    again = Findings(run, Log())
    run.step(2)
    again.look(4, busy=False)
    assert told(run) == [(2, "here", "alarm", "high loss")]
    run.rewind(1)  # before it came
    again.look(1, busy=False)
    assert told(run) == [(1, "here", "alarm", "high loss")]


def test_an_alarm_pauses_the_run_when_it_appears_and_only_if_that_is_asked_for(panel, rules):
    run, findings, log = panel()
    for wanted in (False, True):
        rules()
        run.step(LASTS + 1)
        findings.look(run.current_step, busy=False)
        findings.pause.value = wanted
        rules(high_loss("alarm", 0.1))
        run.session.start(10**6)
        try:
            findings._next = 0
            findings.look(run.current_step + 1, busy=True)
            assert (run.session.state in ("pausing", "paused")) == wanted
            findings._next = 0
        finally:
            run.session.pause()
            run.session.wait(20)
    assert "paused on alarm: train/ce" in log.widget.value
    run.session.start(2)  # it is there and no longer new: the run may go on
    run.session.wait(20)
    findings.look(run.current_step, busy=True)
    assert run.session.state == "idle"


def test_nothing_is_said_before_there_is_data_and_one_line_while_all_is_well(panel):
    run, findings, _ = panel(
        router_temp_init=0.5, router_temp_final=0.5, router_noise_std_init=0.3, load_balance_alpha=0.2, grad_clip=100.0,
        batch_size=16)
    run.step(20)
    findings.look(20, busy=False)
    assert (findings.view.summary, findings.view.rows) == ("", [])
    run.step(40)
    findings.look(60, busy=False)
    assert (findings.view.summary, findings.view.rows) == ("<span><b>Router healthy</b></span>", [])


def test_a_broken_rule_is_said_once_and_nothing_else_stops(panel, rules):
    run, findings, log = panel()
    rules(high_loss("alarm", "high"))
    for _ in range(3):
        run.step(1)
        findings.look(run.current_step, busy=False)
    assert log.widget.value.count("rule &#x27;high loss&#x27; (alarm)") == 1


def test_while_it_trains_rules_are_read_rarely(panel, monkeypatch):
    run, findings, _ = panel()
    read = []
    monkeypatch.setattr(health, "recent", lambda *a, real=health.recent: read.append(1) or real(*a))
    for _ in range(5):
        run.step(1)
        findings.look(run.current_step, busy=True)
    assert len(read) == 1


def test_the_tiny_chart_draws_the_line_its_band_and_what_is_new():
    """In the box, few points, the band where the values are, the old and the new part meeting at one point."""
    steps, values = np.arange(1, 401), np.linspace(0.1, 0.9, 400)
    image = draw(steps, values, 0.2, 0.4, since=301, label='max "frac"')
    old, new = (np.array([point.split(",") for point in part.split()], float)
                for part in re.findall(r'points="([^"]*)"', image))
    assert old[-1].tolist() == new[0].tolist() and old[-1, 0] == pytest.approx(WIDTH * 300 / 400, abs=8)
    assert new[-1].tolist() == [float(n) for n in re.search('cx="(.*?)" cy="(.*?)"', image).groups()]
    above = re.search(r'y="([\d.]+)" width="\d+" height="([\d.]+)"', draw(steps, values, 2.0, 3.0))  # out of reach
    assert 0 < float(above[1]) < float(above[1]) + float(above[2]) < HEIGHT
    assert len(old) + len(new) <= POINTS + 2
    both = np.concatenate([old, new])
    assert (both >= 0).all() and (both[:, 0] <= WIDTH).all() and (both[:, 1] <= HEIGHT).all()
    top, height = (float(n) for n in re.search(r'y="([\d.]+)" width="\d+" height="([\d.]+)"', image).groups())
    for edge, share in ((top, 0.4), (top + height, 0.2)):
        assert np.interp(-edge, -both[:, 1], np.interp(both[:, 0], [both[0, 0], both[-1, 0]], [0.1, 0.9])) == (
            pytest.approx(share, abs=0.02))
    assert 'aria-label="max &quot;frac&quot;"' in image
    assert draw(steps, np.full(400, np.nan)) == ""


def test_an_attached_run_shows_findings_and_writes_none(tiny_run, rules, monkeypatch):
    """Its events belong to the process that trains it; a pause is a wish like any other."""
    run = tiny_run()
    rules(high_loss("alarm", 0.1))
    monkeypatch.setattr(type(run), "attached", True)
    findings = Findings(run, Log())
    run.step(1)
    findings.look(1, busy=False)
    assert findings.view.rows[0]["rule"] == "high loss"
    assert told(run) == []
