import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from moe_core.storage import access
from moe_core.store import RunStore, StoreError

# Opens the run for writing and logs steps until somebody ends it; says each step once it is logged.
WRITER = """
import sys, numpy as np
from moe_core.store import RunStore
with RunStore.open(sys.argv[1], write=True) as store:
    for step in range(store.last_step() + 1, 10**9):
        metrics = {"loss": 1.5 * step} | ({"val": -step} if step % 3 == 0 else {})
        store.log_step(1, step, step / 8, metrics, np.full((2, 2, 3), step, np.float32))
        if step % 10 == 0:
            store.log_event(1, step, "note", {"text": f"at {step}"})
        print(step, flush=True)
"""
# Knows only SQLite: looks at the rows, keeps its look open until told, looks again after.
ONLOOKER = """
import sqlite3, sys
db = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, isolation_level=None)
rows = lambda: print(db.execute("SELECT count(*) FROM steps").fetchone()[0], flush=True)
db.execute("BEGIN"); rows(); input(); rows(); db.execute("COMMIT"); rows()
"""


@contextlib.contextmanager
def child(script, *args):
    """Another Python process with pipes; killed at the end where it still runs."""
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, args)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def store(tmp_path):
    with RunStore.create(tmp_path / "run", {"seed": 1}) as made:
        yield made


# ---- processes and threads -------------------------------------------------------------------------------


def test_kill_9_loses_no_reported_step(store):
    """SIGKILL in mid-loop: every step said is there and right, with its event; reading and writing go on."""
    store.close()
    with child(WRITER, store.path) as writer:
        said = [int(writer.stdout.readline()) for _ in range(random.randrange(50, 3000))]
        writer.send_signal(signal.SIGKILL)
        said += [int(line) for line in writer.stdout.read().split()]
    with RunStore.open(store.path) as reader:
        got = reader.read_steps(1)
        assert len(said) <= len(got) <= len(said) + 1  # the last row may have been killed before it was said
        assert got.steps.tolist() == list(range(1, len(got) + 1))
        np.testing.assert_array_equal(got.column("loss"), 1.5 * got.steps)
        np.testing.assert_array_equal(got.shares[:, 1, 1, 2], got.steps)
        noted = [event["step"] for event in reader.read_events(1)]
        assert noted == list(range(10, 10 * len(noted) + 1, 10))
        assert len(noted) >= said[-1] // 10
    with RunStore.open(store.path, write=True) as writer:
        writer.log_step(1, writer.last_step() + 1, 0.0, {"loss": 0.0})
        assert writer.last_step() == len(got) + 1


def test_a_second_writer_is_refused_with_who_writes(store):
    """Another process or this one: refused naming pid, host and since; reading goes on; closing frees it."""
    store.close()
    with child(WRITER, store.path) as writer:
        writer.stdout.readline()
        holder = rf"open for writing by pid {writer.pid} on {socket.gethostname()}, since 2\d\d\d-\d\d-\d\d \d\d:"
        with pytest.raises(StoreError, match=holder):
            RunStore.open(store.path, write=True)
        with RunStore.open(store.path) as reader:
            seen = reader.last_step()
            deadline = time.time() + 30
            while reader.last_step() == seen and time.time() < deadline:  # it still writes
                writer.stdout.readline()  # a full pipe would stop it
            assert reader.last_step() > seen
    with RunStore.open(store.path, write=True) as first:
        with pytest.raises(StoreError, match=f"by this process, pid {os.getpid()} on"):
            RunStore.open(store.path, write=True)
        with pytest.raises(StoreError, match="exists already; open that run"):
            RunStore.create(store.path, {})
        first.set_meta("still", "mine")
    with RunStore.open(store.path, write=True) as second:
        assert second.get_meta("still") == "mine"


def test_the_writer_never_waits_for_a_reader(store):
    """An onlooker in another process keeps a read open across 1500 commits and a checkpoint of the log."""
    for step in range(1, 101):
        store.log_step(1, step, 0.0, {"a": 1.0})
    with child(ONLOOKER, store.path / "run.sqlite") as onlooker:
        assert onlooker.stdout.readline() == "100\n"
        began = time.perf_counter()
        for step in range(101, 1601):
            store.log_step(1, step, 0.0, {"a": 1.0})
        assert time.perf_counter() - began < 5  # a blocked writer gives up after 10 s
        out, _ = onlooker.communicate("go on\n")
        assert out == "100\n1600\n"  # its look was of one moment, and it may look again


