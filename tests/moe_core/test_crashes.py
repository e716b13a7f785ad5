"""kill -9 at any moment: what was reported is there, what is saved is whole, and the run goes on."""

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

import moe_core as mc
from moe_core import checkpoint
from moe_core.run import _open_runs
from moe_core.session import _alive
from moe_core.shell.headless import TrainingError, drive

# Forks a child for each moment, so that torch is imported once. A child opens the run, trains, saves and branches
# until it is killed; what it says goes to a file that outlives it.
NURSERY = """
    import json, os, random, signal, sys, time
    import moe_core as mc
    path, config, moments, seed = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rng = random.Random(seed)

    def live(said, seed):
        rng = random.Random(seed)
        run = mc.Run.open(path)
        run.resume()
        os.write(said, b"resumed\\n")
        while True:
            run.step(rng.randint(1, 3))
            os.write(said, f"{run.branch} {run.current_step}\\n".encode())
            what = rng.choice(["train", "train", "save", "branch"])
            if what == "save":
                run.checkpoint(f"c{rng.random()}")
            if what == "branch":
                run.rewind(rng.randint(0, run.current_step))

    mc.Run.create(path, mc.RunConfig.from_dict(config), say=lambda line: None).close()
    longest = None  # seconds that a child may live: a few times what the first one needs to begin
    for moment in range(moments):
        read, said = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if not child:
            os.close(read)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.dup2(os.open(f"{path}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            try:
                live(said, rng.random() + moment)
            finally:
                os.write(said, b"ended by itself\\n")
                os._exit(1)
        os.close(said)
        first = "" if longest else os.read(read, 8).decode()
        longest = longest or 4 * (time.monotonic() - began)
        time.sleep(rng.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read) as lines:
            print(json.dumps((first + lines.read()).splitlines()), flush=True)
"""


def test_kill_9_at_50_moments_loses_nothing_that_was_said(tiny, tmp_path):
    """In training, saving and branching: every reported step is there, the newest checkpoint loads, it goes on."""
    path, seed = tmp_path / "run", 0
    config = tiny(save_interval=2, eval_interval=4, keep_checkpoints=2)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(NURSERY), path, json.dumps(config.to_dict()), "50",
                           str(seed)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    moments = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(moments) == 50 and sum("resumed" in lines for lines in moments) > 20
    said = (tmp_path / "run.said").read_text()
    assert "cannot be read" not in said, f"seed {seed}: {said}"  # a checkpoint that was entered was whole
    run = mc.Run.open(path)
    try:
        last = dict(zip(run.branches()["name"], run.branches()["last_step"], strict=True))
        for lines in moments:
            assert "ended by itself" not in lines, f"seed {seed}"
            for branch, step in (line.split() for line in lines if line != "resumed"):
                assert last[branch] >= int(step), f"seed {seed}"
        for saved in run.store.checkpoints():
            assert checkpoint.load(path / saved.path)["steps_done"] == saved.step
        files = {f"checkpoints/{file.name}" for file in (path / "checkpoints").iterdir()}
        assert files == {saved.path for saved in run.store.checkpoints()}
        at = run.current_step
        run.step(2)
        assert run.metrics()["train/ce"].notna().all() and run.current_step in (at + 2, run.metrics().index[-1])
        assert (run.replay()["largest"] == 0).all()  # and every number on the line is the one it should be
    finally:
        run.close()


