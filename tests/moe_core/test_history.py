import os
import re
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from small_models import rows

import moe_core as mc
from moe_core import checkpoint, snapshots

VARIANTS = {
    "dropless": {},
    "capacity": dict(dropless=False, capacity_factor=0.8),
    "top2 accumulated": dict(top_k=2, norm_topk_prob=True, gradient_accumulation_steps=3),
    "dense, tokens further on": dict(n_experts=0, n_mtp=1),
    "muon and sophia in mid-cycle": dict(optimizer="muon_sophia", sophia_k=4),
    "sophia": dict(optimizer="sophia", sophia_k=3),
    "bias balancing": dict(balance="both", bias_update_speed=0.05, gradient_accumulation_steps=2),
    "dropout, biases, a dense block, recomputed": dict(dropout=0.2, bias=True, skip_first_n_moe=1,
                                                       activation_checkpointing=True),
    "muon and adamw": dict(optimizer="muon_adamw", starved_experts="skip"),
}


def turn(run):
    """A hold and a ramp, so that what follows depends on the knobs too."""
    run.knobs["lr_scale"].ramp(to=0.5, over=6)
    if "router_temp" in run.knobs:
        run.knobs["router_temp"].hold(1.9)


GO_ON = """
    import sys
    import moe_core as mc
    run = mc.Run.open(sys.argv[1])
    run.step(6)
    run.close()
"""


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_saved_and_gone_on_in_a_new_process_is_never_having_stopped(tiny_run, changes):
    """2n steps == n, save, a new process, n: every metric of every layer, every share, to the bit, in mid-ramp."""
    whole, halves = tiny_run("whole", **changes), tiny_run("halves", **changes)
    for run in (whole, halves):
        run.step(4)
        turn(run)
        run.step(2)
    whole.step(6)
    halves.close()
    subprocess.run([sys.executable, "-c", textwrap.dedent(GO_ON), halves.path], check=True,
                   env=os.environ, capture_output=True)
    again = mc.Run.open(halves.path)
    assert again.branch == "main"
    assert rows(again).equals(rows(whole)) and again.experts().equals(whole.experts())
    again.close()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_rewound_and_trained_again_is_the_same_line(tiny_run, changes):
    """A branch from step 5, given the same turns, has main's numbers to the bit; main keeps its own."""
    run = tiny_run(**changes)
    run.step(3)
    run.step(4)
    turn(run)
    run.step(5)
    main = rows(run)
    run.rewind(5)
    assert (run.branch, run.current_step) == ("from-5", 5)
    assert run.knobs["lr_scale"].mode == "follow"  # it was turned after step 7
    run.step(2)
    turn(run)
    run.step(5)
    assert rows(run).equals(main) and rows(run, "main").equals(main)
    assert list(run.branches()["fork_step"].fillna(-1)) == [-1, 5]


def test_the_other_choice_differs_from_its_own_step_on(tiny_run):
    """After a rewind, another knob value gives other numbers, from the first step that it acts on."""
    run = tiny_run()
    run.step(8)
    run.rewind(4, name="hot")
    run.knobs["router_temp"].hold(3.0)
    run.step(4)
    main, hot = rows(run, "main")["train/loss"], rows(run, "hot")["train/loss"]
    assert (main[:4] == hot[:4]).all() and (main[4:] != hot[4:]).all()
    of_main = {s.step for s in run.history.states(2, 8) if s.branch == 1}
    assert {s.step for s in run.history.snapshots if s.branch == 1} == {0, 4, 8} and of_main == {0, 4}
    assert list(run.events("main")["kind"]) == []
    run.switch("main")
    assert run.knobs["router_temp"].mode == "follow"
    run.step(1)
    assert (run.branch, run.current_step) == ("main", 9)
    run.knobs["lr_scale"].hold(0.7)  # from step 10 on
    run.switch("hot")
    run.rewind(2)
    assert run.knobs["lr_scale"].mode == "follow"
    assert list(run.branches()["parent"])[1:] == ["main", "main"]  # whose step 2 is
    run.switch("main")
    assert run.knobs["lr_scale"].mode == "hold"
    with pytest.raises(ValueError, match="name = 'hot': there is a branch of that name already"):
        run.rewind(2, name="hot")
    with pytest.raises(ValueError, match="step = 10: must be a step of this line, 0 to 9"):
        run.rewind(10)
    run.switch("hot")
    run.close()
    again = mc.Run.open(run.path)
    assert (again.branch, again.current_step) == ("hot", 8)
    again.close()


