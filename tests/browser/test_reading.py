"""What the panel says before and after a turn: what-if under a hand, findings and their Apply."""

import re

import pytest
from lab_server import BUSY, LATE, until

from moe_core.store import RunStore

PEAKED = """
import moe_core as mc
from widgets import Workbench
cfg = mc.preset(
    "nano", n_layer=2, d_model=32, n_head=2, expert_width=48, block_size=32, vocab_size=512, batch_size=4,
    warmup_iters=5, eval_interval=0, device="cpu", dataset_name={corpus!r}, learning_rate=3e-2,
    load_balance_alpha=0.0, router_temp_init=0.1, router_temp_final=0.1, router_noise_std_init=0.0)
run = mc.Run.create("runs/peaked", cfg)
"""
SHOW = """
panel = Workbench(run)
panel.start(60)
panel
"""


@pytest.fixture
def turns(tmp_path):
    """The knob events of the run so far."""
    def read():
        with RunStore.open(tmp_path / "runs" / "peaked") as store:
            return [event["payload"] for event in store.read_events() if event["kind"] == "knob"]
    return read


def test_a_slider_that_is_dragged_shows_what_it_would_do_and_turns_once_when_let_go(run_cells, page, corpus, turns):
    """Then the alarm that the run came to is answered by its button, and the turn says what it answered."""
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.add_init_script(BUSY)
    run_cells(PEAKED.format(corpus=str(corpus)), SHOW)
    until(lambda: page.locator(".moe-state").count() and page.locator(".moe-state").inner_text() == "idle", "idle")
    alarm = page.locator(".moe-finding.moe-alarm").first
    alarm.wait_for()

    knob = page.locator(".moe-knob").filter(has=page.get_by_text("Router temperature", exact=True))
    knob.scroll_into_view_if_needed()
    then = page.locator(".moe-then")
    box = knob.locator(".noUi-handle").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for step in range(1, 9):
        page.mouse.move(x + 8 * step, y)
    said = until(lambda: then.count() and re.search(r"0\.1 → ([\d.]+), on the batch of step 60", then.inner_text()),
                 "now -> then")
    page.mouse.move(x + 70, y)
    aim = float(knob.locator(".noUi-handle").get_attribute("aria-valuetext"))
    until(lambda: float(re.search(r"0\.1 → ([\d.]+),", then.inner_text())[1]) == pytest.approx(aim, rel=0.01),
          "it follows")
    entropy = re.search(r"entropy, nats\s+([\d.]+) → ([\d.]+)", then.inner_text())
    assert float(entropy[2]) > float(entropy[1]) + 0.1  # a higher temperature is a less certain router
    assert aim > float(said[1])
    assert turns() == []
    page.mouse.up()
    until(lambda: turns(), "the turn")
    until(lambda: then.count() == 0, "nothing said once the hand has let go")
    page.wait_for_timeout(500)
    turn, = turns()
    assert (turn["name"], turn["mode"]) == ("router_temp", "hold")
    assert turn["value"] == pytest.approx(aim, rel=0.01)
    assert "finding" not in turn

    assert alarm.locator("svg.moe-spark .moe-band").count() == 1
    button = alarm.get_by_role("button", name=re.compile("^Apply Load-balance alpha"))
    offered = float(re.search(r"→ ([\d.]+)", button.inner_text())[1])
    button.click()
    until(lambda: len(turns()) == 2, "the answer")
    assert turns()[1]["name"] == "load_balance_alpha"
    assert turns()[1]["value"] == pytest.approx(offered)
    assert turns()[1]["finding"]
    until(lambda: alarm.get_by_role("button", name=re.compile("✓ Load-balance alpha")).count(), "answered")
    log = page.locator(".moe-log")
    until(lambda: f"in answer to {turns()[1]['finding']}" in log.inner_text(), "the answer in the log")
    assert "Alarm:" in log.inner_text()
    assert [error for error in errors if LATE not in error] == []
