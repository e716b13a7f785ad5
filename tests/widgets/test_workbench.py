import threading
import time
from pathlib import Path

import numpy as np
import plotly
import pytest
from ipywidgets.widgets.widget import _instances

import moe_core as mc
from widgets import Workbench, panel_figure
from widgets.live import DRAWING_SHARE, LIVE_POINTS, OWN_SHARE, TRIES, Live
from widgets.panel_widget import PanelFigure


@pytest.fixture
def bench():
    """Makes panels and closes them."""
    made = []

    def make(run, **how):
        made.append(Workbench(run, **how))
        return made[-1]
    yield make
    for panel in made:
        panel.close()


def soon(holds, seconds=20):
    """Wait until ``holds()``; whether it came to hold."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def line(panel, uid):
    return next(trace for trace in panel.live.figure.data if trace.uid == uid)


def same_figure(shown, expected):
    assert [trace.uid for trace in shown.data] == [trace.uid for trace in expected.data]
    for a, b in zip(shown.data, expected.data, strict=True):
        for name in ("x", "y", "text", "xaxis", "yaxis"):
            np.testing.assert_array_equal(a[name], b[name])
    assert [a.text for a in shown.layout.annotations] == [b.text for b in expected.layout.annotations]


def answer(live):
    """What a browser sends when it has drawn the newest update."""
    live.figure.set_state({"_js2py_traceDeltas": {
        "trace_deltas": [], "trace_edit_id": live.figure._last_trace_edit_id}})


def test_the_live_figure_is_the_one_that_a_report_draws(tiny_run, bench):
    """Followed step by step, by layer and by width, the panel shows what the frames give when drawn at once."""
    run = tiny_run(dropless=False, capacity_factor=1.0)
    panel = bench(run)
    run.knobs["router_temp"].hold(2.0)
    panel.start(25)
    assert panel.session.wait(30)
    run.note("that is <all>")
    for layer, width in ((None, 1100), (1, 1100), (1, 600)):
        panel.layer.index = 0 if layer is None else layer + 1
        panel.page.width = width
        expected = panel_figure(run.metrics(per_layer=True), run.experts(), run.events(), layer, width, LIVE_POINTS,
                                others={}, top_k=1)
        live = panel.live.figure
        assert soon(lambda expected=expected, live=live, width=width: (
            live.layout.width == width and "&lt;all&gt;" in str(live.data[0].text)
            and live.layout.annotations[1].text == expected.layout.annotations[1].text))
        with live.guard:  # while none of an update is on its way
            same_figure(live, expected)
            assert live.layout.height == expected.layout.height


def test_the_buttons_drive_the_run(tiny_run, bench):
    run = tiny_run()
    panel = bench(run, chunk=7)
    panel.run_button.click()
    assert panel.session.wait(30)
    panel.step_button.click()
    assert panel.session.wait(30)
    assert run.current_step == 8
    assert soon(lambda: "idle" in panel.status.value and "<b>8</b>" in panel.status.value)
    assert 'max="1" value="1"' in panel.status.value
    panel.start(10**6)
    assert soon(lambda: not panel.pause_button.disabled and "tokens/s" in panel.status.value)
    panel.pause_button.click()
    assert panel.session.wait(30)
    assert soon(lambda: "paused" in panel.status.value and panel.pause_button.disabled)


def test_a_second_panel_takes_the_place_of_the_first(tiny_run, bench):
    """Made again while it trains: one session and one writer of figures are left, and training has stopped."""
    run = tiny_run()
    first = bench(run)
    first.start(10**6)
    second = bench(run)
    assert run.session is second.session is not first.session
    assert [child.value for child in first.children] == ["A newer panel of this run took the place of this one."]
    assert first.live.figure.comm is None
    assert not first.live._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        first.start(1)
    at = run.current_step
    second.start(2)
    assert second.session.wait(30)
    assert run.current_step == at + 2
    assert [t.name for t in threading.enumerate()].count("moe-panel") == 1


def test_a_panel_that_is_closed_leaves_nothing_behind(tiny_run, bench):
    """Made again and again, as by a cell that is run again: no more widgets, threads or sessions than before."""
    run = tiny_run()
    counts = []
    for _ in range(4):
        panel = bench(run)
        panel.start(2)
        assert panel.session.wait(30)
        counts.append((len(_instances), threading.active_count()))
    assert counts[1] == counts[2] == counts[3]  # one sentence stands in the place of the panel before
    assert counts[1][0] <= counts[0][0] + 6


def test_a_panel_of_a_closed_run_says_so_and_offers_nothing(tiny_run, bench):
    run = tiny_run()
    panel = bench(run)
    panel.start(2)
    assert panel.session.wait(30)
    run.close()
    assert soon(lambda: "this run is closed" in panel.status.value and panel.run_button.disabled)
    assert panel.branches.rewind.disabled and panel.notes.button.disabled and panel.controls[0].slider.disabled
    assert soon(lambda: not panel.live._thread.is_alive())
    assert "StoreError" not in panel.journal.widget.value


def test_a_chunk_that_is_no_whole_number_is_refused_beside_the_button(tiny_run, bench):
    run = tiny_run()
    panel = bench(run)
    for typed in (1.5, 0, -5):
        panel.chunk.value = typed
        panel.run_button.click()
        assert f"n = {typed:g}: must be" in panel.refused.widget.value
    panel.chunk.value = 2.0
    panel.run_button.click()
    assert panel.refused.widget.value == "" and panel.session.wait(30) and run.current_step == 2


def test_a_run_that_is_opened_again_shows_its_whole_history(tiny_run, bench):
    run = tiny_run()
    run.knobs["grad_clip"].hold(0.5)
    run.step(12)
    run.note("before the restart")
    run.close()
    again = mc.Run.open(run.path)
    try:
        panel = bench(again)
        assert panel._repr_mimebundle_()["text/plain"] == f"Workbench({run.path.name!r}, step 12, idle)"
        same_figure(panel.live.figure, panel_figure(again.metrics(per_layer=True), again.experts(), again.events(),
                                                     others={}, top_k=1))
        assert "before the restart" in panel.journal.widget.value
        assert "Gradient clip: held at 0.5 · applied at step 1" in panel.journal.widget.value
        assert "applied at step 1" in panel.controls[-1].says.value
        panel.close()
    finally:
        again.close()


def test_a_run_goes_on_from_a_cell_where_its_panel_was_closed(tiny_run, bench):
    """What the panel trained has stopped at a step boundary."""
    run = tiny_run()
    panel = bench(run)
    panel.start(100_000)
    panel.close()
    stopped = run.current_step
    run.step(2)
    assert run.current_step == stopped + 2 and panel.session.state == "paused"


def test_the_panel_follows_a_run_that_goes_back(tiny_run, bench):
    """After a rewind it shows the new line alone: what it inherited, then what was trained on it."""
    run = tiny_run()
    panel = bench(run)
    line = next(trace for trace in panel.live.figure.data if trace.uid == "train-loss")
    panel.start(9)
    assert panel.session.wait(30)
    assert soon(lambda: len(line.x) == 9)
    answer(panel.live)
    run.rewind(4)
    assert soon(lambda: len(line.x) == 4 and "from step 4" in panel.journal.widget.value)
    answer(panel.live)
    run.knobs["lr_scale"].hold(0.0)
    run.step(2)
    answer(panel.live)
    assert soon(lambda: line.x.tolist() == [1, 2, 3, 4, 5, 6] and len(line.y) == 6)  # one is set after the other
    np.testing.assert_allclose(line.y, run.metrics()["train/loss"], rtol=1e-6)


def test_a_dense_run_has_a_panel_without_experts(tiny_run, bench):
    run = tiny_run(n_experts=0)
    panel = bench(run)
    assert [control.knob.name for control in panel.controls] == ["lr_scale", "grad_clip"]
    assert panel.layer is None
    panel.start(3)
    assert panel.session.wait(30)
    assert soon(lambda: len(line(panel, "train-loss").x) == 3)
    assert {trace.uid for trace in panel.live.figure.data if trace.uid.startswith(("expert", "heat"))} == set()


def test_what_stops_training_is_shown(tiny_run, bench, monkeypatch):
    run = tiny_run()
    panel = bench(run)

    def fail(more):
        raise RuntimeError("out of <memory>")
    monkeypatch.setattr(run, "advance", fail)
    panel.start(5)
    with pytest.raises(RuntimeError, match="out of"):
        panel.session.wait(30)
    assert soon(lambda: "failed" in panel.status.value and "out of &lt;memory&gt;" in panel.status.value)
    assert soon(lambda: "out of &lt;memory&gt;" in panel.journal.widget.value)


def test_an_error_of_the_panels_own_thread_is_shown_and_survived(tiny_run, bench, monkeypatch):
    run = tiny_run()
    panel = bench(run)
    monkeypatch.setattr(panel.live._feed, "refresh", lambda: 1 / 0)
    assert soon(lambda: "the panel: ZeroDivisionError" in panel.journal.widget.value)
    monkeypatch.undo()
    run.step(2)
    assert soon(lambda: len(panel.live.figure.data[1].x) == 2)


def test_the_interval_follows_what_drawing_costs(tiny_run):
    """Long enough between updates for what the browser, and this process, need for one; one in flight; none lost."""
    run = tiny_run()
    live = Live(run)  # driven by hand: its thread is not started
    live.expect()  # a page is loaded
    live._update()
    for _ in range(4):  # its first drawings, slow as they may be, do not count
        answer(live)
        live._update()
    run.session.start(10**6)
    try:
        for pause in (0.02, 0.05, 0.05, 0.05):
            live._sent_at -= 100  # the last update was long ago
            assert soon(lambda: run.current_step > live._feed.last_step)
            live._update()
            sent = live.figure._last_trace_edit_id
            live._update()
            assert live.figure._last_trace_edit_id == sent  # nothing more until it is drawn
            time.sleep(pause)
            answer(live)
        assert 0.6 <= live.interval <= 3
        assert live.interval == pytest.approx(live.drawing / DRAWING_SHARE)
        assert live.interval > 10 * live.drawing
        live._update()
        assert live.figure._last_trace_edit_id == sent  # drawn, but the next is not due
        live._sent_at -= 100
        assert soon(lambda: run.current_step > live._feed.last_step)
        live._update()
        live._own = 0.3  # of a run so long that to make an update costs more than to draw it
        answer(live)
        assert live.interval == pytest.approx(0.3 / OWN_SHARE)
    finally:
        run.session.close()


def test_what_is_zoomed_into_is_drawn_in_full_detail(tiny_run, monkeypatch):
    """The step axis' window is thinned by itself; what stands beside it stays at the last step."""
    monkeypatch.setattr("widgets.live.LIVE_POINTS", 40)
    run = tiny_run()
    run.step(150)
    live = Live(run)
    line = next(trace for trace in live.figure.data if trace.uid == "train-loss")
    assert len(line.x) <= 40
    whole = line.x
    for moved, seen in (({"xaxis.range[0]": 59.5, "xaxis.range[1]": 70.2}, np.arange(59, 72)),
                        ({"xaxis.range": [100, 102]}, np.arange(99, 104)),
                        ({"xaxis2.range": [0, 3]}, np.arange(99, 104)),  # the experts' axis, not the steps'
                        ({"xaxis.autorange": True}, whole)):
        live.figure.set_state({"_js2py_relayout": {"relayout_data": moved, "source_view_id": "a"}})
        live._update()
        np.testing.assert_array_equal(line.x, seen)
        assert live.figure.layout.annotations[1].text == "<b>Utilisation at step 150, mean of layers</b>"


