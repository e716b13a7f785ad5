"""Every notebook runs from top to bottom without a person, in a real kernel, and says what its text says."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from moe_core.store import RunStore

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def executed(name, folder):
    """The notebook after all its cells ran in ``folder``; an error in any cell is raised."""
    shutil.copy(NOTEBOOKS / name, folder)
    notebook = nbformat.read(folder / name, as_version=4)
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
    assert float(said[1]) < 4.6
    assert rows.column("router/collapsed").max() == 0
