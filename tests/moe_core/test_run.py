import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import moe_core as mc
from moe_core.session import Command
from moe_core.store import StoreError


def quiet(line):
    pass


def test_a_run_steps_records_and_comes_back_whole(tiny, tmp_path):
    """Rows, shares, knobs and notes of a run are the same after closing and opening it again."""
    run = mc.Run.create(tmp_path / "deep" / "first", tiny(), say=quiet)
    run.step(12)
    run.knobs["router_temp"].ramp(to=0.5, over=10)
    run.note("sharpening")
    run.step(3)
    metrics, experts, events, value = run.metrics(), run.experts(), run.events(), run.knobs["router_temp"].value
    assert list(metrics.index) == list(range(1, 16))
    assert metrics["val/loss"].notna().sum() == 1  # at step 10
    assert len(experts) == 15 * 2 * 4
    assert experts.groupby(["step", "layer"])["demand"].sum().to_numpy() == pytest.approx(1)
    run.close()

    again = mc.Run.open(tmp_path / "deep" / "first")
    assert again.config == run.config
    assert again.current_step == 15
    for before, after in ((metrics, again.metrics()), (experts, again.experts()), (events, again.events())):
        assert after.equals(before)
    assert (again.knobs["router_temp"].value, again.knobs["router_temp"].mode) == (value, "ramp")
    again.step(1)
    assert (again.current_step, again.branch) == (16, "main")
    again.close()


def test_metrics_are_per_layer_on_request(tiny_run):
    run = tiny_run()
    run.step(2)
    extra = set(run.metrics(per_layer=True)) - set(run.metrics())
    assert "router/entropy_mean/layer_1" in extra
    assert all("/layer_" in name for name in extra)
    assert list(run.metrics(since=1).index) == [2]


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def test_a_turn_holds_from_the_step_that_its_event_names(tiny_run):
    """Asked while idle after step 3: the event says 4, row 3 has the schedule's value and row 4 the held one."""
    run = tiny_run()
    run.step(3)
    run.knobs["router_temp"].hold(2.5)
    run.knobs["load_balance_alpha"].hold(np.float32(0.3))
    assert run.knobs["router_temp"].applied_at == 4
    noise = run.knobs["router_noise_std"]
    expected = noise.value
    assert expected == noise.scheduled
    run.step(2)
    assert run.metrics()["router/noise_std"][4] == np.float32(expected) != run.metrics()["router/noise_std"][3]
    event = run.events().iloc[0]
    assert (event["kind"], event["name"], event["mode"], event["value"], event["step"]) == (
        "knob", "router_temp", "hold", 2.5, 4)
    temps = run.metrics()["router/temp"]
    assert temps[3] == pytest.approx(1.495)
    assert list(temps[[4, 5]]) == [2.5, 2.5]
    assert run.metrics()["router/load_balance_alpha"][4] == pytest.approx(0.3)
    assert event["asked"] <= event["applied"]


def test_commands_sent_while_training_are_applied_at_a_boundary_in_order(tiny_run):
    """Two turns posted in mid-chunk: the last one wins, each event's step is the first row with its value."""
    run = tiny_run()
    run.session.start(10**6)
    until(lambda: run.current_step >= 5)
    run.knobs["router_temp"].hold(3.0)
    run.knobs["router_temp"].hold(2.0)
    until(lambda: not run.session.pending())
    run.session.pause()
    assert run.session.wait(60)
    run.step(1)
    first, second = run.events().itertuples()
    temps = run.metrics()["router/temp"]
    assert 5 < first.step <= second.step <= run.current_step
    assert temps[second.step] == 2.0 and temps[run.current_step] == 2.0
    assert temps[first.step - 1] < 2.0  # the schedule
    assert not run.knobs["router_temp"].pending


