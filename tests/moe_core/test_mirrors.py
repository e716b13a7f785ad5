"""Mirrors against trackers that work, raise and hang; and the real packages, offline, where they are installed."""

import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest

import moe_core as mc
from moe_core import mirrors
from moe_core.mirrors import Mirrors
from moe_core.trackers import TRACKERS, Line


class Recorder:
    """A tracker that remembers; what it is to do wrong is set on a subclass."""

    interval_s = 0.01

    def __init__(self, line):
        self.line, self.where = line, "memory"
        self.rows, self.finished = [], False
        self.lines.append(self)

    def log(self, step, time, values):
        self.rows.append((step, time, values))

    def flush(self):
        pass

    def finish(self):
        self.finished = True


@pytest.fixture
def mirrored(tiny_run):
    """Makes a run with one mirror of its own beside it, which looks every 10 ms; both are closed at the end."""
    made = []

    def make(run=None, patience=60.0, **doing):
        run = run or tiny_run()
        kind = type("Kind", (Recorder,), {"lines": [], **doing})
        named = type("Named", (), {"store": run.store, "config": run.config.replace(mirrors="wandb")})
        made.append(Mirrors(named, {"wandb": kind}, patience=patience))
        return run, made[-1], kind
    yield make
    for mirror in made:
        mirror.close(wait=1)


def until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def alerts(run):
    return [e["payload"]["text"] for e in run.store.read_events(run._branch.id) if e["kind"] == "alert"]


def test_every_row_arrives_once_in_order_as_the_store_has_it(mirrored):
    """Names, values and times are the store's; what a row lacks (val/loss between validations) is not sent as NaN."""
    run, mirror, kind = mirrored()
    run.step(12)
    mirror.close()
    (line,) = kind.lines
    rows = run.store.read_steps(shares=False)
    assert [step for step, _, _ in line.rows] == list(range(1, 13))
    assert [when for _, when, _ in line.rows] == rows.time.tolist()
    frame = run.metrics()
    for step, _, values in line.rows:
        assert values == frame.loc[step].dropna().to_dict()
    assert [step for step, _, values in line.rows if "val/loss" in values] == [10]
    assert line.finished and alerts(run) == []


def test_each_branch_is_a_line_of_its_own_and_goes_on_where_it_was(mirrored, monkeypatch):
    """After a rewind the new line begins behind its fork, the old one keeps its end; closing repeats no row."""
    monkeypatch.setattr(mirrors, "REST", 0)
    run, mirror, kind = mirrored()
    run.step(6)
    run.rewind(4)
    run.step(3)
    run.switch("main")
    run.step(1)
    mirror.close()
    run, mirror, again = mirrored(run)
    run.step(2)
    mirror.close()
    sent, keys = {}, {}
    for line in kind.lines + again.lines:
        assert [step for step, _, _ in line.rows] == sorted(step for step, _, _ in line.rows)
        sent.setdefault(line.line.name, []).extend(step for step, _, _ in line.rows)
        keys.setdefault(line.line.name, set()).add(line.line.key)
    assert sent == {"run": list(range(1, 10)), "run/from-4": [5, 6, 7]}
    assert all(len(same) == 1 for same in keys.values()) and len(set.union(*keys.values())) == 2
    assert [line.line.resumed for line in again.lines] == [True]


def test_a_tracker_that_raises_is_said_once_and_tried_again(mirrored, monkeypatch):
    """Training takes every step, one alert names the error, and the rows go out when the tracker works again."""
    monkeypatch.setattr(mirrors, "RETRY_S", 0.02)
    broken = threading.Event()
    broken.set()

    def log(self, step, time, values):
        if broken.is_set():
            raise ConnectionError("no route\nto host")
        self.rows.append((step, time, values))
    run, mirror, kind = mirrored(log=log)
    run.step(5)
    until(lambda: len(kind.lines) > 2 and alerts(run))
    broken.clear()
    until(lambda: kind.lines[-1].rows)
    mirror.close()
    assert run.current_step == 5
    (said,) = alerts(run)
    assert "wandb" in said and "ConnectionError: no route to host" in said and "\n" not in said
    assert [step for step, _, _ in kind.lines[-1].rows] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("where", ["__init__", "log", "finish"])