@contextlib.contextmanager
def files_end_at(size):
    """No file of this process can be longer: writing fails as on a full disk, for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_for_a_while_costs_no_step(tiny_run):
    """Full while saving, it trains on and says so; while logging, it stops; with room again no row is missing."""
    run, calm = tiny_run(save_interval=2), tiny_run("calm", save_interval=2)
    run.step(1)
    before = {file.name: file.read_bytes() for file in run.path.glob("checkpoints/*")}
    with files_end_at(300_000):  # a checkpoint is longer, the rows are not
        run.step(2)
    alerts = run.events().query("kind == 'alert'")
    assert len(alerts) == 1 and "not saved; the previous checkpoint is intact" in alerts.iloc[0]["text"]
    assert {file.name: file.read_bytes() for file in run.path.glob("checkpoints/*")} == before
    full = (run.path / "run.sqlite-wal").stat().st_size
    with files_end_at(full), pytest.raises(mc.StoreError, match="is not written"):
        run.step(20)
    stopped = run.current_step
    assert stopped >= 3 and run.session.state == "failed"
    run.step(12 - stopped)
    calm.step(12)
    assert run.metrics().filter(regex="^(?!perf/)").equals(calm.metrics().filter(regex="^(?!perf/)"))


def test_a_shell_is_told_how_to_go_on_after_a_full_disk(tiny_run):
    """That the run could not be closed either hides nothing of what stopped it."""
    run = tiny_run()
    run.step(2)
    full = (run.path / "run.sqlite-wal").stat().st_size + 40_000  # after a few steps
    with (files_end_at(full),
          pytest.raises(TrainingError, match=r"stopped at step \d+: StoreError: .*continue with: moe resume ")):
        drive(run, 100)


def test_what_a_crash_in_a_save_left_is_mended(tiny_run):
    """A draft goes; a checkpoint that was whole but not entered yet is entered; a stranger's file stays."""
    run = tiny_run(save_interval=2)
    run.step(4)
    run.checkpoint("kept")
    run.close()
    folder = run.path / "checkpoints"
    kept = next(folder.glob("*kept*"))
    with mc.RunStore.open(run.path, write=True) as store:
        store.drop_checkpoint(next(c.id for c in store.checkpoints() if c.name == "kept"))
    for draft in (f".{kept.name}.12345", ".tmpa1B2c3"):  # ours, and that of the library which writes it
        (folder / draft).write_bytes(kept.read_bytes()[:1000])
    (folder / "mine.safetensors").write_bytes(b"not a checkpoint")
    about = checkpoint.about(kept) | {"step": "two"}
    checkpoint.save(folder / "odd.safetensors", {}, about)
    with_it = mc.Run.open(run.path)
    assert [c.path for c in with_it.store.checkpoints() if c.name == "kept"] == [f"checkpoints/{kept.name}"]
    assert not list(folder.glob(".*")) and (folder / "mine.safetensors").exists() and (
        folder / "odd.safetensors").exists()
    with_it.close()


@pytest.mark.parametrize("changes, field", [(dict(n_experts=8), "n_experts = 8 there and 4 here"),
                                            (dict(d_model=64), "d_model = 64 there and 32 here"),
                                            (dict(optimizer="muon_adamw"), "optimizer = 'muon_adamw' there")])
def test_a_checkpoint_of_another_model_is_passed_over_naming_the_field(tiny_run, capsys, changes, field):
    """Put in the place of the newest, it is said in one line which field differs, and the one before is taken."""
    run, other = tiny_run(save_interval=2), tiny_run("other", save_interval=2, **changes)
    for made in (run, other):
        made.step(4)
        made.close()
    newest, foreign = (max(mc.RunStore.open(made.path).checkpoints(), key=lambda c: c.step) for made in (run, other))
    shutil.copy(other.path / foreign.path, run.path / newest.path)
    again = mc.Run.open(run.path)
    again.resume()
    said = capsys.readouterr().out
    assert field in said and "saved up to step 2;" in said
    again.close()