def test_a_way_back_that_fails_leaves_the_run_where_it_stood(tiny_run, monkeypatch):
    """It raises half-way, between two steps' states; training goes on from the tip as if nothing had been."""
    run, alone = tiny_run(), tiny_run("alone")
    run.step(3), run.step(3), alone.step(7)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(mc.Trainer, "step", lambda self, *how: 1 / 0)
        run.rewind(5)
    run.step(1)
    assert run.branch == "main" and rows(run).equals(rows(alone))


def test_steps_that_do_not_repeat_are_said(tiny_run):
    """Taken again from a state that is not the one they were taken from: the first of them, with both numbers."""
    run = tiny_run()
    run.step(3), run.step(3)
    next(s for s in run.history.snapshots if s.step == 3).state["model"]["embed.weight"].mul_(1.01)
    run.rewind(5)
    (said,) = run.events().query("kind == 'alert'")["text"]
    assert said.endswith(f"and was {run.metrics()['train/ce'][4]:.6f}")
    assert said.startswith("steps trained again did not repeat: train/ce of step 4 is ")


@pytest.fixture
def taken(monkeypatch):
    """The number of every step that any trainer takes from now on."""
    numbers, step = [], mc.Trainer.step
    monkeypatch.setattr(mc.Trainer, "step", lambda self, *a, **k: numbers.append(self.steps_done + 1)
                        or step(self, *a, **k))
    return numbers


def test_undo_goes_back_chunk_by_chunk_without_training(tiny_run, taken):
    run = tiny_run()
    run.step(3)
    run.step(4)
    run.step(2)
    taken.clear()
    for expected in (7, 3, 0):
        run.undo()
        assert run.current_step == expected
    assert taken == []
    with pytest.raises(ValueError, match="undo: no chunk was trained here"):
        run.undo()
    run.step(3)
    assert rows(run)["train/loss"].equals(rows(run, "main")["train/loss"][:3])


def test_no_step_is_taken_twice_where_memory_holds_one_state_alone(tiny_run, taken, monkeypatch):
    """As with every large model: undo, back to the tip and two choices from one step start from what memory has."""
    monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 1)
    run = tiny_run(eval_interval=0)
    run._save_s = 1e9  # nothing is saved
    run.step(3)
    run.step(2)
    run.undo()
    assert run.current_step == 3
    run.switch("main")
    run.ab({}, {"router_temp": 1.6}, steps=2)
    assert taken == [1, 2, 3, 4, 5, 6, 7, 6, 7]
    assert rows(run, "A-5")["train/loss"][5] == rows(run, "main")["train/loss"][5]


def test_the_end_of_a_line_that_is_left_is_saved(tiny_run, taken, monkeypatch):
    """Memory holds one state alone, and the next chunk takes its place: to come back trains nothing."""
    monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 1)
    run = tiny_run(eval_interval=0)
    run._save_s = 1e9  # nothing is saved at rest
    run.step(3)
    run.step(2)
    run._save_s = 0.0
    run.undo()
    run._save_s = 1e9
    run.step(1)
    run.switch("main")
    run.step(1)
    assert taken == [1, 2, 3, 4, 5, 4, 6]


def test_training_goes_on_while_a_checkpoint_is_written(tiny_run, monkeypatch):
    """What is written is the state of the step that it was due at; at rest it is there."""
    run, write, gate = tiny_run(save_interval=3, eval_interval=0), checkpoint.save, threading.Event()
    monkeypatch.setattr(checkpoint, "save", lambda *a: gate.wait(60) and write(*a))
    run._save_s = 1e9  # no other save is due
    run.session.start(5)
    waited = time.monotonic() + 60
    while run.current_step < 5 and time.monotonic() < waited:
        time.sleep(0.01)
    assert run.current_step == 5 and run.store.checkpoints() == []
    gate.set()
    run.session.wait()
    (saved,) = run.store.checkpoints()
    assert saved.step == 3 and run.history.settle() is None  # what it had to say was heard once
    run.step(1)
    run.history.snapshots = snapshots.Snapshots()
    run.rewind(3)
    run.step(3)
    assert rows(run).equals(rows(run, "main"))


def test_what_is_asked_for_while_a_chunk_is_saved_is_undone_alone(tiny_run):
    """Its steps are all done, only its state goes to disk: Run pressed then opens a chunk of its own."""
    run = tiny_run()
    save = run.end_chunk

    def save_slowly():
        run.end_chunk = save
        run.session.start(3)
        save()
    run.end_chunk = save_slowly
    run.step(2)
    assert run.current_step == 5 and run.session.chunk_start == 2 and run.progress().chunk_total == 3
    run.undo()
    assert run.branch == "from-2"



