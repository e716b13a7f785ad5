"""Every notebook runs from top to bottom without a person, in a real kernel, and says what its text says."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from moe_core.effects import effects
from moe_core.shootout import Shootout
from moe_core.store import MAIN, RunStore

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def executed(name, folder, **instead):
    """The notebook after all its cells ran in ``folder``; an error in any cell is raised.

    ``instead``: other values for what a line of its code ``NAME, NAME, ... = value, value, ...`` sets.
    """
    shutil.copy(NOTEBOOKS / name, folder)
    notebook = nbformat.read(folder / name, as_version=4)
    if instead:
        names = ", ".join(instead)
        (cell,) = [c for c in notebook.cells if c.cell_type == "code" and f"{names} = " in c.source]
        cell.source = re.sub(rf"^{names} = .*$", f"{names} = {tuple(instead.values())}", cell.source, flags=re.M)
    client = NotebookClient(notebook, timeout=600, store_widget_state=False,
                            resources={"metadata": {"path": str(folder)}})
    return client.execute()


def test_the_workbench_notebook_trains_through_its_panel_unattended(tmp_path):
    """360 steps, 320 of them by the panel's chunk, the turn by code applied at its step, the loss well down."""
    notebook = executed("01_workbench.ipynb", tmp_path)
    with RunStore.open(tmp_path / "runs" / "first") as store:
        rows, events = store.read_steps(), store.read_events()
    assert rows.steps.tolist() == list(range(1, 361))
    note, turn = [event for event in events if event["kind"] in ("knob", "note")]
    assert (turn["payload"]["name"], turn["step"], note["step"]) == ("load_balance_alpha", 41, 40)
    alpha = rows.column("router/load_balance_alpha")
    assert alpha[39] == pytest.approx(0.02) and alpha[89] == pytest.approx(0.05) == alpha[200]
    last = notebook.cells[-2].outputs[0]["data"]["text/plain"]
    said = re.search(r"validation cross-entropy ([\d.]+) nats at step 360", last)
    assert float(said[1]) < 5.0  # the library of each Python is another corpus: 4.2 with 3.11, 4.7 with 3.14
    assert rows.column("router/collapsed").max() == 0


def test_the_shootout_notebook_trains_tables_and_draws(tmp_path):
    """With short runs: all eight entries done, its table that of the runs on disk, every entry in a figure."""
    notebook = executed("02_optimizer_shootout.ipynb", tmp_path, STEPS=12, SEEDS=2, SEARCH=(3,), SEARCH_STEPS=2)
    made = Shootout.open(tmp_path / "runs" / "shootout")
    assert len(made.jobs()) == 8 + 16 and all(map(made.finished, made.jobs()))
    data = [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", [])]
    figures = [d["application/vnd.plotly.v1+json"] for d in data if "application/vnd.plotly.v1+json" in d]
    drawn = {trace["name"] for figure in figures for trace in figure["data"] if trace.get("name")}
    assert drawn == set(made.entries)
    pages = " ".join(d.get("text/html", "") for d in data)
    for row in made.summary().to_dict("records"):
        assert f"{row['val/loss']:.3f}" in pages and row["peaks"] in pages


def test_the_experiment_notebook_ends_in_a_report(tmp_path):
    """One turn, whose effect on the entropy is found; three branches, 300 steps, and a report that says all of it."""
    notebook = executed("04_experiment_report.ipynb", tmp_path)
    folder = tmp_path / "runs" / "experiment-1"
    with RunStore.open(folder) as store:
        assert [branch.name for branch in store.branches()] == ["main", "A-210", "B-210"]
        assert store.last_step(2) == 300
        found = effects(store, MAIN, window=80).set_index("metric")
        reached = (store.read_steps(2).column("val/loss") < 5.0).any()  # 4.4 with 3.11, 4.97 with 3.14
    assert set(found["step"]) == {121} and found.loc["router/entropy_mean", "stands_out"]
    assert found.loc["router/entropy_mean", "high"] < 0 < found.loc["router/top1_p_mean", "low"]
    report = (folder / "report.html").read_text()
    for words in ("Experiment 1 in small", "Router temperature: ramps to 0.7 over 20 steps", "before sharpening",
                  "val/loss &lt; 5.0 by 300", "Snapshot at 120."):
        assert words in report, words
    checklist = next(cell for cell in notebook.cells if "gates.check" in cell.source).outputs[0].text
    assert checklist.splitlines()[0].startswith(f"{'passed' if reached else 'failed':12} val/loss < 5.0 by 300")
    assert "not reached  val/loss < 3.0 by 2000" in checklist


def test_the_balancing_notebook_evens_the_load_without_a_loss(tmp_path):
    """With short runs: a bias ends more even than nothing does, and no loss is in its sum; tables are of the runs."""
    notebook = executed("05_balancing_without_a_loss.ipynb", tmp_path, STEPS=80, SEEDS=1)
    made = Shootout.open(tmp_path / "runs" / "balancing")
    assert list(made.entries) == ["aux", "bias", "both", "none", "bias-slow"] and all(map(made.finished, made.jobs()))
    apart = {}
    for label, (line,) in ((label, runs.values()) for label, runs in made.lines().items()):
        rows = line.rows
        apart[label] = rows["router/balance_mean"].iloc[-20:].mean()
        assert (rows["router/aux_mean"] > 0).all() == (label in ("aux", "both")), label
    assert max(apart["bias"], apart["both"]) < min(apart["bias-slow"], apart["none"])
    pages = " ".join(str(out.get("data", {}).get("text/html", "")) for cell in notebook.cells
                     for out in cell.get("outputs", []))
    assert all(f"{next(iter(runs.values())).val_loss:.4f}" in pages for runs in made.lines().values())


def test_what_the_balancing_notebook_found_shows_without_a_kernel():
    """Its stored outputs have its pictures, tables and findings, and no state of widgets."""
    path = NOTEBOOKS / "05_balancing_without_a_loss.ipynb"
    notebook = nbformat.read(path, as_version=4)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 2
    assert sum("text/html" in out.get("data", {}) for out in outputs) >= 3
    assert any("too slowly" in out.get("text", "") for out in outputs)
    assert "widgets" not in notebook.metadata and path.stat().st_size < 1.2e6
