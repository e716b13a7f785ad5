"""What the file of a run holds: the tables and views of ``<run>/run.sqlite``, for any SQLite tool.

Tables
    meta         key, value            value is JSON; keys: config, created, writer (the last to open it)
    branches     id, name, parent, fork_step, created
                                       1 is main; a branch shows its parent's rows up to fork_step
    steps        id, branch, step, layout, time, metrics, shares
                                       a row for each optimizer step, the first is step 1; metrics and shares
                                       are little-endian float32, to be read through the views
    layouts      id, names, layers, experts
                                       how: names is a JSON array, one name a number of metrics; shares is
                                       [2, layers, experts], demand then served (0, 0 where there is none)
    events       id, branch, step, kind, asked, applied, payload
                                       payload is JSON; a knob's step is the first row that used its new value
    checkpoints  id, branch, step, name, path, created
                                       saved states, path relative to the run; name NULL: saved by rule
Views
    points       branch, step, name, value                     the metrics, a row for each number
    experts      branch, step, layer, expert, demand, served   the shares, a row for each expert
    lineage      branch, ancestor, upto                        whose rows a branch shows: all of its own
                                                               (ancestor = branch), then up to step upto its
                                                               parent's, the parent's parent's and so on

Times are seconds since 1970. A float32 NaN reads as NULL, an infinity as SQLite's Inf. To paste, also while
the run is training (``sqlite3 -readonly -box runs/first/run.sqlite``, SQLite 3.38 or later)::

    -- a metric on a branch
    SELECT step, value FROM points WHERE branch = 1 AND name = 'train/loss';

    -- the same with what the branch inherited
    SELECT p.step, p.value FROM lineage l JOIN points p ON p.branch = l.ancestor AND p.step <= l.upto
    WHERE l.branch = 2 AND p.name = 'train/loss' ORDER BY p.step;

    -- the load of every expert at the newest step
    SELECT layer, expert, demand, served FROM experts
    WHERE branch = 1 AND step = (SELECT max(step) FROM steps WHERE branch = 1);

    -- what was done to the run, and how many seconds each took to take hold
    SELECT step, kind, payload ->> '$.name', applied - asked FROM events ORDER BY id;

``steps.id`` is ``branch << 40 | step``, and the columns branch and step are read from it. So rows are
appended in the order of their key, a commit writes one page, and no second index follows along. Against a
primary key of (branch, step) that saved 6 us and 13 bytes a row; WITHOUT ROWID wasted up to 3 kB on a row of
1.5 to 4 kB.
"""

import sqlite3

SCHEMA_VERSION = 1  # PRAGMA user_version
APPLICATION_ID = 0x4D6F4552  # PRAGMA application_id: "MoER"
STEP_BITS = 40
STEP_MAX = (1 << STEP_BITS) - 1
MAIN = 1  # the id of the first branch


def _bits(blob: str, index: str) -> str:
    """SQL for the 32 bits of float32 number ``index`` in ``blob``: the last of its four bytes weighs most."""
    digits = f"hex(substr({blob}, 4 * ({index}) + 1, 4))"
    nibbles = (f"(instr('123456789ABCDEF', substr({digits}, {at}, 1)) << {shift})"  # instr gives 0 for '0'
               for at, shift in zip((7, 8, 5, 6, 3, 4, 1, 2), range(28, -1, -4), strict=True))
    return "(" + " | ".join(nibbles) + ")"


def _float32(bits: str) -> str:
    """SQL for the number that ``bits`` mean, exact: SQLite may lack pow(), so 2^n is a product of shifts.

    A finite float32 is m 2^n with an integer |m| < 2^24 and n = e - 150 in -149..104: two shifts upwards and
    three downwards keep each factor below 2^53, which float64 holds exactly.
    """
    e, m = f"({bits} >> 23 & 255)", f"({bits} & 8388607)"
    sign = f"(1.0 - 2 * ({bits} >> 31))"
    up, down = f"max({e} - 150, 0)", f"max(150 - max({e}, 1), 0)"
    return (f"CASE {e} WHEN 255 THEN CASE {m} WHEN 0 THEN {sign} * 9e999 END "
            f"ELSE {sign} * ({m} + 8388608 * ({e} > 0)) * (1 << {up} / 2) * (1 << ({up} + 1) / 2) "
            f"/ (1 << {down} / 3) / (1 << ({down} + 1) / 3) / (1 << ({down} + 2) / 3) END")


