"""Old logs as the scripts print them: with other programs' lines between, cut short, started again; W&B exports."""

import csv
import math
import random

import numpy as np
import pytest

import moe_core as mc
from moe_core import frames
from moe_core.old_forms import Console, Draft, Tally
from moe_core.old_logs import LogError, import_log

FOREIGN = [
    "wandb: Currently logged in as: iter-fan", "Token indices sequence length is longer than 2048 ✓",
    "Resolving data files: 100%|██████████| 2110/2110 [00:00<00:00, 33.1it/s]", "[rank0] NCCL version 2.21",
    "\x1b[33mUserWarning: loss 1.0 is not what you think\x1b[0m", "iter the dataset again", "eval mode on",
    "Downloading:  45%|####5     | 45/100 [00:01", "  loss 3.1415", "12 loss 2.7182 lr 1.000e-03 5 tok/s"]


def read(path, branch=None):
    """(metrics by step without the absent ones, texts of events) of a run's current branch, or of one by name."""
    with mc.RunStore.open(path) as store:
        at = next((b.id for b in store.branches() if b.name == branch), store.get_meta("branch"))
        frame = frames.metrics(store, at, 0, False)
        events = [e for e in store.read_events(at)]
    return {step: row.dropna().to_dict() for step, row in frame.iterrows()}, events


def close(found, expected):
    return found.keys() == expected.keys() and all(
        row.keys() == expected[step].keys() and row == pytest.approx(expected[step], rel=1e-6)
        for step, row in found.items())


def moe_log(seed, n=30, every=10):
    """(lines, truth) of a MoE log of ``n`` iter lines, an eval line behind every third."""
    rng, lines, truth = random.Random(seed), ["Model params: 202,952,528 (202.95M)"], {}
    for i in range(1, n + 1):
        loss, lr, speed = rng.uniform(0.5, 12), 10 ** rng.uniform(-7, -3), rng.randrange(9, 99999)
        share, active, collapsed = rng.uniform(0.12, 1), rng.randrange(1, 9), rng.randrange(2)
        lines.append(f"iter {i * every:6d} | loss {loss:.4f} | lr {lr:.3e} | {speed} tok/s | r_max {share:.2f} "
                     f"act_min {active} col {collapsed}")
        truth[i * every] = {
            "train/loss": round(loss, 4), "lr": float(f"{lr:.3e}"), "perf/tok_s": speed,
            "router/max_frac_max": round(share, 2), "router/active_min": active, "router/collapsed": collapsed}
        if i % 3 == 0:
            val = rng.uniform(0.5, 12)
            lines.append(f"eval | val_loss {val:.4f}")
            truth[i * every]["val/loss_with_aux"] = round(val, 4)
    return lines, truth


def dense_log(seed, steps=1200, log_every=100, val_every=200):
    """(lines, truth by optimizer) of a dense log of two optimizers, one after the other, and their summary."""
    rng, lines, truth = random.Random(seed), ["GPU: NVIDIA GeForce", ""], {}
    for name in ("adamw", "muon_sophia"):
        rows = truth.setdefault(name, {})
        for step in range(log_every, steps + 1, log_every):
            loss, took = rng.uniform(3, 33), rng.uniform(100, 2000)
            line = f"[{name:12s}] step {step:5d}/{steps}  loss {loss:.4f}  avg {took:.2f} ms/it"
            rows[step] = {"train/loss": round(loss, 4), "perf/ms_it": round(took, 2)}
            if step % 300 == 0:
                speed, norm = rng.randrange(99999), rng.uniform(0, 3)
                line += f"    {speed} tok/s  gnorm {norm:.2f}/1"
                rows[step] |= {"perf/tok_s": speed, "grad/norm": round(norm, 2)}
            lines.append(line)
            if step % val_every == 0:
                val = rng.uniform(3, 9)
                lines.append(f"[{name:12s}]   (val) loss {val:.4f}  ppl {math.exp(val):.1f}")
                rows[step] |= {"val/loss": round(val, 4), "val/ppl": round(math.exp(val), 1)}
    summary = [f"{name:14s}327.55 ms/it       50020 tok/s   loss 11.0755" for name in truth]
    return [*lines, "=== Summary (GPU) ===", *summary], truth


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_moe_log_is_read_to_the_last_digit_whatever_stands_between(tmp_path, encoding):
    """Foreign lines, colour codes, bars glued in front, CRLF; the counts of what was passed over add up."""
    lines, truth = moe_log(1)
    rng, mixed, foreign = random.Random(2), [" 10%|#1, \"Step\r 20%|##2\r"], 2
    for line in lines:
        for _ in range(rng.randrange(3)):
            mixed.append(rng.choice(FOREIGN))
            foreign += 1
        glue = rng.randrange(4) if "iter" in line else 2
        if glue == 0:
            line, foreign = f"\r 45%|####5     | 45/100 [00:01<00:01, 33.1it/s]{line}", foreign + 1
        elif glue == 1:
            line = f"\x1b[32m{line}\x1b[0m"
        mixed.append(line)
    log = tmp_path / "train.log"
    log.write_bytes("\r\n".join(mixed).encode(encoding))
    made = import_log(log, tmp_path / "old")
    assert made.runs == {"moe": tmp_path / "old"}
    assert (made.rows, made.values) == (len(truth), sum(map(len, truth.values())))
    found, events = read(tmp_path / "old")
    assert close(found, truth) and events == []
    assert sum(count for count, _ in made.passed_over.values()) == foreign
    assert str(tmp_path / "old") in str(made) and "passed over" in str(made)
    with mc.RunStore.open(tmp_path / "old") as store:
        assert store.config["imported"]["params"] == 202952528