def test_pause_stops_at_a_boundary_and_training_goes_on_as_if_it_had_not(tiny_run):
    """A paused and continued run has the numbers of one that was left alone, to the bit."""
    run, left_alone = tiny_run("paused"), tiny_run("alone")
    run.session.start(10**6)
    until(lambda: run.current_step >= 4)
    run.pause()
    assert run.session.wait(60)
    at = run.current_step
    assert run.session.state == "paused" and 4 <= at < 10**6
    run.step(3)
    assert run.session.state == "idle" and run.current_step == at + 3
    left_alone.step(at + 3)
    for name in ("train/loss", "grad/norm", "router/entropy_mean", "val/loss"):
        assert run.metrics()[name].equals(left_alone.metrics()[name])


def test_steps_asked_for_after_a_pause_are_all_that_follow(tiny_run):
    """A pause drops what is left of its chunk, also where more is asked for before training has come to rest: behind
    the step that is being taken. A turn that waits for its end is pending, of its own knob alone.
    """
    run = tiny_run()
    run.session.start(10**6)
    until(lambda: run.current_step >= 3)
    run.session.pause()
    seen = run.current_step
    run.step(2)
    assert seen + 2 <= run.current_step <= seen + 4 and run.session.state == "idle"
    before, real, pending = run.current_step, run._trainer.train.next, []

    def meanwhile():
        run._trainer.train.next = real
        run.session.pause()
        run.session.start(2)
        run.knobs["lr_scale"].hold(0.5)
        pending.extend(name for name in run.knobs if run.knobs[name].pending)
        return real()
    run._trainer.train.next = meanwhile
    run.step(10)
    assert run.current_step == before + 1 + 2 and pending == ["lr_scale"]


def test_a_command_that_cannot_be_done_stands_in_nobodys_way(tiny_run, monkeypatch):
    """It is refused, and what comes after it is applied; one that comes while a chunk ends makes no training fail."""
    run = tiny_run()
    for command, line in ((Command("knob", {"name": "typo", "mode": "hold", "value": 1.0}), "typo"),
                          (Command("knob", {"name": "router_temp", "mode": "hold", "value": float("nan")}), "nan"),
                          (Command("dance", {}), "unknown command")):
        with pytest.raises(ValueError, match=line):
            run.session.post(command)
    run.note("still here")
    run.step(1)
    assert run.session.pending() == [] and list(run.events()["kind"])[-1] == "note"
    end, late = run.end_chunk, (Command("dance", {}), Command("note", {"text": "after it"}))
    monkeypatch.setattr(run, "end_chunk", lambda: (end(), *map(run.session.post, late)))
    run.step(1)
    assert run.session.state == "idle" and run.session.pending() == []
    assert run.events()["kind"].tolist()[-2:] == ["alert", "note"]


def test_a_named_checkpoint_that_cannot_be_written_is_said_and_stops_no_training(tiny_run):
    """At rest the caller hears it; while steps are taken it is an alert, and they go on."""
    run = tiny_run(eval_interval=0, save_interval=0)
    run.step(1)
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    (run.path / "checkpoints").write_text("in the way")
    with pytest.raises(mc.CheckpointError, match="checkpoints"):
        run.checkpoint("kept")
    run.session.start(20)
    run.checkpoint("kept too")
    assert run.session.wait(timeout=60) and run.current_step == 21
    assert any(text.startswith("checkpoint: ") for text in run.events().query("kind == 'alert'")["text"])
    (run.path / "checkpoints").unlink()


def test_a_turn_acts_after_a_step_whose_row_waits_for_the_disk(tiny_run, monkeypatch):
    """The step was taken already, so the event names the one after it."""
    run = tiny_run()
    run.step(2)
    with monkeypatch.context() as patch, pytest.raises(StoreError):
        patch.setattr(run.store, "log_step", lambda *row: (_ for _ in ()).throw(StoreError("disk is full")))
        run.step(1)
    run.knobs["router_temp"].hold(3.0)
    run.step(2)
    turn = run.events().query("kind == 'knob'").iloc[0]
    assert turn.step == 4 and list(run.metrics()["router/temp"][[3, 4]] == 3.0) == [False, True]
    assert run._trainer.steps_done == run.current_step == 4
    assert (run.replay()["largest"] == 0).all()


