"""The third notebook: what it does when it is run, and what it shows where it cannot be."""

import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from moe_core.store import RunStore

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "03_reading_the_router.ipynb"


def test_it_catches_a_collapse_and_brings_it_back(tmp_path):
    """Caught before 20 collapsed steps; the line that was answered has no more, the other's experts stay uneven."""
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    NotebookClient(notebook, timeout=600, store_widget_state=False,
                   resources={"metadata": {"path": str(tmp_path)}}).execute()
    with RunStore.open(tmp_path / "runs" / "peaked") as store:
        events, branches = store.read_events(), {branch.name: branch for branch in store.branches()}
        caught, left = branches["left alone"].fork_step, branches["left alone"].id
        answered, alone = store.read_steps(1), store.read_steps(left)
    assert answered.column("router/collapsed")[:caught].sum() < 20
    assert len(answered) == len(alone) == caught + 100
    turns = [event for event in events if event["kind"] == "knob"]
    assert turns and all(turn["step"] == caught + 1 and turn["payload"]["finding"] for turn in turns)
    assert answered.column("router/collapsed")[caught + 10 :].sum() == 0
    tops = [rows.column("router/max_frac_max")[-50:].mean() for rows in (answered, alone)]
    assert tops[0] < 0.3 < tops[1]


def test_what_it_found_shows_without_a_kernel():
    """Its stored outputs have its pictures and its findings, and no state of widgets."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert any("alarm: " in output.get("text", "") for output in outputs)
    assert "widgets" not in notebook.metadata and NOTEBOOK.stat().st_size < 1.5e6