def test_without_a_browser_almost_nothing_is_sent(tiny_run):
    """Unanswered updates grow rare, and end when nothing is new; a page that is loaded gets all at once."""
    run = tiny_run()
    run.step(3)
    live = Live(run)
    run.step(2)
    sends, waits = [], []
    for _ in range(400):
        live._sent_at -= 0.5  # as if half a second had passed
        before = live.figure._last_trace_edit_id
        live._update()
        waits.append(0 if live.figure._last_trace_edit_id > before else waits[-1] + 0.5 if waits else 0.5)
        sends.append(live.figure._last_trace_edit_id)
    assert 1 < sends[-1] <= TRIES + 1
    for step in (lambda: None, live.expect, *[lambda: answer(live)] * 6):
        step()  # nothing; a page is being loaded; it and another view of the figure answer
        live._sent_at -= 1
        live._update()
        sends.append(live.figure._last_trace_edit_id)
    assert np.diff(sends[-9:]).tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert len(live.figure.data[1].x) == 5


def test_a_page_that_is_loaded_at_rest_gets_what_is_shown(tiny_run, bench):
    """The state that a new page is made from is the figure as it stands, not as it was first displayed."""
    run = tiny_run()
    panel = bench(run)
    panel.start(9)
    assert panel.session.wait(30)
    figure = panel.live.figure
    assert soon(lambda: len(figure._widget_data[1].get("x", ())) == 9)
    np.testing.assert_array_equal(figure._widget_data[1]["y"], figure.data[1].y)


def test_a_page_is_ready_for_the_figures_messages_before_plotly_is_read():
    """What anywidget waits for is small; it listens for plotly, whose script goes beside it as it is."""
    original = (Path(plotly.__file__).parent / "package_data" / "widgetbundle.js").read_text("utf-8")
    assert PanelFigure._script.default_value == original
    assert len(PanelFigure._esm) < 3000
    assert PanelFigure._esm.count("shared.off(event, handler)") == 1


def test_every_control_has_a_name(tiny_run, bench):
    """What ipywidgets makes a control's accessible name of: its description, or else its tooltip."""
    panel = bench(tiny_run())
    parts, seen = [panel], []
    while parts:
        part = parts.pop()
        parts += getattr(part, "children", ())
        if hasattr(part, "value") and "HTML" not in part._model_name and "Label" not in part._model_name:
            seen.append(part)
            assert part.description or part.tooltip, part
    assert len(seen) >= 26
    assert len({part.description or part.tooltip for part in seen}) == len(seen)
