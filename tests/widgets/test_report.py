import ast
import json
import re
import shutil

import nbformat
import pytest
from lab_server import chromium_page
from nbclient import NotebookClient

import moe_core as mc
from moe_core.gates import GateError
from moe_core.model import Transformer
from moe_core.old_logs import import_log
from widgets import compare, report
from widgets.figures import LEFT, panel_figure
from widgets.record import Record
from widgets.rendered import note_html, note_markdown
from widgets.report import ReportError
from widgets.report_blocks import Table, code
from widgets.report_figures import draw
from widgets.report_markdown import inline
from widgets.report_setup import script, setup
from widgets.report_words import assessment

HOSTILE = ("<script>alert('note')</script> \"double\" 'single' & <img src=x onerror=alert(1)>\n\n"
           "[click](javascript:alert(1)) ![pixel](https://example.invalid/p.png) `code </script>`\n\n"
           "# shouted\n```\n<b>fenced</b>\n\n</script><script>alert(2)</script>\n```\n😀 the end")
NAME = "run </script><script>alert('name')</script> \"'`|*_ 😀"


@pytest.fixture
def told_run(tiny_run):
    """60 steps with two turns, a hostile note, a hostile checkpoint's name, and a branch that parts at step 30."""
    def make(name="run"):
        run = tiny_run(name, max_steps=100)
        run.step(25)
        run.knobs["router_temp"].hold(0.5)
        run.step(5)
        run.note(HOSTILE)
        run.checkpoint(NAME)
        run.step(25)
        run.rewind(30, name=NAME)
        run.knobs["load_balance_alpha"].ramp(to=0.5, over=10)
        run.step(30)
        return run
    return make


def watched(page, path):
    """Open a file; what its page said, asked, raised or tried to fetch."""
    heard = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:"))
            else heard.append(request.url))
    page.goto(path.resolve().as_uri())
    return heard


def test_a_report_with_hostile_notes_and_names_is_inert_and_whole(told_run, tmp_path):
    """In a real Chromium: no dialog, no error, no request; every chart drawn; the words there, as they were typed."""
    run = told_run("a 'quoted' <b> run")
    run.note("half \ud83d a character\0")  # JSON can hold it, a file of text cannot
    out = run.report(tmp_path / "it's.html", title=NAME, gates=["val/loss < 100 by 20", "router/frac_srv_e* < 2"])
    with chromium_page() as page:
        heard = watched(page, out)
        page.wait_for_function("document.querySelectorAll('.main-svg').length > 0")
        charts = page.locator("figure[data-chart]").count()
        page.wait_for_function(f"document.querySelectorAll('.js-plotly-plot').length === {charts}")
        text = page.locator("body").inner_text()
        edges = "plots => plots.map(p => [p._fullLayout.width, p._fullLayout.xaxis.domain[0]])"
        before = page.eval_on_selector_all(".js-plotly-plot", edges)
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        printed = page.eval_on_selector_all(".js-plotly-plot", edges)
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.eval_on_selector_all(".js-plotly-plot", edges) == before
        assert page.title() == NAME and page.locator("script:not([type])").count() == 2
        assert page.locator(".entry img, .entry script, .entry b").count() == 0
    assert heard == []
    assert charts == 7 and {(width, round(width * left)) for width, left in printed} == {(660, LEFT)}
    for words in (HOSTILE.split("\n")[0], "<b>fenced</b>", "</script><script>alert(2)</script>", "😀 the end",
                  "half ? a character",
                  "run </script><script>alert('name')</script> \"''|*_ 😀", "a 'quoted' <b> run",
                  "Router temperature: held at 0.5", "val/loss < 100 by 20"):
        assert words in text, words


def test_report_and_panel_draw_the_same_lines(told_run):
    """Every trace of the panel's figure is on a figure of the report, point by point, and no other is."""
    run = told_run()
    record = Record.read(run)
    drawn = draw(record)
    panel = panel_figure(run.metrics(per_layer=True), run.experts(), run.events(), top_k=1, others=record.others)
    assert list(record.others) == ["main"]  # grey behind the branch that the run stands on
    expected = {trace.uid: trace.to_plotly_json() for trace in panel.data}
    seen = {trace.uid: trace.to_plotly_json() for figure in drawn.values() for trace in figure.data}
    assert seen.keys() == expected.keys()
    for uid, trace in expected.items():
        for key in ("x", "y", "z", "text", "line", "hovertemplate"):
            ours, theirs = seen[uid].get(key), trace.get(key)
            assert json.dumps(ours, default=lambda a: a.tolist()) == json.dumps(theirs, default=lambda a: a.tolist())


