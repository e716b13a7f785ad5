"""Forks: runs of their own that go on from a step of another."""

import numpy as np
import pytest
from small_models import rows

import moe_core as mc


def test_a_fork_is_a_run_of_its_own_with_the_same_future(tiny_run, tmp_path):
    """From step 4 of a run at 6: its history, then the parent's own numbers; the parent is where it was."""
    run = tiny_run()
    run.knobs["router_temp"].hold(1.2)
    run.note("before the fork")
    run.step(6)
    child = run.fork(tmp_path / "child", step=4)
    assert child.current_step == 4 and len(child.events()) == 2
    assert child.store.get_meta("parent") == {"path": str(run.path.resolve()), "branch": 1, "step": 4}
    child.step(3)
    run.step(1)
    assert rows(child).equals(rows(run))
    with pytest.raises(mc.StoreError, match="exists already"):
        run.fork(tmp_path / "child")
    child.close()


def test_a_fork_now_takes_the_turns_along_that_wait_for_the_next_step(tiny_run, tmp_path):
    """A knob turned at the tip acts on the child's next step as on the parent's; a fork before the tip has none."""
    run = tiny_run()
    run.step(3)
    run.checkpoint("whose file is the parent's")
    run.knobs["router_temp"].hold(0.5)
    child = run.fork(tmp_path / "child")
    run.step(2), child.step(2)
    assert rows(child).equals(rows(run)) and child.metrics()["router/temp"][4] == 0.5
    earlier = run.fork(tmp_path / "earlier", step=3)
    assert earlier.events().empty and list(child.events()["kind"]) == ["knob"]
    child.close(), earlier.close()


def test_a_fork_has_the_rates_of_its_own_config(tiny_run, tmp_path):
    """Its optimizer holds what the parent's had gathered, under the child's rates and decay."""
    run = tiny_run(learning_rate=1e-2, min_lr=1e-2)
    run.step(3)
    child = run.fork(tmp_path / "child", learning_rate=1e-3, min_lr=1e-3, weight_decay=0.5)
    child.step(1)
    assert child.metrics()["lr/experts"][4] == child.metrics()["lr"][4] < 0.2 * run.metrics()["lr/experts"][3]
    assert {group["weight_decay"] for group in child._trainer.optimizer.param_groups} == {0.0, 0.5}
    child.close()


def test_a_fork_with_changes_goes_back_no_further_than_its_parents_last_step(tiny_run, tmp_path):
    """What its config never led to is refused by name: earlier steps, a replay, another order of the data."""
    run = tiny_run()
    run.step(4)
    with pytest.raises(mc.ConfigError, match="seed: a fork goes on with its parent's weights, optimizer and data"):
        run.fork(tmp_path / "other", seed=run.config.seed + 1)
    with pytest.raises(mc.ConfigError, match="balance: a fork goes on"):
        run.fork(tmp_path / "other", balance="bias")
    child = run.fork(tmp_path / "child", step=3, batch_size=2)  # of 32 tokens each, where it was 4
    assert [c.name for c in child.store.checkpoints()] == ["fork"]  # which is never dropped
    child.step(2)
    with pytest.raises(ValueError, match=r"step = 2: must be at least 3; .* go back in its parent: .*run"):
        child.rewind(2)
    child.note("seen in the parent's time", step=1)
    with pytest.raises(ValueError, match="replay: the steps up to 3 were taken by this run's parent"):
        child.replay()
    grandchild = child.fork(tmp_path / "grandchild")
    with pytest.raises(ValueError, match="must be at least 3"):
        grandchild.rewind(0)
    after = rows(child)
    assert after["train/tokens_b"].to_numpy() * 1e9 == pytest.approx([32 * n for n in (4, 8, 12, 14, 16)])
    child.rewind(3)
    child.step(2)
    assert rows(child).equals(after) and not (child.events()["kind"] == "alert").any()
    child.close(), grandchild.close()


def test_a_fork_does_without_a_knob_that_it_has_not(tiny_run, tmp_path):
    """A run of limited capacity whose factor was turned goes on dropless."""
    run = tiny_run(dropless=False, capacity_factor=1.0)
    run.knobs["capacity_factor"].hold(2.0)
    run.step(2)
    child = run.fork(tmp_path / "child", dropless=True)
    child.step(1)
    assert "capacity_factor" not in child.knobs and child.metrics()["router/drop_frac_mean"][3] == 0.0
    child.close()


def test_a_fork_may_have_a_smaller_batch_and_goes_on_with_the_same_tokens(tiny_run, tmp_path):
    """Half the batch, twice accumulated: the next losses are the parent's to rounding. Another shape is refused."""
    parent = tiny_run(load_balance_alpha=0.0, router_noise_std_init=0.0)
    parent.step(3)
    child = parent.fork(tmp_path / "small", batch_size=2, gradient_accumulation_steps=2)
    parent.step(3)
    child.step(3)
    np.testing.assert_allclose(child.metrics()["train/ce"], parent.metrics()["train/ce"], rtol=1e-4)
    assert child.config.optim.batch_size == 2 and child.store.get_meta("parent")["changes"]["batch_size"] == 2
    child.close()
    for wrong in (dict(n_experts=8), dict(optimizer="sophia"), dict(text_key="words")):
        with pytest.raises(mc.ConfigError, match="a fork goes on with its parent's weights"):
            parent.fork(tmp_path / "other", **wrong)
    assert not (tmp_path / "other").exists()
