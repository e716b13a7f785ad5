"""``moe`` from a shell: real processes where a process matters, else main() in this one."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from moe_core import RunStore, StoreError
from moe_core.cli import main
from moe_core.commands import spell
from moe_core.presets import preset
from moe_core.shell.console import Console, eval_line, params_line, step_line


@pytest.fixture
def line(tiny):
    """The words after ``moe train`` of a tiny config with any fields changed."""
    return lambda **changes: shlex.split(spell(tiny(**{"max_iters": 12, **changes})))[2:]


def begun(words, folder):
    """A ``moe`` process in ``folder``, with Ctrl-C as a terminal gives it."""
    return subprocess.Popen([sys.executable, "-m", "moe_core", *words], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def until_step(path, step, process):
    """Wait until the run in ``path`` has got to ``step``."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            with RunStore.open(path) as store:
                if store.last_step() >= step:
                    return
        except StoreError:
            pass  # not made yet
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate(timeout=60))


def metrics(path):
    """Every metric of the current branch but the clock's, by step."""
    with RunStore.open(path) as store:
        rows = store.read_steps(store.get_meta("branch", 1))
    timed = [i for i, name in enumerate(rows.names) if name.startswith("perf/")]
    rows.values[:, timed] = 0
    return rows.steps.tolist(), rows.names, rows.values.tobytes(), rows.shares.tobytes()


def test_the_familiar_lines_to_the_letter():
    """Each line of the legacy scripts, from a row that says what it says."""
    moe = preset("moe-203m")
    assert params_line(moe) == "Model params: 202,952,528 (202.95M)"
    row = {"train/loss": 5.88838, "lr": 3.208e-4, "router/max_frac_max": 0.191, "router/active_min": 8.0,
           "router/collapsed": 0.0, "val/loss": 5.90934}
    assert step_line(moe, 400, row, 33016.4, 8000) == (
        "iter    400 | loss 5.8884 | lr 3.208e-04 | 33016 tok/s | r_max 0.19 act_min 8 col 0")
    assert eval_line(moe, row) == "eval | val_loss 5.9093"
    dense = preset("dense-107m", optimizer="muon_sophia", gradient_accumulation_steps=8, batch_size=8)
    row = {"train/loss": 5.67972, "grad/norm": 0.391, "grad/clip": 1.0, "val/loss": 9.0075, "val/ppl": 8164.14}
    tok_s = dense.tokens_per_step / 1.18683
    assert step_line(dense, 1200, row, tok_s, 6000) == (
        "[muon_sophia ] step 1200/6000  loss 5.6797  avg 1186.83 ms/it    55219 tok/s  gnorm 0.39/1")
    assert step_line(dense, 300, row, tok_s, 1500).startswith("[muon_sophia ] step  300/1500  loss 5.6797  avg")
    assert eval_line(dense, row) == "[muon_sophia ]   (val) loss 9.0075  ppl 8164.1"


def test_each_step_is_told_once_whatever_the_clock_says(tiny_run, monkeypatch, capsys):
    """Of a computer whose clock is set back; none is told again on a branch that shows it too."""
    run, now = tiny_run(log_interval=1, eval_interval=0), time.time()
    run.step(2)
    console = Console(run.store, run.config, run.branch, 2, 10)
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    run.step(2)
    console.look(run.branch)
    run.rewind(3)
    run.step(3)
    console.look(run.branch)
    assert re.findall(r"iter +(\d+)", capsys.readouterr().out) == ["3", "4", "4", "5", "6"]