def test_a_report_says_where_its_run_stands(told_run, tmp_path):
    """Config, versions, snapshots, notes, effects, gates and branches, each where it belongs, as the store has them."""
    run = told_run()
    for state in ("here", "gone"):
        run.session.post(mc.Command("finding", {"level": "alarm", "rule": "r", "state": state, "text": f"was {state}"}))
    run.store.log_event(run.store.branches()[-1].id, 60, "mirror", {"text": "mirrored to nowhere"})
    record = Record.read(run)
    out = run.report(tmp_path / "r.html", gates=["val/loss < 0.1 by 20", "train/ce < 100", "train/ce < 1 by 999"],
                     snapshots=[20, 55], baselines=[run.path])
    text = out.read_text()
    assert "moe train --preset nano" in text and "torch" in text and "<th class=\"number\">step 55</th>" in text
    assert re.findall(r'class="state (\w+)"', text) == ["alarm", "alarm", "ok", "ok", "none", "none"]
    assert f"{record.metrics.loc[20, 'train/ce']:.4g}" in text
    heads = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert heads == ["Setup", "Snapshots", "Observations", "Assessment", "Timeline", "Recommendations",
                     "Acceptance checklist", "Comparison", "How to reproduce it"]
    entries = re.findall(r'class="entry (\w+)"><h4><span>step 60</span>(.*?)</h4>', text)
    assert entries == [("alarm", "Alarm: was here"), ("ok", "Gone: was gone")]
    paragraph = dict((head, words) for head, words, _ in assessment(record))["Clipping"]
    clipped = int(record.metrics["grad/clipped_cum"].iloc[-1])
    assert paragraph.startswith(f"{clipped} of 60 steps were clipped ({clipped / 60:.0%})")


def test_the_setup_says_what_the_model_is(tiny_run):
    """Its size, its experts and its training, as the config and the model have them."""
    run = tiny_run(top_k=2, dropless=False, capacity_factor=1.5, n_shared_experts=1, skip_first_n_moe=1, n_kv_heads=1)
    rows = dict(next(part.rows for part in setup(Record.read(run)) if isinstance(part, Table)))
    total = sum(p.numel() for p in Transformer(run.config.model, run.config.router).parameters())
    assert rows["model"] == ("2 layers of width 32, 2 attention heads (1 of keys and values), block of 32 tokens, "
                             "vocabulary of 512")
    assert rows["parameters"].startswith(f"{total:,}, ")
    assert rows["experts"] == ("4 of width 48 in each of 1 layers after 1 dense, 1 shared; top 2; capacity factor 1.5; "
                               "balance `aux`")
    assert rows["batch"] == "4 sequences, 128 tokens a step"


def test_runs_of_other_units_are_not_held_against_each_other(tiny_run, tmp_path):
    runs = [tiny_run("one"), tiny_run("two", vocab_size=600, n_experts=8)]
    text = compare.write(runs, tmp_path / "both.md").read_text()
    assert "vocabularies differ (`one` 512, `two` 600)" in text and "ln 4 = 1.386" in text and "ln 8 = 2.079" in text
    same = compare.write([runs[0], runs[0].path], tmp_path / "same.md").read_text()
    assert not any(word in same for word in ("differ:", "vocabularies", "different"))
    other = shutil.copytree(runs[0].config.data.dataset_name, tmp_path / "other")
    next(other.iterdir()).unlink()
    runs += [tiny_run("text", dataset_name=str(other)), runs[0].fork(tmp_path / "half", batch_size=2)]
    assert "read different tokens" in compare.write([runs[0], runs[2]], tmp_path / "text.md").read_text()
    half = compare.write([runs[0], runs[3]], tmp_path / "half.md").read_text()
    assert "windows (`one` 8 of 32 tokens, `half` 4 of 32 tokens)" in half and "read different" not in half
    runs[3].close()


def test_the_script_of_a_report_takes_the_same_steps(told_run, tmp_path, monkeypatch):
    """What "How to reproduce it" says, run, gives every metric of the branch to the bit."""
    run = told_run()
    child = run.fork(tmp_path / "child", batch_size=2)
    child.knobs["router_temp"].hold(1.5)
    child.step(5)
    begun = mc.Run.create(tmp_path / "begun", run.config, say=lambda line: None, init_from=run.path)
    begun.step(5)
    monkeypatch.chdir(tmp_path)
    for one, steps in ((run, 60), (child, 65), (begun, 5)):
        record, names = Record.read(one), {}
        exec(script(record), names)
        again = names["run"]
        try:
            same = [name for name in record.metrics if not name.startswith("perf/")]
            mine = again.metrics(per_layer=True)
            assert (mine[same].fillna(-1) == record.metrics[same].fillna(-1)).all(axis=None) and len(mine) == steps
        finally:
            again.close()
    child.close()
    begun.close()