def test_no_cut_makes_a_number_up():
    """Cut after any byte of a line, or broken there by another program: what is read is what was logged."""
    seed = random.randrange(1 << 30)
    lines, truth = moe_log(seed, n=6)
    dense, dense_truth = dense_log(seed, steps=600)
    rng = random.Random(seed)
    for text, per_run, every in (("\n".join(lines), {"moe": truth}, None), ("\n".join(dense), dense_truth, 200)):
        for n in range(300):
            at = rng.randrange(len(text) // 2, len(text))
            tail = ["", "\n" + rng.choice(FOREIGN) + "\n" + text[at:], "\r" + FOREIGN[2] + "\r" + text[at:],
                    " 45%|####5     | 45/100 [00:01<00:01, 33.1it/s]" + text[at:], "Traceback" + text[at:]][n % 5]
            console = Console(Tally(), every, 0)
            console.read(text[:at] + tail)
            console.close()
            for run, draft in console.drafts.items():
                for step, row in (item for stretch in draft.stretches for item in stretch.rows.items()):
                    expected = per_run[run].get(step, {})
                    assert row == {metric: expected.get(metric) for metric in row}, (seed, text[at - 90:at], tail[:40])


def test_a_dense_log_makes_a_run_of_each_optimizer(tmp_path):
    """With val_every each validation has its step, and the summary is kept as an event of its run."""
    lines, truth = dense_log(6)
    (tmp_path / "log").write_text("\n".join(lines))
    made = import_log(tmp_path / "log", tmp_path / "old", val_every=200)
    assert made.runs == {name: tmp_path / "old" / name for name in truth} and made.passed_over == {
        "other": (1, ("GPU: NVIDIA GeForce",))}
    for name, path in made.runs.items():
        found, events = read(path)
        assert close(found, truth[name])
        (summary,) = events
        assert "11.0755" in summary["payload"]["text"]


def test_a_validation_without_a_sure_step_is_an_event_and_no_point(tmp_path):
    """Without val_every; with one that the lines refute; and behind one whose line was lost, until it is sure again."""
    lines, truth = dense_log(7)
    (tmp_path / "log").write_text("\n".join(lines))
    n_val = sum("(val)" in line for line in lines)
    for n, options in enumerate(({}, {"val_every": 700})):
        made = import_log(tmp_path / "log", tmp_path / f"old{n}", **options)
        events = [e for path in made.runs.values() for e in read(path)[1] if "val/loss" in e["payload"]]
        placed = [step for path in made.runs.values() for step, row in read(path)[0].items() if "val/loss" in row]
        assert len(events) + len(placed) == n_val and (n or not placed)
        assert sum(count for what, (count, _) in made.passed_over.items() if "without a step" in what) == len(events)
    lost = [line for i, line in enumerate(lines) if not (line.startswith("[adamw") and "(val)" in line and i < 10)]
    assert len(lost) < len(lines)
    (tmp_path / "log").write_text("\n".join(lost))
    found, _ = read(import_log(tmp_path / "log", tmp_path / "lost", val_every=200).runs["adamw"])
    assert any("val/loss" in row for row in found.values())
    for step, row in found.items():
        assert row == pytest.approx({metric: truth["adamw"][step][metric] for metric in row}, rel=1e-6)


def test_a_log_that_starts_again_opens_a_branch(tmp_path):
    """A resume from 200 behind 300, in two files: both lines are whole, and the later one is current."""
    (first, one), (second, two) = moe_log(8), moe_log(9)
    (tmp_path / "a.log").write_text("\n".join(first) + "\n")
    (tmp_path / "b.log").write_text("\n".join(line for line in second if line >= "iter    210" or "eval" in line))
    again = [line for i, line in enumerate(second) if i > second.index(next(x for x in second if "iter    200" in x))]
    (tmp_path / "b.log").write_text("\n".join(again[1:] if again[0].startswith("eval") else again))
    made = import_log([tmp_path / "a.log", tmp_path / "b.log"], tmp_path / "old")
    assert made.branches == {"moe": ("from-200",)}
    assert close(read(tmp_path / "old", "main")[0], one)
    assert close(read(tmp_path / "old")[0], {**{s: r for s, r in one.items() if s <= 200},
                                             **{s: r for s, r in two.items() if s > 200}})


def test_a_log_that_starts_again_and_again_forks_where_each_line_of_it_went(tmp_path):
    """Behind the newest step that the line shows by then, not one that an earlier line shows further on."""
    draft = Draft("moe", "")
    for at, step in enumerate((100, 200, 300, 350, 400, 500, 450, 310, 410, 390, 50)):
        assert draft.row(step, {"train/loss": float(at)})
    assert [(stretch.parent, stretch.fork) for stretch in draft.stretches] == [
        (None, 0), (0, 400), (1, 300), (2, 310), (3, 0)]


def test_a_dense_log_that_starts_again_keeps_its_validations_where_they_were(tmp_path):
    """A resume from 200 behind the validation of 400, every step counted from 0: each row stands one step further."""
    (first, one), (second, two) = ((log[: log.index("=== Summary (GPU) ===")], truth["adamw"])
                                   for log, truth in map(dense_log, (10, 11)))
    parts = [[line for line in log if line.startswith("[adamw")] for log in (first, second)]
    (tmp_path / "a.log").write_text("\n".join(parts[0][:6]))  # to the validation of 400
    (tmp_path / "b.log").write_text("\n".join(parts[1][3:]))  # from 300
    made = import_log([tmp_path / "a.log", tmp_path / "b.log"], tmp_path / "old", val_every=200, shift=1)
    assert made.branches == {"adamw": ("from-201",)}
    assert close(read(tmp_path / "old", "main")[0], {s + 1: row for s, row in one.items() if s <= 400})
    found, events = read(tmp_path / "old")
    assert events == [] and close(found, {s + 1: row for s, row in [*list(one.items())[:2], *list(two.items())[2:]]})


def test_a_repeated_line_and_a_step_zero_change_nothing_else(tmp_path):
    """The same line twice is one row; iter 0 is an event, or step 1 with shift=1; nan is absent and said."""
    log = tmp_path / "log"
    line = "iter {:6d} | loss {} | lr 3.208e-04 | 33016 tok/s | r_max 0.19 act_min 8 col 0\n"
    log.write_text("eval | val_loss 9.0000\n" + line.format(0, "10.4001") + "eval | val_loss 10.5000\n"
                   + 2 * line.format(10, "5.8884") + line.format(20, "nan"))
    made = import_log(log, tmp_path / "old")
    found, events = read(tmp_path / "old")
    assert list(found) == [10, 20] and found[10]["train/loss"] == pytest.approx(5.8884)
    assert "train/loss" not in found[20] and found[20]["perf/tok_s"] == 33016
    assert [e["payload"].get("train/loss") for e in events] == [10.4001, None, None]
    assert any("nan at step 20" in e["payload"]["text"] for e in events)
    assert {what.split(",")[0].split(" the")[0]: count for what, (count, _) in made.passed_over.items()} == {
        "eval line without": 1, "before step 1": 2, "repeated": 1}
    assert list(read(import_log(log, tmp_path / "shifted", shift=1).runs["moe"])[0]) == [1, 11, 21]
    log.write_text(line.format(10, "5.8884") + "iter     20 | loss\neval | val_loss 5.0000\n")
    assert "val/loss_with_aux" not in read(import_log(log, tmp_path / "torn").runs["moe"])[0][10]
    log.write_text("Step,a - loss,a - _timestamp\n0,2.5,1700000000\n1,2.25,1700000010\n1,9.0,\n")
    made = import_log(log, tmp_path / "csv", shift=1)
    assert read(made.runs["a"])[0] == {1: {"loss": 2.5}, 2: {"loss": 2.25}}
    assert [count for what, (count, _) in made.passed_over.items() if "first one stays" in what] == [1]
    with mc.RunStore.open(tmp_path / "csv") as store:
        assert store.read_steps(shares=False).time.tolist() == [1.7e9, 1.7e9 + 10]


def test_a_wandb_export_makes_a_run_of_each_with_its_holes(tmp_path):
    """Two runs in two files, twins and inner columns passed over, empty cells absent, timestamps taken."""
    names, rng = ("big - run, \"1\"", "ünicode/2"), np.random.default_rng(10)
    truth = {name: {} for name in names}
    for file, metrics in (("a.csv", ("train/loss",)), ("b.csv", ("val/loss", "_timestamp", "_step"))):
        rows = []
        for step in range(1, 40):
            row = {"Step": step}
            for name in names:
                for metric in metrics:
                    value = "" if rng.random() < 0.4 else repr(float(rng.normal()))
                    row |= {f"{name} - {metric}{twin}": value for twin in ("", "__MIN", "__MAX")}
                    if value and metric in ("train/loss", "val/loss"):
                        truth[name].setdefault(step, {})[metric] = float(value)
            rows.append(row)
        with open(tmp_path / file, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
            out.write('"40","1.')  # cut short
    made = import_log([tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "old",
                      rename={"val/loss": "val/loss_with_aux"})
    assert list(made.runs) == list(names)
    for name, path in made.runs.items():
        expected = {step: {metric.replace("val/loss", "val/loss_with_aux"): value for metric, value in row.items()}
                    for step, row in sorted(truth[name].items())}
        assert path.parent == tmp_path / "old" and close(read(path)[0], expected)
    counts = {what: count for what, (count, _) in made.passed_over.items()}
    assert counts == {"columns of __MIN and __MAX": 16, "other columns": 2, "read in part, or cut short": 2}


def test_an_imported_run_is_read_and_never_trained(tmp_path):
    """Run.open and Run.attach say in one line what it is, and leave it open to readers and to nobody's lock."""
    lines, _ = moe_log(11)
    (tmp_path / "log").write_text("\n".join(lines))
    import_log(tmp_path / "log", tmp_path / "old")
    for again in (mc.Run.open, mc.Run.attach, mc.Run.open):
        with pytest.raises(mc.StoreError, match=r"imported log, read-only.*RunStore\.open") as raised:
            again(tmp_path / "old")
        assert "\n" not in str(raised.value)
    mc.RunStore.open(tmp_path / "old", write=True).close()


def test_what_is_no_log_is_one_line_and_writes_nothing(tmp_path):
    """No file, a folder, bytes, foreign lines alone, a CSV without Step, bad options, a place that is taken."""
    (tmp_path / "bytes").write_bytes(np.random.default_rng(12).bytes(5000))
    (tmp_path / "foreign").write_text("\n".join(FOREIGN))
    (tmp_path / "own.csv").write_text("optimizer,loss\nadamw,3.2\n")
    (tmp_path / "endless").write_text("".join(line.replace("7", "9" * 5000) for line in (
        "Model params: 7 (7M)\n", "iter 7 | loss 1.0000\n", "[adamw       ] step 7/7  loss 5.6797\n")))
    (tmp_path / "wild.csv").write_text("Step,run - loss,run - _timestamp\n1e300,1,1\ninf,2,2\n3,x,nan\n")
    (tmp_path / "good").write_text("\n".join(moe_log(13)[0]))
    before = sorted(tmp_path.iterdir())
    for log, why, options in (
            ("absent", "No such file", {}), ("", "directory", {}), ("bytes", "no line of a known form", {}),
            ("foreign", "no line of a known form", {}), ("own.csv", "no column Step.*optimizer", {}),
            ("endless", "no line of a known form", {}), ("wild.csv", "no value that has a step", {}),
            ("good", "val_every = 0", {"val_every": 0}), ("good", "val_every", {"val_every": {"adamw": -1}}),
            ("good", "'adam' must be one of adamw", {"val_every": {"adam": 200}}),
            ("good", "no 'loss'.*train/loss", {"rename": {"loss": "train/ce"}}),
            ("good", "shift = 0.5", {"shift": 0.5}), ("good", "rename", {"rename": {"lr": "train/loss"}})):
        with pytest.raises(LogError, match=why) as raised:
            import_log(tmp_path / log, tmp_path / "old", **options)
        assert "\n" not in str(raised.value)
    with pytest.raises(LogError, match="at least one"):
        import_log([], tmp_path / "old")
    with pytest.raises(mc.StoreError, match="exists already"):
        import_log(tmp_path / "good", tmp_path / "bytes")
    assert sorted(tmp_path.iterdir()) == before