def test_a_run_from_the_shell_is_told_in_those_lines_and_lies_where_it_was_asked(line, tmp_path, monkeypatch, capsys):
    """Step lines every log_interval and at a validation, from the rows on disk; a second run goes beside the first."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "runs/a", *line(log_interval=5, eval_interval=6)]) == 0
    out = capsys.readouterr().out.splitlines()
    with RunStore.open("runs/a") as store:
        rows = store.read_steps()
    assert [int(said.split()[1]) for said in out if said.startswith("iter")] == [5, 6, 10, 12]
    assert [said.split(" ")[0] for said in out] == ["Model", "iter", "iter", "eval", "iter", "iter", "eval"]
    assert out[1].split(" | ")[1] == f"loss {rows.column('train/loss')[4]:.4f}"
    assert out[3] == f"eval | val_loss {rows.column('val/loss')[5]:.4f}"
    assert main(["train", "--run", "runs/a", *line(max_iters=2)]) == 0
    assert main(["train", "--run", "runs/a", "--auto_resume", *line(max_iters=14, learning_rate=1e-3)]) == 0
    assert "learning_rate stays 0.003" in capsys.readouterr().err
    assert main(["ls"]) == 0
    said = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in said[1:]] == [["runs/a", "14/12"], ["runs/a-2", "2/2"]]
    assert main(["show", "runs/a"]) == 0
    assert "moe train --preset nano" in capsys.readouterr().out


def test_an_interrupted_run_is_resumed_to_the_same_numbers(line, tmp_path):
    """Ctrl-C in mid-run: paused at a boundary, saved, exit 130, told how; resumed, it is the uninterrupted run."""
    process = begun(["train", "a cut", *line(max_iters=100_000, eval_interval=5)], tmp_path)
    until_step(tmp_path / "a cut", 8, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in told, told
    at = int(re.search(r"paused at step (\d+) of 100000 and saved; continue with: moe resume 'a cut'", told)[1])
    assert main(["resume", str(tmp_path / "a cut"), "--steps", "7"]) == 0
    assert main(["train", str(tmp_path / "whole"), *line(max_iters=at + 7, eval_interval=5)]) == 0
    assert metrics(tmp_path / "a cut") == metrics(tmp_path / "whole")


def test_a_killed_run_goes_on_from_what_was_saved(line, tmp_path, capsys):
    """kill -9, then resume --steps N: what was not saved is trained again, then N steps more on the same line."""
    path = str(tmp_path / "killed")
    process = begun(["train", path, *line(max_iters=100_000, save_interval=20, eval_interval=0)], tmp_path)
    until_step(path, 23, process)
    process.kill()
    process.communicate()
    with RunStore.open(path) as store:
        last = store.last_step()
    assert main(["resume", path, "--steps", "12"]) == 0
    assert f"iter {last + 12:6d} |" in capsys.readouterr().out
    with RunStore.open(path) as store:
        assert store.last_step(1) == last + 12 and len(store.branches()) == 1
    assert main(["show", path]) == 0 and "  train/ce  " in capsys.readouterr().out  # though it never validated


def test_a_run_that_another_process_trains_is_steered_from_the_shell(line, tmp_path, capsys):
    """note, knob, rewind and resume reach it; fork and replay are refused; SIGTERM ends it, saved."""
    path = str(tmp_path / "live")
    process = begun(["train", path, *line(max_iters=100_000, eval_interval=0, log_interval=1000)], tmp_path)
    until_step(path, 5, process)
    assert main(["note", path, "from a shell"]) == main(["knob", path, "router_temp", "1.25"]) == 0
    capsys.readouterr()
    assert main(["replay", path]) == 2 and "another process has this run open" in capsys.readouterr().err
    with RunStore.open(path) as store:
        kinds = {event["kind"]: event["payload"] for event in store.read_events()}
    assert kinds["note"]["text"] == "from a shell" and kinds["knob"]["value"] == 1.25
    assert main(["note", path, "here"]) == 0
    noted = int(capsys.readouterr().out.split()[-1])
    with RunStore.open(path) as store:
        assert [e["step"] for e in store.read_events() if e["payload"].get("text") == "here"] == [noted]
    assert main(["rewind", path, "3", "--name", "again"]) == 0
    assert "at step 3 on branch 'again'" in capsys.readouterr().out
    assert main(["resume", path, "--steps", "4"]) == 0
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "now on branch 'again'" in told, told
    assert main(["ls", str(tmp_path)]) == 0 and " closed " in capsys.readouterr().out


def test_going_back_forking_and_replaying_from_the_shell(line, tmp_path, monkeypatch, capsys):
    """Each command is a process of its own to the run: what one did is where the next goes on."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "a", *line()]) == 0
    for words, said in [("rewind a 7 --name back", "a: at step 7 on branch 'back'"),
                        ("knob a router_temp 1.1 --over 3", "router_temp"), ("resume a --steps 3", "iter     10"),
                        ("replay a", "10 steps retrained, all"), ("note a 'seen before' --step 4", "noted at step 4"),
                        ("fork a b --step 9", "moe resume b"), ("resume b", "iter     12"), ("show b", "forked from"),
                        ("replay b", "12 steps retrained, all"), ("export b --csv b.csv", "b.csv")]:
        assert main(shlex.split(words)) == 0, words
        assert said in capsys.readouterr().out, words
    with RunStore.open("b") as store:
        assert {e["kind"] for e in store.read_events()} >= {"knob", "note"} and store.last_step() == 12
    saved = next((tmp_path / "a" / "checkpoints").glob("1-*12*"))
    stray = tmp_path / "b" / "checkpoints" / "stray.safetensors"
    stray.write_bytes(saved.read_bytes())
    assert main(["resume", str(stray), "--steps", "1"]) == 2
    assert "stray.safetensors: is a checkpoint of another run than b" in capsys.readouterr().err
    assert main(["resume", str(saved), "--steps", "1"]) == 0
    with RunStore.open("a") as store:
        assert store.last_step(1) == 13 and store.get_meta("branch") == 1


