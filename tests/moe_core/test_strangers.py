"""A run's directory that a stranger made: what is done with it touches nothing outside of it, and steers nothing."""

import contextlib
import json
import sqlite3

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moe_core import ConfigError, Run
from moe_core.checkpoint import CheckpointError
from moe_core.cli import main
from moe_core.data.cache import cache_root
from moe_core.store import RunStore, StoreError


def edited(run, *sql):
    """The directory of a run that is closed, with statements carried out in its store."""
    run.close()
    with contextlib.closing(sqlite3.connect(run.path / "run.sqlite")) as db, db:
        for statement in sql:
            db.execute(*statement)
    return run.path


def test_no_file_that_a_store_names_as_a_checkpoint_is_dropped_but_checkpoints(tiny_run, tmp_path):
    """Neither by its path nor through a link in place of the folder."""
    run = tiny_run()
    run.step(1)
    run.close()
    mine = tmp_path / "mine"
    mine.mkdir()
    (run.path / "checkpoints").rename(mine / "checkpoints")
    (run.path / "checkpoints").symlink_to(mine / "checkpoints")
    named = [mine / "diary.txt", mine / "checkpoints" / "model.safetensors", run.path / "run.sqlite"]
    for file in named[:2]:
        file.write_text("mine")
    enter = "INSERT INTO checkpoints(branch, step, path, created) VALUES (1, 0, ?, 0)"
    stranger = edited(run, *((enter, (path,)) for path in (
        str(named[0]), "../mine/diary.txt", "checkpoints/model.safetensors", "run.sqlite")))
    with contextlib.closing(Run.open(stranger)) as run:
        run.step(1)
        run._save()
        assert all(c.step for c in run.store.checkpoints())  # those were dropped from the list
    assert all(file.exists() for file in named)


def test_a_tokenizer_is_put_back_into_the_cache_alone(tiny_run, tmp_path):
    """A run's own copy goes to where this machine keeps them, by its name; any other place is left alone."""
    for name, kept in ((str(tmp_path / "startup"), None),
                       ("/home/other/.cache/moe-workbench/tokenizers/0123456789", "0123456789")):
        run = tiny_run(kept or "run")
        config = run.config.to_dict()
        config["data"]["tokenizer"] = name
        (run.path / "tokenizer").mkdir()
        (run.path / "tokenizer" / "50-start.py").write_text("raise SystemExit")
        path = edited(run, ("UPDATE meta SET value = ? WHERE key = 'config'", (json.dumps(config),)))
        Run.open(path).close()
        assert not (tmp_path / "startup").exists()
        assert kept is None or (cache_root() / "tokenizers" / kept / "50-start.py").exists()


@pytest.mark.parametrize("sql", [
    "UPDATE meta SET value = '[' WHERE key = 'config'", "UPDATE meta SET value = '[1]' WHERE key = 'config'",
    f"UPDATE meta SET value = '{'[' * 100_000}' WHERE key = 'config'", "UPDATE branches SET id = 1 << 62",
    "UPDATE meta SET value = '{}' WHERE key = 'branch'", "DELETE FROM branches",
    "UPDATE branches SET name = x'00'", "UPDATE layouts SET names = '[1]'", "UPDATE layouts SET id = 7",
    "UPDATE steps SET metrics = x'00'", "UPDATE steps SET time = 'noon'", "UPDATE steps SET shares = NULL",
    "UPDATE events SET payload = '[1]'",
])
def test_a_store_that_holds_other_than_it_should_is_one_line(tiny_run, capsys, sql):
    """Whoever reads it; and the runs beside it are listed all the same."""
    run = tiny_run()
    run.step(1)
    run.note("a note")
    path = edited(run, (sql,))
    with pytest.raises(StoreError, match=r"^\S+: is damaged: [^\n]+$"), RunStore.open(path) as store:
        store.read_steps()
        store.read_events()
    assert main(["ls", str(path.parent)]) == 0 and "run" in capsys.readouterr().out


def test_a_circle_of_branches_has_an_end(tiny_run):
    run = tiny_run()
    run.step(2)
    run.rewind(1)
    path = edited(run, ("UPDATE branches SET parent = 3 - id, fork_step = 1",))
    with RunStore.open(path) as store:
        assert {branch for branch, _ in store.lineage(1)} == {1, 2} and store.last_step(1) == 2


def test_a_store_that_is_a_link_has_its_writer_where_it_leads(tiny_run, tmp_path):
    """A lock beside the link would let two processes write it."""
    run = tiny_run()
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.sqlite").symlink_to(run.path / "run.sqlite")
    RunStore.open(other).close()
    with pytest.raises(StoreError, match=r"run\.sqlite is a link; open the run that it leads to"):
        Run.open(other)


def test_what_a_shell_shows_of_a_run_steers_no_terminal(tiny_run, capsys):
    run = tiny_run("run\x1b[2J")
    run.rewind(0, name="\x1b]0;title\x07\u202egnp.exe\nlast")
    run.note("\x1b[31mred\r")
    path = edited(run, ("UPDATE events SET kind = 'note' || char(27)",), (
        "INSERT INTO meta VALUES ('parent', ?)", (json.dumps({"path": "\x1b[1m"}),)))
    for words in (["ls", str(path.parent)], ["show", str(path)], ["show", f"{path}\x1b"]):
        main(words)
        said = "".join(capsys.readouterr()).replace("\n", "")
        assert said.isprintable() and "run" in said


@pytest.mark.parametrize("part, value", [
    ("state", "[" * 100_000), ("state", "[1]"), ("state", '{"items": []}'), ("state", '{"items": [["model", 1]]}'),
    ("about", "[" * 100_000), ("about", "5"), ("about", '{"config": 5}'), ("about", '{"config": {}}'),
    ("format", "²"), ("format", "9" * 5000), ("0", None),
])
def test_a_checkpoint_of_another_content_is_one_line_and_passed_over(tiny_run, tiny, tmp_path, part, value):
    """Whoever begins with it, and the run in whose directory it lies; ``0`` is a tensor of another shape."""
    run = tiny_run()
    run.step(1)
    run.close()
    [path] = (run.path / "checkpoints").iterdir()
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["crc32"]
    if value is None:
        tensors[part] = torch.zeros(3)
    else:
        header[part] = value
    save_file(tensors, path, metadata=header)
    with pytest.raises((CheckpointError, ConfigError)) as refused:
        Run.create(tmp_path / "child", tiny(), say=lambda line: None, init_from=path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    if value is not None and part == "about":
        with contextlib.closing(Run.open(run.path)) as run:
            run.step(1)
            assert run.current_step == 2