def test_a_wish_that_a_full_disk_refuses_waits_for_the_next_step(tiny_run, monkeypatch):
    """It stops the training, is not lost, and is written once there is room."""
    run = tiny_run()
    run.step(1)
    real = run._trainer.train.next

    def meanwhile():
        run._trainer.train.next = real
        run.note("kept")
        return real()
    with monkeypatch.context() as patch, pytest.raises(StoreError):
        patch.setattr(run.store, "log_event", lambda *event, **how: (_ for _ in ()).throw(StoreError("disk is full")))
        run._trainer.train.next = meanwhile
        run.step(3)
    assert [wish.kind for wish in run.session.pending()] == ["note"]
    run.step(1)
    assert run.session.pending() == [] and list(run.events()["kind"])[-1] == "note"


def test_chunks_asked_for_together_add_up(tiny_run):
    """n steps are n steps, whoever asked: a chunk of 20 in the background and a cell's 5 make 25."""
    run = tiny_run()
    run.session.start(20)
    run.step(5)
    assert run.current_step == 25


def test_a_second_session_closes_the_first(tiny_run):
    """One thread trains: the first stops at a boundary, and says where to go when it is asked again."""
    run = tiny_run()
    first = run.session
    first.start(10_000)
    second = mc.Session(run)
    assert first.state == "paused" and run.session is second
    at = run.current_step
    second.start(2)
    second.wait()
    assert run.current_step == at + 2
    with pytest.raises(RuntimeError, match="this session is closed"):
        first.start(1)


def test_an_error_in_the_thread_reaches_the_person_and_leaves_the_run_whole(tiny_run):
    """It is raised by wait and by step, stands in the events and in progress, and the next step works."""
    run = tiny_run()
    run.step(2)
    batches = run._trainer.train
    real, batches.next = batches.next, lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.step(5)
    assert run.session.state == "failed"
    assert run.progress().error == "ZeroDivisionError: division by zero"
    with pytest.raises(ZeroDivisionError):
        run.session.wait()
    last = run.events().iloc[-1]
    assert (last["kind"], last["step"]) == ("error", 3) and "division by zero" in last["traceback"]
    batches.next = real
    run.step(1)
    assert run.current_step == 3 and run.progress().error is None


def test_a_closing_session_takes_no_more_steps(tiny_run):
    """Asked for more while it closes in mid-chunk, it refuses, and the chunk does not grow."""
    run = tiny_run()
    run.session.start(10_000)
    run.session._closed = True  # what close() does first
    with pytest.raises(RuntimeError, match=r"is closed; mc\.Run\.open comes back"):
        run.session.start(10_000)
    run.session.close()
    assert run.session.state == "paused" and run.session.progress().chunk_total == 10_000


def test_a_run_that_turns_non_finite_pauses_by_itself(tiny_run):
    run = tiny_run()
    run.step(2)
    run._trainer.model.embed.weight.data.fill_(float("nan"))
    with pytest.raises(mc.NonFiniteError, match="step 3: train/ce is nan"):
        run.step(10)
    assert run.session.state == "paused" and run.current_step == 2
    assert run.events().iloc[-1]["kind"] == "nonfinite"


@pytest.mark.parametrize("turn, line", [
    (lambda run: run.knobs["router_temp"].hold(0), "router_temp = 0: must be a number from 0.01 to 100"),
    (lambda run: run.knobs["lr_scale"].ramp(to=2, over=0), "lr_scale: over = 0: must be an integer"),
    (lambda run: run.knobs["tempo"], "tempo: unknown knob; this run's knobs are router_temp,"),
    (lambda run: run.rewind(0, name="  "), "name = '  ': must be text"),
    (lambda run: run.rewind(0, name=5), "name = 5: must be text"),
    (lambda run: run.switch(None), "branch = None: must be one of 'main'"),
    (lambda run: run.replay(upto=1), "upto = 1: must be a step of this line, 0 to 0"),
    (lambda run: run.replay(upto="a"), "upto = 'a': must be a step of this line, 0 to 0"),
    (lambda run: run.ab(1, 2, 2), "a = 1: must be a dict"),
    (lambda run: run.ab({}, {}, steps=0), "steps = 0: must be an integer, at least 1"),
    (lambda run: run.step(0), "n = 0: must be an integer, at least 1"),
    (lambda run: run.note("  "), "text = '  ': a note must say something"),
    (lambda run: run.note("x", step=99), "step = 99: must be a step of this line, 0 to 0"),
    (lambda run: run.metrics(since="a"), "since = 'a': must be a step, 0 or later"),
    (lambda run: run.generate("x", seed=-1), "seed = -1: must be an integer, 0 to"),
    (lambda run: run.metrics(branch="b"), "branch = 'b': must be one of 'main'"),
])
def test_a_wrong_wish_is_refused_where_it_is_made_and_leaves_no_trace(tiny_run, turn, line):
    run = tiny_run()
    with pytest.raises((ValueError, RuntimeError)) as refused:
        turn(run)
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)
    assert run.events().empty and run.session.pending() == [] and list(run.branches()["name"]) == ["main"]


