import pytest

from widgets.branches import BranchRow
from widgets.notes import Log


@pytest.fixture
def row(tiny_run):
    run = tiny_run()
    log = Log()
    return run, BranchRow(run, log), log


def test_undo_and_rewind_open_branches_and_the_picker_goes_back(row):
    """Each by its own widget, as a hand would: the run stands where the row says, and nothing is lost."""
    run, row, _ = row
    run.step(4)
    run.step(3)
    row.undo.click()
    run.session.wait()
    row.refresh()
    assert (run.branch, run.current_step, row.branch.value) == ("from-4", 4, "from-4")
    row.aim(2)
    row.rewind.click()
    run.session.wait()
    row.refresh()
    run.session.wait()
    assert (run.branch, run.current_step, row.branch.value) == ("from-2", 2, "from-2")
    assert row.branch.options == ("main", "from-4", "from-2")
    row.branch.value = "main"
    run.session.wait()
    assert (run.branch, run.current_step) == ("main", 7)


def test_a_row_that_is_made_or_refreshed_takes_the_run_nowhere(row):
    """A picker whose choices change chooses the first by itself; the run must not follow that."""
    run, _, log = row
    for _ in range(2):
        run.step(3)
        run.rewind(1)
        run.step(1)
        here, made = run.branch, BranchRow(run, log)
        run.session.wait()
        assert (run.branch, made.branch.value) == (here, here)
        run.rewind(0)
        here = run.branch
        made.refresh()
        run.session.wait()
        assert (run.branch, made.branch.value) == (here, here)


def test_saved_checkpoints_of_this_line_are_offered(row):
    run, row, _ = row
    run.step(5)
    row.save.click()
    run.step(2)
    row.refresh()
    run.checkpoint("sharp")
    row.refresh()
    assert {("step 5", 5), ("step 7 · sharp", 7)} <= set(row.saved.options)
    assert (row.saved.label, row.step.value) == ("checkpoints", 0)
    row.saved.value = 5
    assert row.step.value == 5
    assert "step 5" in {saved.name for saved in run.store.checkpoints()}
    run.rewind(6)  # from here "sharp" cannot be reached, and what is saved here cannot from main
    run.checkpoint("own")
    for branch, offered, other in (("from-6", "own", "sharp"), ("main", "sharp", "own")):
        run.switch(branch)
        row.refresh()
        assert offered in str(row.saved.options) and other not in str(row.saved.options)
        assert ("step 5", 5) in row.saved.options


def test_what_cannot_be_is_said_in_the_log_and_beside_the_button(row):
    run, row, log = row
    row.undo.click()
    row.aim(9)
    row.rewind.click()
    assert "refused: undo: no chunk was trained here" in log.widget.value
    assert "refused: step = 9: must be a step of this line, 0 to 0" in log.widget.value
    for typed in (9, -3, 1.5):  # said beside the button too, and nothing is rounded or moved into range
        row.step.value = typed
        row.rewind.click()
        assert f"step = {typed:g}: must be a step of this line" in row.refused.widget.value
    row.step.value = 0
    row.rewind.click()
    assert row.refused.widget.value == ""
    run.session.wait()
    assert run.branch == "from-0"
