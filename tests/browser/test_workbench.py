import re

from lab_server import BUSY, LATE, until

from moe_core.store import RunStore


def points(page):
    """How many points the first expert's line has in the browser."""
    return page.evaluate("""() => {
        const plot = document.querySelector('.js-plotly-plot');
        const line = plot && plot.data && plot.data.find(t => t.uid === 'expert-0-served' || t.name === '0');
        return line && line.x ? line.x.length : 0; }""")


def state(page):
    return page.locator(".moe-state").inner_text()


def test_a_newcomer_turns_the_temperature_of_a_training_model_and_sees_it_take_hold(run_notebook, page, tmp_path):
    """The first notebook in a real page: Run All, turn, read where it took hold, pause, note, reload, go on."""
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.add_init_script(BUSY)
    run_notebook("01_workbench.ipynb")
    page.locator(".js-plotly-plot").wait_for(timeout=120_000)
    until(lambda: points(page) > 45, "lines that grow past the first chunk")

    # The kernel is busy waiting in a cell, and the model trains: the slider must answer all the same.
    assert state(page) == "training"
    knob = page.locator(".moe-knob").filter(has=page.get_by_text("Router temperature", exact=True))
    handle = knob.locator(".noUi-handle[role=slider]")
    handle.focus()
    handle.press("PageDown")
    store = RunStore.open(tmp_path / "runs" / "first")

    def turns():
        return [e for e in store.read_events() if e["kind"] == "knob" and e["payload"]["name"] == "router_temp"]

    def shown_is_turned():
        return turns() and abs(turns()[-1]["payload"]["value"] - float(handle.get_attribute("aria-valuetext"))) < 1e-6

    until(shown_is_turned, "a turn to what the slider shows")
    turned = turns()
    step = turned[-1]["step"]
    until(lambda: f"applied at step {step}" in knob.inner_text(), f"applied at step {step}")
    until(lambda: store.last_step() >= step + 2, "two steps with the new temperature")
    rows = store.read_steps()
    temps = dict(zip(rows.steps.tolist(), rows.column("router/temp").tolist(), strict=True))
    value = turned[-1]["payload"]["value"]
    assert abs(temps[step] - value) < 1e-6 and abs(temps[step + 1] - value) < 1e-6
    first = turned[0]["step"]
    assert abs(temps[first - 1] - value) > 0.01, "before the first turn the schedule held"
    number = knob.locator("input[type=number]").first
    until(lambda: abs(float(number.input_value()) - value) < 1e-3, "the number beside the slider")

    before = points(page)
    until(lambda: points(page) > before, "lines that grow after the turn")

    page.get_by_role("button", name="Pause").click()
    until(lambda: state(page) == "paused", "paused")
    at = store.last_step()
    page.get_by_placeholder("A note, pinned to the current step").fill("a <b>bold</b> note & more")
    page.get_by_role("button", name="Add note").click()
    note = until(lambda: [e for e in store.read_events() if e["payload"].get("text") == "a <b>bold</b> note & more"],
                 "the note in the store")
    assert note[0]["step"] == at == store.last_step()

    layer = page.locator(".moe-run select")
    layer.press("ArrowDown")  # and not the notebook's cursor
    until(lambda: "layer 0" in page.locator(".moe-charts").inner_text(), "the layer that the keyboard chose")
    layer.press("ArrowUp")

    page.locator('.jp-NotebookPanel-toolbar [data-command="docmanager:save"]').click()
    page.locator(".jp-mod-dirty").wait_for(state="detached")
    page.reload()
    page.locator(".js-plotly-plot").wait_for()
    until(lambda: points(page) >= min(at, 900), "the whole history after a reload")
    until(lambda: state(page) == "paused", "the state after a reload")
    page.get_by_role("button", name="Step once").click()
    until(lambda: store.last_step() == at + 1 and state(page) == "idle", "one step more, and a chunk of its own")
    chunk = page.locator(".moe-run input[type=number]").first
    chunk.fill("8")
    chunk.press("Enter")
    page.locator(".moe-run").get_by_role("button", name=re.compile("^Run")).click()
    until(lambda: store.last_step() == at + 9, "a chunk of eight")
    until(lambda: points(page) >= min(at + 9, 900), "lines that grow after the reload")
    until(lambda: state(page) == "idle", "idle")

    page.get_by_role("button", name="Undo chunk").click()
    until(lambda: [b.name for b in store.branches()] == ["main", f"from-{at + 1}"], "a branch where the chunk began")
    until(lambda: f"step {at + 1:,}" in page.locator(".moe-status").inner_text(), "the panel where the run is")
    store.close()
    assert [error for error in errors if LATE not in error] == []


def test_every_control_has_a_name_and_nothing_hangs_over_the_edge(run_notebook, page):
    """What a screen reader reads, what a window of 1024 pixels shows, and sections that the keyboard opens."""
    page.set_viewport_size({"width": 1024, "height": 900})
    run_notebook("01_workbench.ipynb")
    page.locator(".js-plotly-plot").wait_for(timeout=120_000)
    unnamed = page.evaluate("""() => [...document.querySelectorAll(
        '.moe-workbench button, .moe-workbench input, .moe-workbench select, .moe-workbench [role=slider]')]
        .filter(e => e.offsetParent && !e.closest('.modebar') && !(
            e.getAttribute('aria-label') || e.title || e.placeholder || e.textContent.trim()
            || (e.labels && e.labels[0] && e.labels[0].textContent)))
        .map(e => e.outerHTML.slice(0, 120))""")
    assert unnamed == []
    until(lambda: page.evaluate("""() => {
        const edge = document.querySelector('.moe-workbench').getBoundingClientRect().right + 1;
        return ![...document.querySelectorAll('.moe-workbench *')].map(e => [e, e.getBoundingClientRect()])
            .some(([e, r]) => r.width && r.right > edge && !e.closest('svg')); }"""),
          "nothing over the edge, once the figure knows its width")
    for section, inside in enumerate((page.locator(".moe-groups table"), page.get_by_role("button", name="Look"))):
        page.locator(".jupyter-widget-Collapse-header[tabindex='0']").nth(section).press("Enter")
        inside.wait_for()
    page.get_by_role("button", name="Pause").click()