def lineage_sql(where: str = "") -> str:
    """SELECT branch, ancestor, upto of every branch, or of those that ``where`` (on ``branches``) leaves.

    By UNION, which drops what it has already: by UNION ALL a circle of parents, in a damaged file, would never end.
    """
    return f"""
    WITH RECURSIVE up(branch, ancestor, upto) AS (
        SELECT id, id, {STEP_MAX} FROM branches {where}
        UNION
        SELECT up.branch, b.parent, min(up.upto, b.fork_step)
        FROM up JOIN branches b ON b.id = up.ancestor WHERE b.parent IS NOT NULL
    ) SELECT branch, ancestor, upto FROM up"""


# To join json_each(json_array(x)) is SQLite's way to compute x once and use it many times; written out, a
# value costs six times as much. CROSS JOIN keeps the loops in the order written.
_TABLES = f"""
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE branches(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, parent INTEGER REFERENCES branches, fork_step INTEGER,
    created REAL NOT NULL, CHECK ((parent IS NULL) = (fork_step IS NULL)));
CREATE TABLE layouts(
    id INTEGER PRIMARY KEY, names TEXT NOT NULL, layers INTEGER NOT NULL, experts INTEGER NOT NULL,
    UNIQUE (names, layers, experts));
CREATE TABLE steps(
    id INTEGER PRIMARY KEY, layout INTEGER NOT NULL REFERENCES layouts, time REAL NOT NULL,
    metrics BLOB NOT NULL, shares BLOB,
    branch INTEGER GENERATED ALWAYS AS (id >> {STEP_BITS}) VIRTUAL,
    step INTEGER GENERATED ALWAYS AS (id & {STEP_MAX}) VIRTUAL);
CREATE TABLE events(
    id INTEGER PRIMARY KEY, branch INTEGER NOT NULL REFERENCES branches, step INTEGER NOT NULL,
    kind TEXT NOT NULL, asked REAL, applied REAL NOT NULL, payload TEXT NOT NULL);
CREATE TABLE checkpoints(
    id INTEGER PRIMARY KEY, branch INTEGER NOT NULL REFERENCES branches, step INTEGER NOT NULL, name TEXT,
    path TEXT NOT NULL UNIQUE, created REAL NOT NULL);

CREATE VIEW lineage(branch, ancestor, upto) AS {lineage_sql()};
CREATE VIEW points(branch, step, name, value) AS
    SELECT s.branch, s.step, n.value, {_float32("b.value")}
    FROM steps s CROSS JOIN layouts l ON l.id = s.layout
    CROSS JOIN json_each(l.names) n
    CROSS JOIN json_each(json_array({_bits("s.metrics", "n.key")})) b;
CREATE VIEW experts(branch, step, layer, expert, demand, served) AS
    WITH RECURSIVE cell(i) AS (
        SELECT 0 UNION ALL SELECT i + 1 FROM cell WHERE i + 1 < (SELECT max(layers * experts) FROM layouts))
    SELECT s.branch, s.step, cell.i / l.experts, cell.i % l.experts,
        {_float32("d.value")}, {_float32("v.value")}
    FROM steps s CROSS JOIN layouts l ON l.id = s.layout
    CROSS JOIN cell ON cell.i < l.layers * l.experts
    CROSS JOIN json_each(json_array({_bits("s.shares", "cell.i")})) d
    CROSS JOIN json_each(json_array({_bits("s.shares", "l.layers * l.experts + cell.i")})) v;

PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""


def create_schema(db: sqlite3.Connection, created: float) -> None:
    """Makes the tables, the views and the branch ``main`` in an empty database, in one transaction."""
    db.executescript(f"BEGIN; {_TABLES} COMMIT;")
    db.execute("INSERT INTO branches(id, name, created) VALUES (?, 'main', ?)", (MAIN, created))
