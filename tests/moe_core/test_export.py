import json
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest

import moe_core as mc
from moe_core.export import ExportError, export
from moe_core.store import RunStore

READ = {".csv": lambda file: pd.read_csv(file, index_col="step"), ".parquet": pd.read_parquet}


@pytest.mark.parametrize("suffix", READ)
def test_a_table_of_metrics_is_the_store_to_the_last_digit(tiny_run, tmp_path, suffix):
    """While another has the run open for writing: every value of metrics(), read back, and whose row each is."""
    run = tiny_run()
    run.step(11)
    run.rewind(8)
    run.step(2)
    for branch in (None, "main"):
        read = READ[suffix](export(run.path, tmp_path / "deep" / f"m{suffix}", branch))
        assert read.index.name == "step"
        expected = run.metrics(branch=branch)
        assert list(read) == ["branch", *expected]
        assert list(read["branch"]) == (["main"] * 11 if branch else ["main"] * 8 + ["from-8"] * 2)
        np.testing.assert_array_equal(read[list(expected)].to_numpy(np.float32), expected.to_numpy())
    layers = READ[suffix](export(run.path, tmp_path / f"l{suffix}", per_layer=True))
    assert list(layers)[1:] == list(run.metrics(per_layer=True))
    assert not [file for file in tmp_path.rglob(".*") if "run" not in file.parts]  # no draft is left


@pytest.mark.parametrize("suffix", READ)
def test_a_folder_holds_all_three_tables(tiny_run, tmp_path, suffix, monkeypatch):
    """Shares of every expert, two steps in memory at a time; events whose payload comes back, whatever a note says."""
    hostile = 'a,"b"\n<script>;\t✓ ' + "'"
    run = tiny_run()
    run.knobs["router_temp"].hold(1.25)
    run.note(hostile)
    run.step(3)
    monkeypatch.setattr("moe_core.store.PART", 2)
    rows, read_steps = [], RunStore.read_steps
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "read_steps", lambda *args, **how: (rows.append(read_steps(*args, **how)), rows[-1])[1])
        export(run.path, tmp_path / "all", suffix=suffix)
    assert max(len(part) for part in rows if part.shares.size) == 2
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == [
        f"{table}{suffix}" for table in ("events", "metrics", "shares")]
    read = pd.read_csv if suffix == ".csv" else pd.read_parquet
    shares, events = read(tmp_path / "all" / f"shares{suffix}"), read(tmp_path / "all" / f"events{suffix}")
    np.testing.assert_array_equal(shares.to_numpy(np.float32), run.experts().to_numpy(np.float32))
    knob = events[events["kind"] == "knob"].iloc[0]
    assert (knob["name"], knob["mode"], knob["value"], knob["step"]) == ("router_temp", "hold", 1.25, 1)
    note = events[events["kind"] == "note"].iloc[0]
    assert note["text"] == hostile and json.loads(note["payload"])["text"] == hostile
    assert pd.to_datetime(note["asked"]) <= pd.to_datetime(note["applied"])
    assert abs(pd.to_datetime(note["asked"]).timestamp() - time.time()) < 600


def test_what_cannot_be_exported_is_one_line_and_leaves_what_was_there(tiny_run, tmp_path):
    """Another suffix, an unknown branch or table, no run, a folder in the way; an older export stays as it was."""
    run = tiny_run()
    run.step(1)
    old = export(run.path, tmp_path / "old.csv").read_bytes()
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("x")
    for why, error, call in (
            ("xlsx", ExportError, lambda: export(run.path, tmp_path / "m.xlsx")),
            ("shares", ExportError, lambda: export(run.path, tmp_path / "m.csv", table="loss")),
            ("'main'", mc.StoreError, lambda: export(run.path, tmp_path / "old.csv", "mian")),
            ("is not a run", mc.StoreError, lambda: export(tmp_path, tmp_path / "old.csv")),
            ("folder.csv", ExportError, lambda: export(run.path, tmp_path / "folder.csv")),
            ("m.csv", ExportError, lambda: export(run.path, tmp_path / "file" / "m.csv"))):
        with pytest.raises(error, match=why) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert (tmp_path / "old.csv").read_bytes() == old
    assert not list(tmp_path.glob(".*"))


def test_without_pyarrow_csv_works_and_parquet_says_what_is_missing(tiny_run, tmp_path):
    """Where the package is out of reach."""
    run = tiny_run()
    run.step(1)
    script = f"""
        import sys
        sys.modules["pyarrow"] = None
        from moe_core.export import ExportError, export
        print(export({str(run.path)!r}, {str(tmp_path / "m.csv")!r}))
        try:
            export({str(run.path)!r}, {str(tmp_path / "m.parquet")!r})
        except ExportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == str(tmp_path / "m.csv") and (tmp_path / "m.csv").exists()
    assert "pip install pyarrow" in second and not (tmp_path / "m.parquet").exists()
