"""What is kept of a run's states: which, in memory and on disk, and each of them whole."""

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_core import checkpoint, snapshots


def test_snapshots_are_the_newest_that_memory_holds(monkeypatch):
    """Copies of their own; one that is there is not made again but is the newest then; the oldest make room."""
    monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 1200)
    kept, state = snapshots.Snapshots(), {"deep": [{"w": torch.zeros(100)}]}  # 400 bytes

    def at_hand():
        return [(s.branch, s.step, s.state["deep"][0]["w"][-1].item()) for s in kept]
    for branch, step in ((1, 1), (1, 2), (2, 2)):
        kept.take(branch, step, state)
        state["deep"][0]["w"] += 1
    assert at_hand() == [(1, 1, 0), (1, 2, 1), (2, 2, 2)]
    kept.take(1, 1, state)
    assert at_hand() == [(1, 2, 1), (2, 2, 2), (1, 1, 0)]
    kept.take(1, 3, state)
    assert at_hand() == [(2, 2, 2), (1, 1, 0), (1, 3, 3)]
    kept.take(1, 4, {"deep": [{"w": torch.zeros(1000)}]})
    assert at_hand() == [(1, 4, 0)]


def test_what_is_kept_is_the_last_the_best_the_newest_by_interval_and_the_named(tiny_run):
    run = tiny_run(save_interval=4, keep_checkpoints=2, eval_interval=0)
    run.step(3)
    run.checkpoint("before <sharpening>/..")
    run.checkpoint("before sharpening")  # its file would have the same name
    run.step(18)
    run._save()
    kept = [(c.step, c.name) for c in run.store.checkpoints()]
    assert sorted(kept, key=str) == sorted([(3, "before <sharpening>/.."), (3, "before sharpening"),
                                            (16, None), (20, None), (21, None)], key=str)
    on_disk = {str(file.relative_to(run.path)) for file in (run.path / "checkpoints").iterdir()}
    assert on_disk == {c.path for c in run.store.checkpoints()}


def test_what_a_crash_in_a_save_left_is_mended(tiny_run):
    """A draft goes; a state that is whole and was not entered is; one of another run, or of no row, is let lie."""
    run, other = tiny_run(), tiny_run("other")
    for each, steps in ((run, 1), (run, 3), (other, 2)):
        each.step(steps)
        each.checkpoint("x")
    entered = {(c.branch, c.step, c.name, c.path) for c in run.store.checkpoints()}
    for c in run.store.checkpoints():
        run.store.drop_checkpoint(c.id)
    folder = run.path / "checkpoints"
    strange, draft = folder / "1-00000002-x.safetensors", folder / ".1-00000003.safetensors.77"
    shutil.copy(other.path / other.store.checkpoints()[-1].path, strange)
    draft.write_bytes(b"half")
    checkpoint.save(folder / "1-00000005.safetensors", {}, {
        "run": run.store.get_meta("created"), "branch": 1, "step": 5, "name": None})
    run.history.tidy()
    assert {(c.branch, c.step, c.name, c.path) for c in run.store.checkpoints()} == entered
    assert {step for _, step, *_ in entered} == {1, 4} and strange.exists() and not draft.exists()


def test_the_best_by_validation_is_kept(tiny_run):
    """Training on with a rate that spoils the model leaves the best checkpoint in place."""
    run = tiny_run(eval_interval=4)
    run.step(8)
    run.knobs["lr_scale"].hold(100.0)
    run.history._best.clear()  # as a new process has it
    run.step(4)
    run._save()
    val = run.metrics()["val/loss"].dropna()
    assert val[12] > val[8]
    assert {8, 12} <= {c.step for c in run.store.checkpoints()}


def test_a_checkpoint_is_whole_or_refused(tmp_path):
    """Cut at any of many offsets it is refused in one line; whole, it gives every tensor and number back, to whoever
    may read its folder.
    """
    state = {"a": torch.randn(3, 4, dtype=torch.bfloat16).t(), "b": {7: [torch.tensor(2.0), None, "x", 0.1, True]}}
    path = tmp_path / "c.safetensors"
    tmp_path.chmod(0o750)
    checkpoint.save(path, state, {"step": 3})
    assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o640
    back = checkpoint.load(path)
    assert torch.equal(back["a"], state["a"]) and back["b"][7][1:] == [None, "x", 0.1, True]
    assert torch.equal(back["b"][7][0], state["b"][7][0])
    assert checkpoint.about(path) == {"step": 3}
    whole = path.read_bytes()
    for cut in np.random.default_rng().integers(0, len(whole), 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(checkpoint.CheckpointError) as refused:
            checkpoint.load(path)
        assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)
    path.write_bytes(whole.replace(rb'{\"step\": 3}', rb'{\"step\": 4}'))
    with pytest.raises(checkpoint.CheckpointError, match="is damaged: its CRC-32 is"):
        checkpoint.load(path)
    save_file({}, path, {"format": "1", "about": "{}", "state": '{"items": []}'})  # as one was before it had a sum
    assert checkpoint.load(path) == {}
    save_file({}, path, {"format": str(checkpoint.FORMAT + 1), "about": "{}", "state": "{}"})
    with pytest.raises(checkpoint.CheckpointError, match="was written by a newer version"):
        checkpoint.load(path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match="taken: not saved"):
        checkpoint.save(tmp_path / "taken", state, {})
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "taken"}  # no draft is left
    with pytest.raises(TypeError, match="a state holds no set"):
        checkpoint.save(path, {"s": {1}}, {})