def test_a_tracker_that_hangs_holds_up_nobody(mirrored, where):
    """Hung at any call: steps go on, it is said once, closing returns in its time, and nothing is sent afterwards."""
    free, came_back = threading.Event(), threading.Event()

    def hang(self, *args):
        self.rows = getattr(self, "rows", [])
        self.lines.append(self)
        free.wait(60)
        came_back.set()
    run, mirror, kind = mirrored(patience=0.05, **{where: hang})
    run.step(5)
    if where != "finish":
        until(lambda: alerts(run))
        run.step(5)
    mirror.close(wait=0.4)
    assert not came_back.is_set()
    said = [text for text in alerts(run) if "not answered" in text or "did not finish in time" in text]
    assert len(said) == 1 and run.store.last_step() == run.current_step
    before = sum(len(line.rows) for line in kind.lines)
    place = run.store.get_meta("mirror/wandb")
    free.set()
    until(lambda: not mirror._mirrors[0].is_alive())
    assert sum(len(line.rows) for line in kind.lines) == before
    assert run.store.get_meta("mirror/wandb") == place


def test_a_package_that_is_not_there_is_named(mirrored):
    """The alert says what to install; the mirror's thread is gone and closing costs no time."""
    def absent(self, line):
        raise ModuleNotFoundError("No module named 'wandb'")
    run, mirror, _ = mirrored(__init__=absent)
    run.step(2)
    until(lambda: alerts(run))
    mirror.close()
    (said,) = alerts(run)
    assert "No module named 'wandb'" in said and "pip install wandb" in said


def test_what_was_not_sent_is_counted_and_sent_at_the_next_opening(mirrored):
    """A tracker too slow to get all through before the run is closed: an alert with the number, then the rest."""
    def log(self, *row):
        self.rows.append(row)
        if len(self.rows) == 5:  # it takes until nothing more may be sent
            until(lambda: time.monotonic() > mirror._mirrors[0]._until, 60)
    run, mirror, kind = mirrored(log=log)
    run.step(30)
    mirror.close(wait=2)
    sent = kind.lines[0].rows
    assert len(sent) == 5 and any("25 steps were not sent" in text for text in alerts(run))
    _, mirror, again = mirrored(run)
    mirror.close()
    assert [row[0] for row in sent + again.lines[0].rows] == list(range(1, 31))


def test_a_run_starts_and_stops_its_mirrors(tiny_run, tmp_path, monkeypatch):
    """The config alone starts them, closing the run flushes them, and a run that is let go unclosed is not kept."""
    kind = type("Kind", (Recorder,), {"lines": []})
    monkeypatch.setitem(mirrors.TRACKERS, "tensorboard", kind)
    run = tiny_run(mirrors="tensorboard")
    run.step(3)
    run.close()
    assert [step for step, _, _ in kind.lines[0].rows] == [1, 2, 3] and kind.lines[0].finished
    again = mc.Run.open(tmp_path / "run")
    again.step(1)
    again.close()
    assert [step for step, _, _ in kind.lines[1].rows] == [4]
    let_go = mc.Run.open(tmp_path / "run")
    kept = weakref.ref(let_go.store)
    del let_go
    until(lambda: gc.collect() is not None and kept() is None)
    until(lambda: not [t.name for t in threading.enumerate() if t.name.startswith("moe-mirror-")])


