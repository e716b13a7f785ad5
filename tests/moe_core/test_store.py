import contextlib
import math
import re
import sqlite3
import time

import numpy as np
import pytest

from moe_core.storage import schema
from moe_core.store import RunStore, StoreError


@pytest.fixture
def rng():
    """Fresh random input; a failing test shows its seed."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def store(tmp_path):
    with RunStore.create(tmp_path / "run", {"seed": 1}) as made:
        yield made


def look(store):
    """A plain SQLite connection to the run's file."""
    return contextlib.closing(sqlite3.connect(f"file:{store.path}/run.sqlite?mode=ro", uri=True))


def any_floats(rng, n):
    """float32 of every kind: random bit patterns (subnormal, huge, infinite, NaN) and the edges."""
    edges = np.array([0, 1, -1, np.inf, -np.inf, np.nan, -0.0, 1e-45, -1e-45, 1.17549435e-38, 3.4028235e38,
                      -3.4028235e38, 16777215, 1 / 3], np.float32)
    tiny = rng.integers(0, 2**23, n // 4, np.uint32).view(np.float32)
    bits = rng.integers(0, 2**32, n - len(edges) - len(tiny), np.uint32).view(np.float32)
    return rng.permutation(np.concatenate([edges, tiny, bits]))


# ---- rows ------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_logged(store, rng):
    """Steps, times, float32 values and shares come back exactly, NaN where there is none, from any step."""
    names = [f"m{i}" for i in range(7)]
    logged, step = {}, 0
    for values in any_floats(rng, 7 * 60).reshape(60, 7):
        step += int(rng.integers(1, 4))
        has = [name for name in rng.permutation(names).tolist() if rng.random() < 0.8]
        shares = rng.random((2, 3, 4), np.float32) if rng.random() < 0.8 else None
        logged[step] = (rng.random(), dict(zip(has, values.tolist(), strict=False)), shares)
        store.log_step(1, step, *logged[step])
    store.close()
    with RunStore.open(store.path) as again:
        for since in (0, 17, step - 1, step):
            rows = {s: row for s, row in logged.items() if s > since}
            got = again.read_steps(1, since)
            assert got.steps.tolist() == list(rows)
            assert got.time.tolist() == [row[0] for row in rows.values()]
            assert set(got.names) == {name for row in rows.values() for name in row[1]}
            for name in got.names:
                expected = np.array([row[1].get(name, np.nan) for row in rows.values()], np.float32)
                np.testing.assert_array_equal(got.column(name), expected)
            nothing = np.full((2, 3, 4), np.nan, np.float32)
            load = [nothing if row[2] is None else row[2] for row in rows.values()]
            np.testing.assert_array_equal(got.shares, np.array(load).reshape(-1, 2, 3, 4))
        bare = again.read_steps(1, shares=False)
        np.testing.assert_array_equal(bare.values, again.read_steps(1).values)
        assert (bare.shares.shape, again.last_step()) == ((len(logged), 2, 0, 0), step)


def test_a_row_and_an_event_are_committed_when_the_call_returns(store):
    """Another connection sees each the moment that log_step or log_event returns."""
    with look(store) as db:
        for step in range(1, 30):
            store.log_step(1, step, 0.0, {"a": step})
            assert db.execute("SELECT max(step) FROM steps").fetchone() == (step,)
            event = store.log_event(1, step, "note", {"text": "x"})
            assert db.execute("SELECT max(id) FROM events").fetchone() == (event,)


def test_events_keep_what_was_asked_and_when_it_was_applied(store):
    """Payload, asked and applied come back; what JSON or UTF-8 lack comes as text; order is by step, then age."""
    before = time.time()
    ids = [store.log_event(1, step, kind, payload, asked) for step, kind, payload, asked in (
        (5, "knob", {"name": "router_temp", "value": 1.25, "nested": [None, {"ok": True}]}, 12.5),
        (2, "note", {"text": "an ünusual 'note'\n", "half": "\ud83d"}, None),
        (5, "nonfinite", {"loss": float("nan"), "all": (math.inf, 1.0)}, None))]
    events = store.read_events(1)
    assert [event["id"] for event in events] == [ids[1], ids[0], ids[2]]
    assert [event["kind"] for event in events] == ["note", "knob", "nonfinite"]
    assert [event["asked"] for event in events] == [None, 12.5, None]
    assert all(before <= event["applied"] <= time.time() and event["branch"] == "main" for event in events)
    assert events[0]["payload"] == {"text": "an ünusual 'note'\n", "half": "?"}
    assert events[1]["payload"] == {"name": "router_temp", "value": 1.25, "nested": [None, {"ok": True}]}
    assert events[2]["payload"] == {"loss": "nan", "all": ["inf", 1.0]}
    assert [event["id"] for event in store.read_events(1, after=ids[1])] == [ids[2]]


@pytest.mark.parametrize("row, words", [
    ((1, 5, 0.0, {"a": 1.0}), "step 5 is not written: it exists already"),
    ((2, 4, 0.0, {"a": 1.0}), "takes steps after 4"),
    ((1, 0, 0.0, {"a": 1.0}), "takes steps after 0"),
    ((1, 6.5, 0.0, {"a": 1.0}), "'float' object"),
    ((7, 6, 0.0, {"a": 1.0}), "branch_id = 7: there is no such branch"),
    ((1, 6, 0.0, {"a": 1.0, "b": None}), "b = None: must be a number"),
    ((1, 6, 0.0, {"a": 1.0}, np.zeros((2, 4, 3), np.float32)), r"\(2, 4, 3\): must be \(2, 3, 4\)"),
    ((1, 6, 0.0, {"new": 1.0}, np.zeros((3, 4), np.float32)), r"\(3, 4\): must be \(2, 3, 4\)"),
])
def test_a_row_that_cannot_be_is_refused_and_changes_nothing(store, row, words):
    """Each is one line that says why; every branch still shows what it did, and takes the next step."""
    for step in range(1, 6):
        store.log_step(1, step, 0.0, {"a": step}, np.zeros((2, 3, 4), np.float32))
    store.add_branch("other", 1, 4)
    with pytest.raises(StoreError, match=words) as error:
        store.log_step(*row)
    assert "\n" not in str(error.value)
    assert [store.read_steps(branch).steps.tolist() for branch in (1, 2)] == [[1, 2, 3, 4, 5], [1, 2, 3, 4]]
    store.log_step(2, 5, 0.0, {"a": 1e300})
    assert store.read_steps(2, since=4).values.tolist() == [[math.inf]]  # what float32 rounds it to
    store.close()
    with RunStore.open(store.path, write=True) as again, pytest.raises(StoreError, match="takes steps after 4"):
        again.log_step(2, 3, 0.0, {"a": 1.0})


def test_a_branch_shows_its_ancestors_up_to_each_fork(store, rng, monkeypatch):
    """In random trees, rows (also in parts), events, last_step and the lineage view follow the recursive definition."""
    monkeypatch.setattr("moe_core.store.PART", 3)
    fork, rows, notes = {1: (None, 0)}, {1: {}}, {1: []}

    def shown(branch, of, step):
        parent, at = fork[branch]
        inherited = [] if parent is None else [x for x in shown(parent, of, step) if step(x) <= at]
        return inherited + list(of[branch])

    for _ in range(12):
        for branch in fork:
            first = max(fork[branch][1], *rows[branch], 0) + 1
            for step in range(first, first + int(rng.integers(0, 5))):
                rows[branch][step] = float(rng.integers(0, 2**20))
                store.log_step(branch, step, 0.0, {f"m{branch % 3}": rows[branch][step], "branch": branch})
                if rng.random() < 0.3:
                    notes[branch].append((step, store.log_event(branch, step, "note", {})))
        parent = int(rng.integers(1, len(fork) + 1))
        at = int(rng.integers(0, store.last_step(parent) + 1))
        made = store.add_branch(f"b{len(fork) + 1}", parent, at)
        fork[made], rows[made], notes[made] = (parent, at), {}, []

    owned = {branch: [(step, value, branch) for step, value in own.items()] for branch, own in rows.items()}
    assert [(b.id, b.name, b.parent, b.fork_step) for b in store.branches()] == [
        (b, f"b{b}" if b > 1 else "main", parent, at if parent else None) for b, (parent, at) in fork.items()]
    with look(store) as db:
        for branch in fork:
            expected = shown(branch, owned, lambda row: row[0])
            got = store.read_steps(branch)
            owners = got.column("branch").astype(int)
            values = [got.column(f"m{owner % 3}")[row] for row, owner in enumerate(owners)]
            assert list(zip(got.steps, values, owners, strict=True)) == expected
            middle = expected[len(expected) // 2][0] if expected else 0
            assert store.read_steps(branch, middle).steps.tolist() == [s for s, *_ in expected if s > middle]
            parts = list(store.read_parts(branch, middle))
            assert all(len(part) <= 3 for part in parts)
            assert [(s, v) for part in parts for s, v in zip(part.steps, part.column("branch"), strict=True)] == [
                (s, owner) for s, _, owner in expected if s > middle]
            assert store.last_step(branch) == max((step for step, *_ in expected), default=0)
            assert [(e["step"], e["id"]) for e in store.read_events(branch)] == sorted(
                shown(branch, notes, lambda note: note[0]))
            assert db.execute(
                "SELECT s.step, s.branch FROM lineage l JOIN steps s ON s.branch = l.ancestor "
                "AND s.step <= l.upto WHERE l.branch = ? ORDER BY s.step", (branch,)).fetchall() == [
                    (step, owner) for step, _, owner in expected]


@pytest.mark.parametrize("wrong, words", [
    (("main", 1, 0), "there is a branch 'main' already"),
    (("b", 1, 4), "fork_step = 4: must be a step of 'main', 0 to 3"),
    (("b", 1, -1), "fork_step = -1: must be a step of 'main', 0 to 3"),
    (("b", 9, 0), "branch_id = 9: there is no such branch"),
])
def test_a_branch_that_cannot_be_is_refused(store, wrong, words):
    """A taken name, a step not reached, an unknown parent: one line, and no branch."""
    for step in (1, 2, 3):
        store.log_step(1, step, 0.0, {})
    with pytest.raises(StoreError, match=words):
        store.add_branch(*wrong)
    assert len(store.branches()) == 1


# ---- SQL -------------------------------------------------------------------------------------------------


def test_half_a_character_in_a_name_is_a_question_mark(store):
    """As in a note: no file of text can hold it, and no name keeps a run from being opened."""
    store.add_branch("half \ud83d", 1, 0)
    store.add_checkpoint(1, 0, "half \ud83d", "checkpoints/x")
    assert store.branches()[-1].name == store.checkpoints()[-1].name == "half ?"


def test_the_views_decode_as_numpy_does(store, rng):
    """points and experts give every float32 exactly: signs, subnormals, extremes, infinities; NaN is NULL."""
    values = any_floats(rng, 1200).reshape(30, 40)
    shares = any_floats(rng, 900).reshape(30, 2, 3, 5)
    names = [f"m'{i}/\"é" for i in range(40)]
    for step, (row, load) in enumerate(zip(values, shares, strict=True), 1):
        store.log_step(1, step, 0.0, dict(zip(names, row.tolist(), strict=True)), load)
    with look(store) as db:
        points = db.execute("SELECT branch, step, name, value FROM points").fetchall()
        experts = db.execute("SELECT step, layer, expert, demand, served FROM experts").fetchall()
    assert [row[:3] for row in points] == [(1, step, name) for step in range(1, 31) for name in names]
    decoded = np.array([row[3] for row in points], np.float64)  # None becomes NaN
    with np.errstate(invalid="ignore"):  # a signalling NaN among the random bits
        values, shares = values.astype(np.float64), shares.astype(np.float64)
    np.testing.assert_array_equal(decoded, values.ravel())
    cells = [(step, layer, expert) for step in range(1, 31) for layer in range(3) for expert in range(5)]
    assert [row[:3] for row in experts] == cells
    np.testing.assert_array_equal(np.array([row[3:] for row in experts], np.float64),
                                  shares.transpose(0, 2, 3, 1).reshape(-1, 2))


def test_the_documented_sql_runs_as_pasted(store, rng):
    """Every statement in the schema's docstring, verbatim, gives what RunStore gives."""
    for branch, steps in ((1, range(1, 9)), (2, range(6, 12))):
        if branch == 2:
            store.add_branch("second", 1, 5)
        for step in steps:
            metrics = {"lr": 0.1, "train/loss": rng.random()}
            store.log_step(branch, step, 0.0, metrics, rng.random((2, 2, 3), np.float32))
    store.log_event(1, 3, "knob", {"name": "lr_scale"}, asked=time.time() - 2)
    store.log_event(1, 8, "note", {"text": "x"})
    block = schema.__doc__.split("::\n")[1].split("\n``steps.id``")[0]
    statements = [s for s in re.split(r"(?<=;)\n", block) if s.strip()]
    assert len(statements) == 4
    with look(store) as db:
        own, inherited, load, events = (db.execute(statement).fetchall() for statement in statements)
    for rows, branch in ((own, 1), (inherited, 2)):
        got = store.read_steps(branch)
        assert rows == list(zip(got.steps.tolist(), got.column("train/loss").tolist(), strict=True))
    last = store.read_steps(1).shares[-1]
    assert load == [(x, e, last[0, x, e], last[1, x, e]) for x in range(2) for e in range(3)]
    assert [row[:3] for row in events] == [(3, "knob", "lr_scale"), (8, "note", None)]
    assert (events[0][3], events[1][3]) == (pytest.approx(2, abs=0.5), None)


def test_a_log_call_is_one_insert_and_stored_as_small_as_a_blob(store, tmp_path):
    """40 scalars: one statement a row, and within 5 bytes a point of an INSERT of a blob. Its time: tests/bench."""
    metrics, rows, said = {f"m{i}": i / 7 for i in range(40)}, 2000, []
    with contextlib.closing(sqlite3.connect(tmp_path / "floor", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("CREATE TABLE rows(id INTEGER PRIMARY KEY, value BLOB)")
        for step in range(1, rows + 1):
            db.execute("INSERT INTO rows VALUES (?, ?)", (step, bytes(160)))
            store.log_step(1, step, 0.0, metrics)
            if step == 1:  # the first writes the names down too
                store._writer.set_trace_callback(said.append)
    assert len(said) == rows - 1 and all(statement.startswith("INSERT INTO steps") for statement in said)
    store.close()
    size = [path.stat().st_size for path in (tmp_path / "floor", store.path / "run.sqlite")]
    assert (size[1] - size[0]) / (rows * 40) < 5