def test_a_and_b_see_the_same_batches_and_differ_by_their_knobs_alone(tiny_run):
    """Two equal choices give equal rows; unequal ones differ from the first step; keep goes on from one."""
    run = tiny_run()
    run.step(4)
    same = run.ab({"router_temp": 1.3}, {"router_temp": 1.3}, steps=3)
    assert same.table().empty
    run.switch("main")
    choice = run.ab({"router_temp": 1.0}, {"router_temp": 1.6, "lr_scale": 2.0}, steps=5)
    table = choice.table()
    assert table.loc["router/temp", "difference"] == pytest.approx(0.6)
    assert table.loc["lr_scale", "A"] == 1.0 and table.loc["lr_scale", "spread"] == 0.0
    assert table.loc["train/loss", "spread"] > 0
    choice.keep("A")
    run.step(1)
    assert (run.branch, run.current_step, run.knobs["router_temp"].value) == ("A-4-2", 10, 1.0)
    with pytest.raises(mc.KnobError, match="router_temp = 0: must be"):
        run.ab({"router_temp": 0}, {}, steps=2)
    assert len(run.branches()) == 5


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_config_seed_and_events_alone_give_the_same_numbers(tiny_run, changes):
    """Replayed along a branch with turns on both sides of its fork: no metric of any step differs at all."""
    run = tiny_run(**changes)
    run.step(5)
    turn(run)
    run.step(6)
    run.rewind(8)
    run.knobs["lr_scale"].hold(0.3)
    run.step(4)
    replayed = run.replay()
    assert len(replayed) > 8 and (replayed["largest"] == 0).all()
    assert replayed.loc["val/loss", "step"] == 10


AGAIN = """
    import sys, torch
    torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1)
    import moe_core as mc
    run = mc.Run.open(sys.argv[1])
    print("largest", run.replay()["largest"].max())
"""


def test_a_process_with_other_threads_repeats_the_numbers(tiny_run):
    """Sums depend on the number of threads: a run goes on with those it was begun with, and says so."""
    run = tiny_run(batch_size=8, d_model=64, n_head=2, expert_width=64)
    run.step(5)
    run.close()
    threads = torch.get_num_threads()
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(AGAIN), run.path], env=env, capture_output=True,
                          text=True, check=True)
    assert f"was begun with {threads} thread" in done.stdout and "largest 0.0" in done.stdout


def test_after_a_crash_open_goes_on_from_the_last_whole_checkpoint(tiny_run, capsys):
    """To the numbers of a run that never stopped: rows, turns and notes beyond it stay, the steps are trained again
    with the knobs that they had; that, and that a checkpoint cut short is passed over, is said.
    """
    run, whole = tiny_run(save_interval=4), tiny_run("whole")
    for one in (run, whole):
        one.step(9)
        one.note("then a turn")
        one.knobs["router_temp"].hold(1.9)
        one.step(2)
        one.knobs["router_noise_std"].hold(0.1)
    whole.step(3)
    main, events = rows(run), len(run.events())
    run._unsaved_s, run._save_s = 0.0, 1e9  # as if it was killed before it could save
    run.close()
    newest = run.path / max(run.store.__class__.open(run.path).checkpoints(), key=lambda c: c.step).path
    newest.write_bytes(newest.read_bytes()[:-100])
    again = mc.Run.open(run.path)
    assert rows(again).equals(main) and len(again.events()) == events
    again.step(3)
    said = capsys.readouterr().out
    assert "truncated or not a checkpoint" in said
    assert re.search(r"saved up to step \d+; what follows up to step 11 is trained again", said)
    assert again.branch == "main" and rows(again).equals(rows(whole)) and len(again.events()) == events
    again.close()


def test_a_pause_is_heard_while_steps_are_trained_again(tiny_run):
    """What was reached is kept, and the next start goes on from there to the same numbers."""
    run, whole = tiny_run(eval_interval=0, save_interval=0), tiny_run("whole", eval_interval=0)
    run._save_s = 1e9  # as if it was killed before it could save
    run.step(40), whole.step(41)
    run._trainer = None
    run.history.snapshots = snapshots.Snapshots()
    run.session.start(1)
    run.session.pause()
    assert run.session.wait(timeout=60) and run.session.state == "paused" and run.current_step == 40
    reached = [state.step for state in run.history.states(1, 40)]
    assert reached and max(reached) < 40
    run.step(1)
    assert rows(run).equals(rows(whole))