def test_a_run_stays_where_it_is_when_the_process_goes_elsewhere(tiny, tmp_path, monkeypatch):
    """Made by a relative path, it trains, saves and is found again after chdir, and writes nothing there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    run = mc.Run.create("runs/first", tiny(), say=quiet)
    monkeypatch.chdir(tmp_path / "other")
    run.step(6)
    run.checkpoint("x")
    run.close()
    assert list((tmp_path / "other").iterdir()) == []
    again = mc.Run.open(tmp_path / "runs" / "first")
    assert again is not run and again.current_step == 6
    again.rewind(6)
    again.close()


def test_a_bad_start_writes_nothing(tiny, tmp_path):
    """A missing corpus, a directory that exists, one that is no run, one newer than this code: one line each."""
    missing = tmp_path / "nowhere"
    with pytest.raises(mc.DataError, match="nowhere"):
        mc.Run.create(tmp_path / "a", tiny(dataset_name=str(missing)), say=quiet)
    assert not (tmp_path / "a").exists()

    (tmp_path / "b").mkdir()
    with pytest.raises(mc.StoreError, match="exists"):
        mc.Run.create(tmp_path / "b", tiny(), say=quiet)
    assert list((tmp_path / "b").iterdir()) == []
    with pytest.raises(mc.StoreError):
        mc.Run.open(tmp_path / "b")

    mc.Run.create(tmp_path / "c", tiny(), say=quiet).close()
    with sqlite3.connect(tmp_path / "c" / "run.sqlite") as newer:
        newer.execute("PRAGMA user_version = 9999")
    with pytest.raises(mc.StoreError, match="newer"):
        mc.Run.open(tmp_path / "c")


def test_open_gives_the_run_that_this_process_has_open_already(tiny_run):
    run = tiny_run()
    assert mc.Run.open(run.path) is run


def test_a_posted_command_is_on_disk_before_it_is_gone_from_the_queue(tiny_run):
    run = tiny_run()
    run.session.post(Command("note", {"text": "hello"}, asked=12.5))
    assert run.session.pending() == []
    assert json.loads(sqlite3.connect(run.path / "run.sqlite").execute(
        "SELECT payload FROM events WHERE asked = 12.5").fetchone()[0]) == {"text": "hello"}


TRAIN = """
    import sys, time
    import moe_core as mc
    run = mc.Run.create(sys.argv[1], mc.RunConfig.from_dict(eval(sys.argv[2])), say=lambda line: None)
    run.session.start(100_000)
    seen = 0
    while True:
        if run.current_step > seen:
            seen = run.current_step
            print(seen, flush=True)
        time.sleep(0.001)
"""


@pytest.mark.parametrize("after", [1, 25])
def test_kill_9_in_mid_chunk_loses_no_step_that_was_reported(tiny, tmp_path, after):
    """SIGKILL to a real process that trains: every step that it printed is in the file, and the file opens."""
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(TRAIN), tmp_path / "run", repr(tiny().to_dict())],
                             stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    reported = 0
    while reported < after:
        reported = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    reported = max([reported, *map(int, child.stdout.read().split())])
    child.wait()
    run = mc.Run.open(tmp_path / "run")
    assert list(run.metrics().index) == list(range(1, run.current_step + 1))
    assert reported <= run.current_step
    run.close()