def test_the_script_of_a_report_has_no_code_but_its_own(tiny_run):
    """Whatever a stranger's run says of where it came from, it is a value or left out."""
    run = tiny_run()
    for parent in ({"how": "init_from=exit(1), upcycle_from", "path": "exit(1)", "step": 0},
                   {"path": "', exit(1), '", "step": 0, "changes": {"batch_size=exit(1), seed": 2, "batch_size": 2}}):
        run.store.set_meta("parent", parent)
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(script(Record.read(run))))
                 if isinstance(node, ast.Call)}
        assert calls <= {"mc.preset", "mc.Run.create", "mc.free_path", "mc.Run.open", "parent.fork"}


def test_a_live_run_is_written_up_by_a_reader_while_it_trains(tiny_run, tmp_path):
    """From its path alone, with the writer at work; the report stands at a step that was logged by then."""
    run = tiny_run(max_steps=4000)
    run.step(5)
    run.session.start(2000)
    out = report.write(str(run.path), tmp_path / "live.html")
    assert run.session.state == "training"
    said = int(re.search(r"Experiment report at step (\d+)", out.read_text())[1])
    run.pause()
    run.session.wait()
    assert 5 <= said <= run.current_step


def test_markdown_has_its_pictures_beside_it(told_run, tmp_path):
    """Each picture that the text names is a PNG in the folder beside it, and no tag but those of notes is in it."""
    out = told_run().report(tmp_path / "out dir.md")
    text = out.read_text()
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(named) == 7
    for name in named:
        assert (tmp_path / name.replace("%20", " ")).read_bytes().startswith(b"\x89PNG")
    assert "\0" not in text and "<script" not in re.sub(r"`[^`\n]*`", "", text)


def test_a_static_report_has_no_script_and_every_chart(told_run, tmp_path):
    """Inline SVG in place of plotly.js: under half a megabyte, and inert."""
    out = told_run().report(tmp_path / "static.html", static=True)
    text = out.read_text()
    assert text.count("<figure") == 7 == len(re.findall(r'<figure[^>]*><svg class="main-svg"', text))
    assert "script-src 'none'" in text and len(text) < 500_000
    with chromium_page() as page:
        assert watched(page, out) == []
        assert page.locator("script").count() == 0