def test_a_reader_never_waits_for_the_writer(store):
    """While a write transaction is open, reading gives all that was committed, at once."""
    store.log_step(1, 1, 0.0, {"a": 1.0})
    with contextlib.closing(sqlite3.connect(store.path / "run.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO events(branch, step, kind, applied, payload) VALUES (1, 1, 'x', 0, '{}')")
        began = time.perf_counter()
        assert (store.last_step(), store.read_events(1), len(store.read_steps(1))) == (1, [], 1)
        assert time.perf_counter() - began < 1
        db.execute("ROLLBACK")


def test_following_a_run_of_another_process_sees_each_row_once(store):
    """Polling read_steps(since=last) while another process writes gives every row, once, in order, right."""
    store.close()
    with child(WRITER, store.path) as writer, RunStore.open(store.path) as reader:
        drain = threading.Thread(target=writer.stdout.read, daemon=True)  # or the writer waits for its pipe
        drain.start()
        steps, losses, polls, last = [], [], 0, 0
        deadline = time.time() + 60
        while (last < 2000 or polls < 20) and time.time() < deadline:
            got = reader.read_steps(1, since=last)
            if len(got):
                polls, last = polls + 1, int(got.steps[-1])
                steps += got.steps.tolist()
                losses += got.column("loss").tolist()
        writer.kill()
        drain.join()
    assert polls >= 20
    assert steps == list(range(1, last + 1))
    assert losses == [1.5 * step for step in steps]


def test_threads_share_one_store(store):
    """Four threads write and two read through one store: nothing is lost, nothing raised."""
    errors, done = [], threading.Event()

    def guarded(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    def write(offset):
        for step in range(offset + 1, 1001, 4):
            store.log_step(1, step, 0.0, {f"m{offset}": step})
            if step % 5 == 0:
                store.log_event(1, step, "note", {})

    def read():
        while not done.is_set():
            got = store.read_steps(1)
            assert np.nansum(got.values) == got.steps.sum()
            store.read_events(1)

    writers = [threading.Thread(target=guarded, args=(lambda i=i: write(i),)) for i in range(4)]
    readers = [threading.Thread(target=guarded, args=(read,)) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not errors
    got = store.read_steps(1)
    assert got.steps.tolist() == list(range(1, 1001))
    assert np.nansum(got.values) == got.steps.sum()
    assert len(store.read_events(1)) == 200


# ---- what is refused -------------------------------------------------------------------------------------


def tree(folder):
    """Every path under a folder with its content and time."""
    return {p: (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in folder.rglob("*")}


def newer(path):
    RunStore.create(path, {}).close()
    with contextlib.closing(sqlite3.connect(path / "run.sqlite")) as db:
        db.execute("PRAGMA user_version = 1000")


def foreign(path):
    path.mkdir()
    with contextlib.closing(sqlite3.connect(path / "run.sqlite")) as db:
        db.execute("PRAGMA user_version = 1")
        db.execute("CREATE TABLE steps(id INTEGER PRIMARY KEY)")


def holding(name, content):
    def make(path):
        path.mkdir()
        (path / name).write_bytes(content)
    return make


@pytest.mark.parametrize("make, action, words", [
    (lambda path: RunStore.create(path, {}).close(), "create", "exists already; open that run, or choose"),
    (lambda path: path.mkdir(), "create", "exists already; choose another directory"),
    (lambda path: path.write_text("x"), "create", "exists already; choose another directory"),
    (lambda path: path.symlink_to("nowhere"), "create", "exists already; choose another directory"),
    (lambda path: path.parent.rmdir() or path.parent.write_text("x"), "create", "is not a directory"),
    (lambda path: None, "create with a bad config", "the config is not JSON"),
    (lambda path: None, "open", "there is no such directory"),
    (lambda path: path.mkdir(), "open", "is not a run, there is no run.sqlite in it"),
    (lambda path: path.write_text("x"), "open", "is not a run, there is no run.sqlite in it"),
    (holding("run.sqlite", b""), "open", "is not a run, run.sqlite was written by something else"),
    (holding("run.sqlite", b"words " * 999), "open", "is not a run, run.sqlite: file is not a database"),
    (foreign, "open", "is not a run, run.sqlite was written by something else"),
    (newer, "open", r"was written by a newer version \(schema 1000, this one knows up to 1\)"),
])
@pytest.mark.parametrize("write", [False, True])
def test_a_wrong_directory_is_one_line_and_nothing_is_written(tmp_path, make, action, words, write):
    """Exists, is no run, is newer, cannot be made: a StoreError naming the path; the disk is as before."""
    path = tmp_path / "runs" / "a ?#% run"
    path.parent.mkdir()
    make(path)
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=words) as error:
        if action == "open":
            RunStore.open(path, write=write)
        else:
            RunStore.create(path, {"field": object() if "bad" in action else 1})
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_a_run_without_write_access_can_be_read_and_says_so_when_written():
    """A directory of another user's: reading works, writing and making a run in it are one line each; whether
    somebody writes it is told.
    """
    folder = Path(tempfile.mkdtemp())  # not tmp_path, whose parents another user may not enter
    try:
        with RunStore.create(folder / "run", {"seed": 3}) as store:
            store.log_step(1, 1, 0.0, {"a": 0.5})
        for path, mode in ((folder, 0o555), (folder / "run", 0o555), (folder / "run" / "run.sqlite", 0o444)):
            path.chmod(mode)
        before, (out, into), (asked, ready), (held, hold) = tree(folder), os.pipe(), os.pipe(), os.pipe()
        if (pid := os.fork()) == 0:
            said = []
            try:
                if os.getuid() == 0:  # root may write anywhere
                    os.setgid(65534)
                    os.setuid(65534)
                with RunStore.open(folder / "run") as reader:
                    said.append([reader.config["seed"], *reader.read_steps(1).values.tolist()])
                said.append(access.writer(folder / "run"))
                os.write(ready, b"?")
                os.read(held, 1)
                said.append(access.writer(folder / "run")["pid"])
                for action in (lambda: RunStore.open(folder / "run", write=True),
                               lambda: RunStore.create(folder / "new", {})):
                    try:
                        action()
                    except StoreError as error:
                        said.append(str(error))
            except BaseException as error:
                said.append(repr(error))
            finally:
                os.write(into, json.dumps(said).encode())
                os._exit(0)
        os.close(into)
        os.read(asked, 1)
        with open(folder / "run" / "writer.lock") as lock:  # as a writer does that was there before
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.write(hold, b"!")
            os.waitpid(pid, 0)
        with open(out) as pipe:
            said = json.load(pipe)
        assert said == [[3, [0.5]], None, os.getpid(),
                        f"{folder}/run: no write access to {folder}/run; open it for reading",
                        f"{folder}/new: cannot be created, no write access to {folder}"]
        assert tree(folder) == before
    finally:
        for path in (folder, folder / "run"):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_full_disk_refuses_the_step_and_keeps_the_rest(store):
    """Disk full: one line; every earlier row is there; with room again the same step is taken."""
    store._writer.execute("PRAGMA max_page_count = 40")
    step = 0
    with pytest.raises(StoreError, match=r"step \d+ is not written: database or disk is full") as error:
        while step < 10_000:
            store.log_step(1, step + 1, 0.0, {"a": step}, np.zeros((2, 10, 8), np.float32))
            step += 1
    assert "\n" not in str(error.value)
    assert store.read_steps(1).steps.tolist() == list(range(1, step + 1))
    store._writer.execute("PRAGMA max_page_count = 1000000")
    store.log_step(1, step + 1, 0.0, {"a": step}, np.zeros((2, 10, 8), np.float32))
    assert store.last_step() == step + 1


@pytest.mark.parametrize("use", [
    lambda store: store.log_step(1, 1, 0.0, {"a": 1.0}), lambda store: store.log_event(1, 1, "note", {}),
    lambda store: store.set_meta("key", 1), lambda store: store.add_branch("b", 1, 0),
])
def test_a_store_open_for_reading_or_closed_refuses_to_write(store, use):
    """Each way of writing says which it is."""
    with RunStore.open(store.path) as reader, pytest.raises(StoreError, match="open for reading only"):
        use(reader)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        use(store)
    with pytest.raises(StoreError, match="is closed"):
        store.read_steps(1)
