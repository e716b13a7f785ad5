"""A run that `moe train` trains in a process of its own, steered from a notebook in a real page."""

import shlex
import subprocess
import sys

import pytest
from lab_server import until

from moe_core import RunStore
from moe_core.commands import spell


@pytest.fixture
def night(tiny, tmp_path, corpus):
    """``moe train`` on a small model, as from a shell, in ``night`` beside the notebook."""
    _, _, *flags = shlex.split(spell(tiny(max_iters=1_000_000, eval_interval=1000)))  # without "moe train"
    process = subprocess.Popen([sys.executable, "-m", "moe_core", "train", str(tmp_path / "night"), *flags],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: (tmp_path / "night" / "run.sqlite").exists(), "the run's directory")
    with RunStore.open(tmp_path / "night") as store:
        until(lambda: store.last_step() > 3, "steps")
        yield process, store
    process.terminate()
    process.wait(30)


def state(page):
    return page.locator(".moe-state").inner_text()


def test_a_notebook_steers_a_run_that_a_shell_trains_and_leaves_it_running(night, run_cells, page):
    """Live lines, a knob, a note, pause, run and a checkpoint reach the trainer; a closed page stops nothing."""
    process, store = night
    run_cells("import moe_core as mc\nfrom widgets import Workbench", "Workbench(mc.Run.attach('night'))")
    until(lambda: page.locator(".moe-state").count() and state(page) == "training", "the trainer's state")

    knob = page.locator(".moe-knob").filter(has=page.get_by_text("Router temperature", exact=True))
    number = knob.locator("input[type=number]").first
    number.fill("2.5")
    number.press("Enter")
    until(lambda: "applied at step" in knob.inner_text(), "applied at the trainer's step boundary")
    turned = [e for e in store.read_events() if e["kind"] == "knob"]
    assert [(e["payload"]["name"], e["payload"]["value"]) for e in turned] == [("router_temp", 2.5)]
    until(lambda: store.last_step() >= turned[0]["step"], "a step with it")
    rows = store.read_steps(since=turned[0]["step"] - 1, shares=False)
    assert rows.column("router/temp")[0] == 2.5

    note = page.get_by_placeholder("A note, pinned to the current step")
    note.evaluate("""(box) => {  // typed faster than the kernel hears
        for (box.value of ["seen", "seen from afar"]) box.dispatchEvent(new Event("input", {bubbles: true}));
        box.dispatchEvent(new KeyboardEvent("keypress", {key: "Enter", keyCode: 13, bubbles: true})); }""")
    until(lambda: [e["payload"]["text"] for e in store.read_events() if e["kind"] == "note"] == ["seen from afar"],
          "the whole note, to its last letter")
    until(lambda: note.input_value() == "", "an empty box for the next one")
    page.get_by_role("button", name="Pause").click()
    until(lambda: state(page) == "paused", "paused")
    at = store.last_step()
    page.get_by_role("button", name="Save", exact=True).click()
    until(lambda: any(c.name for c in store.checkpoints()), "a named checkpoint")
    assert store.last_step() == at and process.poll() is None
    page.get_by_role("button", name="Run", exact=True).click()
    until(lambda: store.last_step() > at, "steps again")
    page.close()
    seen = store.last_step()
    until(lambda: store.last_step() > seen + 5, "training goes on without the page")