def test_a_notebook_report_runs_again_from_the_store(told_run, tmp_path):
    """Its cells read the run, closed by then, and draw each of its figures; it is a valid notebook before that."""
    run = told_run()
    out = run.report(tmp_path / "again.ipynb", baselines=[run.path])
    run.close()
    notebook = nbformat.read(out, as_version=4)
    nbformat.validate(notebook)
    drawing = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith("figures[")]
    assert len(drawing) > 7 and all("image/png" in cell.outputs[0].data for cell in drawing)
    NotebookClient(notebook, timeout=120, store_widget_state=False,
                   resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all("application/vnd.plotly.v1+json" in cell.outputs[0].data for cell in drawing)


def test_an_inspection_says_what_the_experts_took(tiny_run, tmp_path):
    """Its section names the probe, a row an expert, and its charts; a notebook keeps them as pictures in its text."""
    run = tiny_run()
    run.step(6)
    found = run.inspect()
    text = run.report(tmp_path / "r.html", inspection=found).read_text()
    assert f"{len(found.token_ids):,} tokens of {len(found.kinds)} documents" in text
    section = text[text.index("Most typical tokens"):text.index("Timeline</h2>")]
    assert section.count("<tr><td") == 4
    assert 'data-chart="information"' in text and 'data-chart="coactivation-0"' in text
    cells = nbformat.read(run.report(tmp_path / "r.ipynb", inspection=found), as_version=4).cells
    kept = [cell for cell in cells if "attachments" in cell]
    assert [list(cell.attachments) for cell in kept] == [["information.png"], ["coactivation-0.png"]]


def test_several_runs_are_overlaid_and_their_differences_listed(tiny_run, tmp_path):
    """Two runs with another seed, alpha and turn: in the tables, with a line of each on every overlay, named in its
    legend however many there are."""
    runs = [tiny_run("one", seed=1), tiny_run("two", seed=2, load_balance_alpha=0.5)]
    runs[1].knobs["router_temp"].hold(1.3)
    for run in runs:
        run.step(12)
    out = compare.write([runs[0], str(runs[1].path)], tmp_path / "both.html")
    text = out.read_text()
    differences = text[text.index("How their configs differ"):]
    fields, _, turned = differences.rpartition("What was turned")
    assert re.findall(r"<tr><td><code>(\w+)</code>", fields) == ["load_balance_alpha", "seed"]
    assert re.findall(r"<td.*?>(.*?)</td>", turned) == ["<code>two</code>", "1", "Router temperature: held at 1.3"]
    records = [Record.read(run) for run in runs]
    assert all(figure.layout.showlegend for figure in compare.draw(records * 15).values())
    for figure in compare.draw(records).values():
        assert [trace.name for trace in figure.data if trace.name] == ["one", "two"]
    line = next(t for t in compare.draw(records)["overlay-train-ce"].data if t.name == "two")
    assert line.y.tolist() == runs[1].metrics()["train/ce"].to_numpy("float32").tolist()
    with pytest.raises(ReportError, match="must be two runs or more"):
        compare.write([runs[0]], tmp_path / "one.html")
    with pytest.raises(ReportError, match="must end in"):
        compare.write([runs[0]], runs[1].path)  # a command line that names no file


def test_an_imported_log_is_written_up_and_stands_as_a_baseline(tiny_run, tmp_path):
    """What the log lacks is absent, its ranges are not judged, and its validation is drawn under its own name."""
    lines = [f"iter {step:6d} | loss {7 - step / 40:.4f} | lr 3.2e-04 | 33016 tok/s | r_max 0.19 act_min 8 col 0\n"
             f"eval | val_loss {7.1 - step / 40:.4f}\n" for step in range(10, 101, 10)]
    (tmp_path / "old.log").write_text("".join(lines))
    import_log(tmp_path / "old.log", tmp_path / "old")
    text = report.write(tmp_path / "old", tmp_path / "old.html", gates=["val/loss_with_aux < 5 by 100"]).read_text()
    assert "4.85 at step 90" in text and "no range was judged" in text and "healthy" in text
    assert "moe train" not in text and ">health<" not in text
    run = tiny_run()
    run.step(20)
    overlay = compare.draw([Record.read(run), Record.read(tmp_path / "old")])
    assert list(overlay) == ["overlay-val-loss", "overlay-train-loss", "overlay-router-max_frac_max"]
    mine, theirs = (t for t in overlay["overlay-val-loss"].data if t.name)
    assert (mine.name, theirs.name, theirs.line.dash) == ("run", "old, val/loss_with_aux", "dash")
    assert theirs.x.tolist() == list(range(10, 101, 10)) and "old" in run.report(
        tmp_path / "r.html", baselines=[tmp_path / "old"]).read_text()


@pytest.mark.parametrize("how, error, words", [
    (dict(out="x.pdf"), ReportError, "must end in .html, .md, .ipynb"),
    (dict(out="no/such/x.html"), ReportError, "there is no folder"),
    (dict(out="x.html", snapshots=[3, 99]), ReportError, "snapshots = 99: must be a step of this run, 1 to 4"),
    (dict(out="x.html", gates=["val/loss"]), GateError, "must be METRIC"),
    (dict(out="x.html", baselines=["nowhere"]), mc.StoreError, "nowhere")])
def test_what_cannot_be_written_is_refused_before_anything_is(tiny_run, tmp_path, monkeypatch, how, error, words):
    run = tiny_run()
    run.step(4)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        run.report(**{"path" if key == "out" else key: value for key, value in how.items()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_run_without_a_step_and_a_dense_one_are_written_up_too(tiny_run, tmp_path):
    assert "No step is logged yet." in tiny_run("empty").report(tmp_path / "empty.html").read_text()
    dense = tiny_run("dense", n_experts=0)
    dense.step(12)
    text = dense.report(tmp_path / "dense.html").read_text()
    assert "router/" not in re.sub(r"<script.*?</script>", "", text, flags=re.S) and "Clipping" in text


@pytest.mark.parametrize("text, html, markdown", [
    ("plain *words*", "<p>plain <em>words</em></p>", "> plain *words*"),
    ("[a](https://a.org)", '<p><a href="https://a.org">a</a></p>', "> [a](https://a.org)"),
    ("a\n\nb", "<p>a</p>\n<p>b</p>", "> a\n>\n> b"),
    ("<b>x</b>", "<p>&lt;b&gt;x&lt;/b&gt;</p>", "<blockquote><p>&lt;b&gt;x&lt;/b&gt;</p></blockquote>"),
    ("[a](javascript:x)", "<p>[a](javascript:x)</p>", "<blockquote><p>[a](javascript:x)</p></blockquote>"),
    ("![a](https://a.org)", '<p>!<a href="https://a.org">a</a></p>',
     '<blockquote><p>!<a href="https://a.org">a</a></p></blockquote>')])
def test_a_note_is_markdown_that_cannot_act(text, html, markdown):
    assert note_html(text).strip() == html
    assert note_markdown(text) == markdown


def test_a_name_is_code_on_one_line():
    """Newlines, control characters and backticks of a name end nothing, and a tag in it is no tag in Markdown."""
    assert code("a\n# b `x`\0|") == "`a # b 'x' |`"
    assert "<img" not in inline(code("<img src=x> [a](b)")) and "[a]" not in inline(code("<img src=x> [a](b)"))
