"""The panel in states that are not every day's: a fault, another process' run, and what is closed until asked for."""

import json
import re
import subprocess
import sys
import time

import pytest
import torch

import moe_core as mc
from moe_core.session import Progress
from widgets import Workbench
from widgets.groups import table
from widgets.workbench import _duration, _status_line

TRAINER = """
import json, sys, time
import moe_core as mc
run = mc.Run.create(sys.argv[1], mc.RunConfig.from_dict(json.loads(sys.argv[2])), say=lambda line: None)
run.session.start(10**6)
end = time.monotonic() + 120
while run.current_step < 3 and time.monotonic() < end:
    time.sleep(0.01)
print("ready" if run.current_step >= 3 else "late", flush=True)
time.sleep(600)
"""


@pytest.fixture
def bench():
    made = []

    def make(run):
        made.append(Workbench(run))
        return made[-1]
    yield make
    for panel in made:
        panel.close()


@pytest.fixture
def elsewhere(tiny, tmp_path):
    """A process that trains a run, and the run's path."""
    path = tmp_path / "far"
    process = subprocess.Popen([sys.executable, "-c", TRAINER, str(path), json.dumps(tiny().to_dict())],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process, path
    process.kill()
    process.wait()
    process.stdout.close()


def soon(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


@pytest.mark.parametrize("state, error, undo, said", [
    ("training", None, None, ["training", "step 1,234", "3 of 100 steps", "1 min 40 s left", "51,200 tokens/s"]),
    ("paused", "NonFiniteError: step 9: <loss> is nan", 1200, [
        "paused", "step 1,234", "3 of 100 steps", "1 min 40 s left", "51,200 tokens/s",
        "step 9: &lt;loss&gt; is nan. Undo chunk goes back to step 1,200; the knobs can be turned first."]),
    ("failed", "RuntimeError: <no> memory", 1200, [
        "failed", "step 1,234", "3 of 100 steps", "1 min 40 s left", "51,200 tokens/s",
        "RuntimeError: &lt;no&gt; memory"])])
def test_the_status_line_says_where_the_run_stands(state, error, undo, said):
    line = _status_line(Progress(state, 1234, 3, 100, 51200.4, 100.2, error), undo)
    shown = re.findall(r"<span[^>]*>(.*?)</span>", line.replace("<b>", "").replace("</b>", ""))
    assert shown == said and '<progress max="100" value="3"' in line


@pytest.mark.parametrize("seconds, said", [
    (99.4, "99 s"), (100, "1 min 40 s"), (3661, "61 min 1 s"), (7260, "2 h 1 min")])
def test_a_duration_is_said_as_exactly_as_it_is_known(seconds, said):
    assert _duration(seconds) == said


def test_undo_is_put_forward_where_a_step_was_not_finite_and_goes_back(tiny_run, bench):
    """The status says which step and what; Undo stands out, takes the run back, and stands out no more."""
    run = tiny_run()
    panel = bench(run)
    panel.start(3)
    assert panel.session.wait(20)
    with torch.no_grad():
        next(run._trainer.model.parameters()).fill_(torch.nan)
    panel.start(5)
    assert soon(lambda: panel.branches.undo.button_style == "warning")
    assert "paused" in panel.status.value and "step 4" in panel.status.value and "not applied" in panel.status.value
    assert "NonFiniteError" not in panel.status.value
    assert "goes back to step 0" in panel.status.value and "Back to step 0," in panel.branches.undo.tooltip
    panel.branches.undo.click()  # to where the chunk before began
    assert soon(lambda: panel.branches.undo.button_style == "" and run.current_step == 0)
    panel.start(1)
    assert panel.session.wait(20)
    assert run.current_step == 1


def test_an_attached_run_is_shown_live_and_steered_and_goes_on_when_the_panel_closes(elsewhere, bench):
    """Its knobs, notes and pause reach the process that trains; the end of that process is said, and dims the panel."""
    process, path = elsewhere
    run = mc.Run.attach(path)
    panel = bench(run)
    line = next(trace for trace in panel.live.figure.data if trace.uid == "train-loss")
    seen = len(line.x)
    assert soon(lambda: len(line.x) > seen and "training" in panel.status.value)
    knob = next(control for control in panel.controls if control.knob.name == "router_temp")
    knob.slider.value = 2.5
    assert soon(lambda: "applied at step" in knob.says.value)
    panel.notes.text.value = "from afar"
    panel.notes.button.click()
    assert soon(lambda: "from afar" in panel.journal.widget.value)
    panel.page.aim = [0.0, 0.8]
    assert soon(lambda: "Router temperature → <b>0.8</b>" in panel.what_if.widget.value)
    panel.close()
    at = run.current_step
    assert soon(lambda: run.current_step > at + 3)
    again = bench(run)
    again.pause_button.click()
    assert soon(lambda: "paused" in again.status.value)
    process.kill()
    process.wait()
    assert soon(lambda: "no process trains this run" in again.status.value and again.run_button.disabled)
    assert again.controls[0].slider.disabled and again.branches.undo.disabled


def test_a_slider_that_is_held_turns_nothing_and_shows_what_it_would(tiny_run, bench):
    run = tiny_run()
    run.step(2)
    panel = bench(run)
    row = [control.knob.name for control in panel.controls].index("router_temp")
    panel.page.aim = [float(row), 0.8]
    assert soon(lambda: "→ <b>0.8</b>" in panel.what_if.widget.value)
    panel.page.aim = []
    assert soon(lambda: panel.what_if.widget.value == "")
    assert run.events().empty


def test_optimizer_groups_cost_nothing_while_closed_and_show_each_groups_numbers_when_open(tiny_run, bench):
    run = tiny_run()
    panel = bench(run)
    panel.start(1)
    assert panel.session.wait(20)
    assert soon(lambda: "<b>1</b>" in panel.status.value)
    assert panel.groups._table.value == ""
    panel.groups.widget.selected_index = 0
    names = [name.removeprefix("update/") for name in run.metrics() if name.startswith("update/")]
    assert len(names) > 1
    assert soon(lambda: all(f"<th>{name}</th>" in panel.groups._table.value for name in names))
    assert panel.groups._table.value.count("<td>–</td>") == len(names)  # no update was made before the first step
    run.step(2)
    rows = run.metrics().iloc[-1]
    shown = table(run.store.read_steps(1, shares=False))
    for name in names:
        assert re.search(rf"<th>{name}</th><td>{rows[f'lr/{name}']:.3g}</td><td><svg.*?</svg></td>"
                         rf"<td>{rows[f'update/{name}']:.3g}</td>", shown)


def test_the_report_is_written_beside_the_run_while_the_panel_goes_on(tiny_run, bench, monkeypatch):
    run = tiny_run()
    run.step(2)
    panel = bench(run)
    panel.write_up.button.click()
    assert soon(lambda: "report.html" in panel.write_up.says.value, 60)
    assert (run.path / "report.html").stat().st_size > 10_000
    assert not panel.write_up.button.disabled
    monkeypatch.setattr(type(run), "report", lambda self, path: 1 / 0)
    panel.write_up.button.click()
    assert soon(lambda: "failed; see the log" in panel.write_up.says.value)
    assert "ZeroDivisionError" in panel.journal.widget.value


def test_a_look_inside_colours_the_validation_text_and_changes_nothing(tiny_run, bench):
    """Asked for in the panel: tokens of each layer by expert; the run goes on with the numbers of one left alone."""
    run, calm = tiny_run(), tiny_run("calm")
    run.step(3)
    panel = bench(run)
    panel.inside.errand.start().join(60)
    assert "after step 3" in panel.inside.errand.says.value and not panel.inside.errand.button.disabled
    shown, = (view.html for view in panel.inside._text.children)
    assert "moe-spec" in shown and shown.count("<span") > 100 and "layer 1" in shown
    run.step(3)
    calm.step(6)
    assert run.metrics()["train/ce"].equals(calm.metrics()["train/ce"])
