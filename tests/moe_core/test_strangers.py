"""A run's directory that a stranger made: opening it and training it touches nothing outside of it."""

import contextlib
import json
import sqlite3

from moe_core import Run
from moe_core.data.cache import cache_root


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
