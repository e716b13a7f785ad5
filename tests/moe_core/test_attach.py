"""A run trained by one process and held by another: seen live, steered, and left alone again."""

import json
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from moe_core import KnobError, Run, StoreError
from moe_core.inbox import Inbox

TRAINER = """
import json, sys, time
import moe_core as mc
run = mc.Run.create(sys.argv[1], mc.RunConfig.from_dict(json.loads(sys.argv[2])), say=lambda line: None)
print("ready", flush=True)
run.step(3)
print("rests", flush=True)
time.sleep(600)
"""


@pytest.fixture
def trainer(tiny, tmp_path):
    """A process that made a run, took three steps, and waits; and the run's path."""
    path = tmp_path / "far"
    process = subprocess.Popen([sys.executable, "-c", TRAINER, str(path), json.dumps(tiny().to_dict())],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "ready\n" and process.stdout.readline() == "rests\n"
    yield process, path
    process.kill()
    process.wait()
    process.stdout.close()


def until(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_what_is_asked_of_an_attached_run_reaches_the_trainer_at_a_step_boundary(trainer):
    """Steps, a knob, a note, a checkpoint, pause, rewind and undo from here are events and rows there."""
    run = Run.attach(trainer[1])
    assert run.attached and run.current_step == 3
    until(lambda: run.session.state == "idle")  # told a fifth of a second later
    run.knobs["router_temp"].hold(2.5)
    run.note("from afar")
    run.step(2)
    assert run.current_step == 5 and run.knobs["router_temp"].value == 2.5 and not run.knobs["router_temp"].pending
    assert run.metrics()["router/temp"].tolist()[3:] == [2.5, 2.5]
    said = run.events()
    assert said[said["kind"] == "knob"][["step", "name", "value"]].values.tolist() == [[4, "router_temp", 2.5]]
    assert "from afar" in said["text"].tolist()
    run.checkpoint("here")
    until(lambda: any(c.name == "here" for c in run.store.checkpoints()))
    run.session.start(100_000)
    until(lambda: run.current_step > 8)
    assert run.session.state == "training" and run.progress().tok_s > 0
    run.pause()
    until(lambda: run.session.state == "paused")
    run.rewind(4, "other")
    assert (run.branch, run.current_step) == ("other", 4)
    run.undo()
    assert run.current_step == 3
    run.switch("main")
    assert run.branch == "main" and run.current_step > 8


def test_a_wish_that_cannot_be_is_refused_here_or_there_in_one_line(trainer):
    """A value out of range is refused before it is sent; what only the trainer can know, by its answer."""
    run = Run.attach(trainer[1])
    with pytest.raises(KnobError, match="router_temp = -1"):
        run.knobs["router_temp"].hold(-1)
    with pytest.raises(ValueError, match="step = 99: must be a step of this line, 0 to 3"):
        run.rewind(99)
    with pytest.raises(StoreError, match="there is a branch of that name already"):
        run.rewind(1, "main")
    with pytest.raises(StoreError, match="dance: unknown command; there are"):
        run.session.ask("dance", {}, wait=True)
    with pytest.raises(AttributeError, match="preview: not available on an attached run"):
        run.preview(router_temp=2.0)


def test_where_the_trainer_has_gone_a_wish_says_so_and_the_run_can_be_opened(trainer):
    """After kill -9 the run is still read, its state is "gone", no wish is taken and none that was left is done."""
    process, path = trainer
    run = Run.attach(path)
    process.send_signal(signal.SIGSTOP)
    run.note("never heard")
    process.kill()
    process.wait()
    assert run.session.state == "gone" and len(run.metrics()) == 3
    for wish in (lambda: run.knobs["router_temp"].hold(2.0), lambda: run.step(1), run.pause, lambda: run.undo()):
        with pytest.raises(StoreError, match="no process trains this run"):
            wish()
    opened = Run.open(path)
    try:
        assert "never heard" not in opened.events()["text"].tolist()
        assert run.session.state == "idle"  # it follows whoever trains the run now
        opened.step(1)
        until(lambda: run.current_step == 4)
        assert Run.attach(path) is opened
    finally:
        opened.close()


def test_a_chunk_whose_trainer_dies_is_not_done(trainer):
    """kill -9 in mid-chunk: who waits for the steps is told that nobody trains any more, and where the run stands."""
    process, path = trainer
    run = Run.attach(path)
    run.session.start(100_000)
    process.kill()
    process.wait()
    for wait in (run.session.wait, lambda: run.session.wait(1.0)):
        with pytest.raises(StoreError, match=f"trains this run any more; it is at step {run.current_step}"):
            wait()


def test_a_knob_in_hand_says_what_it_is_now(trainer):
    """Its mode, target and first step are looked up when they are read, and not as they were when it was taken."""
    run = Run.attach(trainer[1])
    knob = run.knobs["router_temp"]
    knob.hold(0.7)
    until(lambda: knob.mode == "hold")
    assert (knob.target, knob.applied_at, knob.value) == (0.7, 4, 0.7)


@pytest.mark.parametrize("spoil", [
    lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"garbage " * 999),
    lambda file: sqlite3.connect(file).executescript("UPDATE wishes SET payload = 'no json'"),
], ids=["empty", "garbage", "no JSON"])
def test_a_spoilt_inbox_is_an_empty_one(tiny_run, spoil):
    """The run opens, with the old file beside it under another name, and what is asked from then on is heard."""
    run = tiny_run()
    run.close()
    Inbox(run.path).post("note", {"text": "before"})
    spoil(run.path / "inbox.sqlite")
    spoilt = (run.path / "inbox.sqlite").read_bytes()
    opened = Run.open(run.path)
    try:
        assert [file.read_bytes() for file in run.path.glob("inbox.sqlite.damaged-*")] == [spoilt]
        Inbox(run.path).post("note", {"text": "after"})
        until(lambda: "after" in opened.events()["text"].tolist())
    finally:
        opened.close()


def test_training_goes_on_when_who_watches_leaves(trainer):
    """Closing an attached run, and asking while a chunk runs, stop nothing."""
    run = Run.attach(trainer[1])
    run.session.start(100_000)
    run.close()
    again = Run.attach(trainer[1])
    at = again.current_step
    until(lambda: again.current_step > at)
    assert again.session.state == "training"
