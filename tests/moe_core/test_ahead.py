"""Steps asked of the device before the one in front of them was read, as a GPU has them; here on a CPU."""

import copy
import math
import time

import pytest
import torch
from small_models import measured, weights

from moe_core.records import OnItsWay
from moe_core.trainer import NonFiniteError

WAYS = [{}, dict(dropless=False, top_k=2, gradient_accumulation_steps=2, grad_clip=0.5),
        dict(balance="both", dropout=0.1, bias=True), dict(optimizer="muon_adamw", starved_experts="skip"),
        dict(optimizer="muon_sophia", sophia_k=2), dict(optimizer="sophia", sophia_k=1)]


def ahead(trainer):
    trainer.runs_ahead = True
    return trainer


def tensors(state, name=""):
    """A nested state as (place, value) pairs."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            if key != "lr":  # of a group: set anew before each update
                yield from tensors(value, f"{name}.{key}")
    else:
        yield name, state


def assert_same_state(one, other):
    for (place, a), (_, b) in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, place


def blow_up_at_the_next_batch(trainer):
    """NaN behind an attention whenever that batch passes; returns what takes it off."""
    place, tokens = trainer.train.state_dict(), []
    bad = trainer.train.next()[:, :-1]
    trainer.train.load_state_dict(place)
    trainer.model.embed.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    return trainer.model.blocks[1].attn.register_forward_hook(
        lambda module, args, out: out * math.nan if torch.equal(tokens[-1], bad) else out)


@pytest.mark.parametrize("changes", WAYS)
def test_a_step_asked_ahead_is_the_step_it_would_have_been(make, changes):
    """Twelve steps, validation among them: every metric and every weight of a trainer that waits for each."""
    one, other = ahead(make(**changes)), make(**changes)
    under_way = []
    for step in range(1, 13):
        rows = measured(one.step(more=step < 12)), measured(other.step())
        assert rows[0] == pytest.approx(rows[1], rel=1e-5, abs=1e-7), step
        under_way.append(one.under_way)
    assert under_way == [step not in (10, 12) for step in range(1, 13)]  # validated, last
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_report_that_is_not_finite_for_no_fault_of_the_step_takes_the_step_once(make):
    """Routers that begin at zero: how far they move relative to that is infinite, and no reason to refuse or repeat."""
    one, other = ahead(make(eval_interval=0)), make(eval_interval=0)
    plain = make(eval_interval=0)
    for trainer in (one, other, plain):
        with torch.no_grad():
            for block in trainer.model.blocks:
                block.mlp.router.weight.zero_()
    for _ in range(4):
        one.step(more=True), other.step()
        plain.step()
        for group in plain.optimizer.param_groups:
            group["update_size"] = torch.zeros(())  # so that its reports are finite
    one.step(), other.step(), plain.step()
    assert torch.equal(weights(other), weights(plain)) and torch.equal(weights(one), weights(plain))


def test_the_next_step_is_asked_for_before_this_one_is_read(make, monkeypatch):
    """While more follow, the only reading of a step comes after the gradients of the next."""
    trainer, order = ahead(make(eval_interval=0)), []
    backward, read = trainer._backward, OnItsWay.read
    monkeypatch.setattr(trainer, "_backward", lambda number: order.append(f"ask {number}") or backward(number))
    monkeypatch.setattr(OnItsWay, "read", lambda self: order.append("read") or read(self))
    for more in (True, True, False):
        trainer.step(more=more)
    assert order == ["ask 1", "ask 2", "read", "ask 3", "read", "read"]


@pytest.mark.parametrize("changes", WAYS)
def test_a_step_that_is_not_finite_and_the_one_asked_after_it_leave_nothing_behind(make, changes):
    """Found one step late, it stops where it would have: weights, optimizer, random numbers and data as before it."""
    one, other = ahead(make(eval_interval=0, **changes)), make(eval_interval=0, **changes)
    for _ in range(3):
        one.step(more=True), other.step()
    one.step(), other.step()
    before = copy.deepcopy(one.state_dict())

    hooks = [blow_up_at_the_next_batch(trainer) for trainer in (one, other)]
    with pytest.raises(NonFiniteError) as late:
        one.step(more=True)
    with pytest.raises(NonFiniteError) as soon:
        other.step()
    assert str(late.value) == str(soon.value) and "block 1" in str(late.value)
    assert not one.under_way and one.whole and one.skipped == 1
    assert_same_state(one.state_dict(), before | {"skipped": 1})

    for hook in hooks:
        hook.remove()
    for more in (True, False):
        assert measured(one.step(more=more)) == pytest.approx(measured(other.step()), rel=1e-5, abs=1e-7)


def test_what_stops_a_step_asked_ahead_is_raised_when_its_turn_comes(make):
    """The step before it is returned; then the error, once, and after it the steps go on as if nothing had been."""
    one, other = ahead(make()), make()
    batches = one.train.next
    given = iter((batches, batches, lambda: 1 / 0))
    one.train.next = lambda: next(given, batches)()
    for _ in range(2):
        assert measured(one.step(more=True)) == measured(other.step())
    with pytest.raises(ZeroDivisionError):
        one.step(more=True)
    for _ in range(3):
        assert measured(one.step(more=True)) == measured(other.step())


def test_no_state_is_taken_while_a_step_is_under_way(make):
    """The weights are then of no known step: it is refused; another state that is loaded gives the step up."""
    trainer = ahead(make())
    start = copy.deepcopy(trainer.state_dict())
    first = measured(trainer.step(more=True))
    with pytest.raises(RuntimeError, match=r"step 2 is under way; finish it with step\(\) first"):
        trainer.state_dict()
    trainer.load_state_dict(start)
    assert not trainer.under_way and trainer.routed is None  # what was routed there was another step's
    assert measured(trainer.step()) == first


def test_a_knob_a_pause_and_a_save_meet_a_run_between_two_steps(tiny_run):
    """Turned while steps are asked ahead: it acts two steps on, as its event says, and nothing is left under way."""
    run = tiny_run(eval_interval=0, save_interval=20, keep_checkpoints=100)
    run.step(1)
    ahead(run._trainer)
    run.session.start(10_000)
    asked = []
    for target, temp in ((15, 2.0), (30, 0.7), (45, 1.1)):
        wait_for(run, lambda target=target: run.current_step >= target)
        asked.append(run.current_step)
        run.knobs["router_temp"].hold(temp)
    wait_for(run, lambda: not run.session.pending())
    run.session.pause()
    run.session.wait()
    assert not run.under_way
    rows, turns = run.metrics()["router/temp"], run.events().query("kind == 'knob'")
    assert rows.index.tolist() == list(range(1, run.current_step + 1))
    for before, at, value in zip(asked, turns["step"], turns["value"], strict=True):
        assert rows[at] == pytest.approx(value) and rows[at - 1] != pytest.approx(value)
        assert at - before <= 3  # one may have been finished since it was looked up
    assert {20, 40} <= {c.step for c in run.store.checkpoints()}
    assert (run.replay()["largest"] == 0).all()


def wait_for(run, true):
    deadline = time.monotonic() + 20
    while not true():
        assert run.session.state == "training" and time.monotonic() < deadline
        time.sleep(0.001)


def test_a_disk_that_refuses_a_row_loses_neither_it_nor_the_step_under_way(tiny_run, monkeypatch):
    """Both rows are written when there is room again, with the numbers of a run that never failed."""
    run, twin = tiny_run("run"), tiny_run("twin")
    run.step(1), twin.step(8)
    ahead(run._trainer)
    write, calls = run.store.log_step, []

    def log_step(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(*args)
    monkeypatch.setattr(run.store, "log_step", log_step)
    with pytest.raises(OSError, match="No space left"):
        run.step(7)
    assert run.current_step == 3
    run.step(5)
    assert run.metrics().filter(regex="^(?!perf/)").equals(twin.metrics().filter(regex="^(?!perf/)"))