def test_several_optimizers_are_a_shoot_out(line, tmp_path, monkeypatch, capsys):
    """``moe train`` with more than one optimizer in its list hands over; runs and table lie where they were asked."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "duel", *line(max_iters=4, opt_list="adamw,sophia", csv="duel.csv")]) == 0
    assert "=== Summary" in capsys.readouterr().out
    assert len((tmp_path / "duel.csv").read_text().splitlines()) == 3
    assert main(["ls", "duel"]) == 0 and capsys.readouterr().out.count("4/4") == 2


def test_a_note_is_shown_where_the_output_cannot_hold_its_characters(tmp_path):
    """As a code page of Windows cannot hold an arrow."""
    with RunStore.create(tmp_path / "run", preset("nano").to_dict()) as store:
        store.log_event(1, 0, "note", {"text": "1 → 2"})
    done = subprocess.run([sys.executable, "-m", "moe_core", "show", tmp_path / "run"], text=True, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and r"note: 1 \u2192 2" in done.stdout, done.stderr


def test_an_old_log_is_listed_beside_the_runs(tmp_path, monkeypatch, capsys):
    """import, ls and show of a run without a config; what needs one is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.log").write_text("iter    400 | loss 5.8884 | lr 3.208e-04 | 33016 tok/s | "
                                      "r_max 0.19 act_min 8 col 0\neval | val_loss 5.9093\n")
    assert main(["import", "old.log", "old"]) == main(["ls"]) == main(["show", "old"]) == 0
    assert "5.8884" in capsys.readouterr().out
    assert main(["resume", "old", "--steps", "1"]) == 2


@pytest.mark.parametrize("words, said", [
    ("train --preset nano --n_expert 4", "--n_expert: there is no such flag; the closest is --n_experts"),
    ("train --preset nano --n_layer 0", "n_layer = 0: must be at least 1"),
    ("train python train_experimental.py --dropless --laod_balance_alpha 1", "--laod_balance_alpha: there is no such"),
    ("train --preset nano --device cpu --dataset_name no/such/folder", "no/such/folder"),
    ("train --resume nowhere", "nowhere: there is no such directory"), ("show nowhere", "nowhere: there is no such"),
    ("ls nowhere", "nowhere: there is no such directory"), ("trian", "argument COMMAND: invalid choice: 'trian'"),
    ("resume", "the following arguments are required: RUN; see moe resume --help"),
    ("resume x --steps 0", "argument --steps: '0': must be an integer, at least 1"),
    ("shootout x --seeds 0", "argument --seeds: '0': must be an integer, at least 1"),
    ("import nowhere.log x", "nowhere.log"), ("export nowhere --csv x.parquet", "x.parquet: must end in .csv")])
def test_what_cannot_be_is_one_line_and_exit_code_2(words, said, tmp_path, monkeypatch, capsys):
    """No traceback, nothing written, the field or the flag named."""
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("moe: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_says_how_to_go_on(line, tmp_path, capsys):
    """A rate that makes the loss non-finite: exit 1, the step and the term in one line, the rows before it kept."""
    path = str(tmp_path / "wild")
    assert main(["train", path, *line(learning_rate=1e30, warmup_iters=0, max_iters=400)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"moe: .*wild: stopped at step \d+: NonFiniteError: .*; continue with: moe resume \S*wild,", last)