def test_a_script_that_just_ends_has_its_last_rows_mirrored(tmp_path):
    """Nothing is closed; rows written right before the main thread ends are sent, and the tracker is finished."""
    script = f"""
        import types
        import moe_core as mc
        from moe_core.mirrors import Mirrors
        class Tracker:
            interval_s, where = 60.0, "here"
            def __init__(self, line): pass
            def log(self, step, time, values): print(step, values["train/ce"])
            def flush(self): pass
            def finish(self): print("finished")
        config = mc.preset("nano", mirrors="wandb")
        store = mc.RunStore.create({str(tmp_path / "run")!r}, config.to_dict())
        Mirrors(types.SimpleNamespace(store=store, config=config), {{"wandb": Tracker}})
        for step in (1, 2, 3):
            store.log_step(1, step, 0.0, {{"train/ce": step / 2}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n") == ["1 0.5", "2 1.0", "3 1.5", "finished", ""], done.stderr


def test_tensorboard_has_the_same_names_steps_and_values(tiny_run):
    """The event files read back by TensorBoard's own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tiny_run(mirrors="tensorboard")
    run.step(11)
    run.rewind(10)
    run.step(1)
    frame, branch = run.metrics(branch="main"), run.metrics()
    run.close()
    read = EventAccumulator(str(run.path / "tensorboard" / "main")).Reload()
    assert set(read.Tags()["scalars"]) == set(frame)
    for name in ("train/loss", "val/loss", "router/frac_dem_e1"):
        column = frame[name].dropna()
        assert [(e.step, e.value) for e in read.Scalars(name)] == list(column.items())
    read = EventAccumulator(str(run.path / "tensorboard" / "from-10")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(11, branch["train/loss"][11])]
    assert alerts_of(run.path) == []


def test_tensorboard_shows_each_step_once_where_a_killed_process_had_sent_more_than_it_noted(tmp_path):
    """What is sent again takes the place of what was sent before."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, after, steps in ((False, 0, (1, 2, 3, 4, 5)), (True, 3, (4, 5, 6))):
        tracker = TRACKERS["tensorboard"](Line(tmp_path, "p", "run", "run", "main", "key", {}, resumed, after))
        for step in steps:
            tracker.log(step, float(step), {"train/loss": after + step})
        tracker.finish()
    read = EventAccumulator(str(tmp_path / "tensorboard" / "main")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 7), (5, 8), (6, 9)]


def test_wandb_offline_has_the_same_names_steps_and_values(tiny_run, monkeypatch):
    """The offline file read back by W&B's own reader; nothing goes over the network."""
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_ERROR_REPORTING", "false"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    run = tiny_run(mirrors="wandb")
    run.step(4)
    frame, times = run.metrics(), run.store.read_steps(shares=False).time.tolist()
    run.close()
    assert alerts_of(run.path) == []
    (file,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
    rows = [{item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item}
            for record in wandb_records(file.read_bytes()) if record.HasField("history")]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4] and [row["_timestamp"] for row in rows] == times
    for row in rows:
        sent = {name: value for name, value in row.items() if not name.startswith("_")}
        assert sent == frame.loc[row["_step"]].dropna().to_dict()


def wandb_records(data, block=1 << 15):
    """The records of a .wandb file: LevelDB's log format (checksum 4, length 2, type 1, data) behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def test_trackio_has_the_same_names_steps_and_values(tiny_run, tmp_path, monkeypatch):
    """The local database read back by trackio itself."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is first imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = tiny_run(mirrors="trackio", wandb_project="mirrored")
    run.step(4)
    frame = run.metrics()
    run.close()
    assert alerts_of(run.path) == []
    (name,) = SQLiteStorage.get_runs("mirrored")
    assert name.startswith("run-")
    logs = SQLiteStorage.get_logs("mirrored", name)
    assert [row["step"] for row in logs] == [1, 2, 3, 4]
    for row in logs:
        sent = {name: value for name, value in row.items() if name not in ("step", "timestamp")}
        assert sent == frame.loc[row["step"]].dropna().to_dict()


def alerts_of(path):
    with mc.RunStore.open(path) as store:
        return [e["payload"]["text"] for e in store.read_events(store.get_meta("branch")) if e["kind"] == "alert"]