def test_a_checkpoint_whose_bytes_changed_is_refused(tmp_path):
    """One bit of a tensor, a digit in the header, or a header that is no JSON any more: one line, nothing loaded."""
    path, state = tmp_path / "c.safetensors", {"steps_done": 1234, "model": {"w": torch.randn(100, 30)}}
    checkpoint.save(path, state, {"step": 1234})
    whole = path.read_bytes()
    assert torch.equal(checkpoint.load(path)["model"]["w"], state["model"]["w"])
    start = 8 + int.from_bytes(whole[:8], "little")
    at = random.randrange(start, len(whole))
    for changed in (whole[:at] + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1:],
                    whole.replace(b"1234", b"1235"), whole.replace(b"1234", b"12{4")):
        path.write_bytes(changed)
        with pytest.raises(checkpoint.CheckpointError, match=r"c\.safetensors: is damaged: its CRC-32 is "):
            checkpoint.load(path)
    with pytest.raises(checkpoint.CheckpointError, match="is damaged: JSONDecodeError"):
        checkpoint.about(path)
    path.write_bytes(whole.replace(b"crc32", b"other"))  # as of before there were sums
    assert checkpoint.load(path)["steps_done"] == 1234


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    """One line with both versions, and what to do."""
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    save_file({"0": torch.zeros(1)}, path, metadata={"format": "99", "about": "{}", "state": '{"items": []}'})
    with pytest.raises(checkpoint.CheckpointError, match=r"newer version \(format 99, this one knows"):
        checkpoint.load(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_leaves_the_run_to_its_parent(tiny_run):
    """It writes nothing, closes nothing at its end, and cannot open the run; the parent goes on."""
    run = tiny_run()
    run.step(1)
    child = os.fork()
    if not child:
        refused = 0
        for ask in (lambda: run.note("of the child"), lambda: mc.Run.open(run.path)):
            try:
                ask()
            except mc.StoreError:
                refused += 1
        os._exit(0 if refused == 2 and not _open_runs and not _alive else 1)
    assert os.waitpid(child, 0)[1] == 0
    run.step(1)
    assert run.current_step == 2 and "note" not in set(run.events()["kind"])


def test_a_run_that_was_deleted_does_not_come_back(tiny_run):
    """A save says that its place is gone, and makes no folder in it; a name of any letters is a file's before that. Nor
    does it touch the run that is made in its place."""
    run = tiny_run()
    run.step(1)
    run.checkpoint("\U0001d400" * 100)
    shutil.rmtree(run.path)
    with pytest.raises(checkpoint.CheckpointError, match=r"not saved.*No such file"):
        run.checkpoint("later")
    assert not run.path.exists()
    with contextlib.closing(mc.Run.create(run.path, run.config.replace(seed=2), say=lambda line: None)) as other:
        other.step(1)
        other.checkpoint("later")
        file, = run.path.glob("checkpoints/*later*")
        whole = file.read_bytes()
        with pytest.raises(checkpoint.CheckpointError, match="another run has taken its place"):
            run.checkpoint("later")
        run.close()
        assert file.read_bytes() == whole


def test_a_close_that_was_interrupted_is_finished_where_the_run_is_opened(tiny_run, monkeypatch):
    """What it had not saved yet is saved then."""
    run = tiny_run()
    run.step(1)
    monkeypatch.setattr(run.history, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    run._unsaved_s = 1.0
    with pytest.raises(KeyboardInterrupt):
        run.close()
    monkeypatch.undo()
    with contextlib.closing(mc.Run.open(run.path)) as again:
        assert again is not run and 1 in {c.step for c in again.store.checkpoints()}
        again.step(1)
        assert again.current_step == 2


def test_a_way_back_that_the_disk_refuses_leaves_the_run_where_it_was(tiny_run, monkeypatch):
    """The next steps are those of the line that it stands on."""
    run, calm = tiny_run(), tiny_run("calm")
    run.step(4)
    monkeypatch.setattr(run.store, "add_branch", lambda *_: (_ for _ in ()).throw(mc.StoreError("the disk is full")))
    with pytest.raises(mc.StoreError, match="the disk is full"):
        run.rewind(2)
    monkeypatch.undo()
    run.step(2)
    calm.step(6)
    assert run.metrics().filter(regex="^(?!perf/)").equals(calm.metrics().filter(regex="^(?!perf/)"))


def test_a_fork_while_a_row_could_not_be_written_costs_no_step(tiny_run, tmp_path):
    """The step whose row a full disk refused is taken again; a report that it refuses says so in a line."""
    run, calm = tiny_run(), tiny_run("calm")
    run.step(2)
    with files_end_at(run.path.joinpath("run.sqlite-wal").stat().st_size), pytest.raises(mc.StoreError):
        run.step(2)
    with files_end_at(1000), pytest.raises(ValueError, match=r"report\.html: not written: File too large"):
        run.report(tmp_path / "report.html")
    run.fork(tmp_path / "fork").close()
    run.step(2)
    calm.step(4)
    assert run.metrics().filter(regex="^(?!perf/)").equals(calm.metrics().filter(regex="^(?!perf/)"))
