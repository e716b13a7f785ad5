"""Which expert each token goes to, read from a run beside its training."""

import random
import threading
import time

import numpy as np
import pytest
import torch

from moe_core import probe
from moe_core.data import load_tokens
from moe_core.model import RouterControls
from moe_core.model.router import Router
from moe_core.store import RunStore
from moe_core.token_text import TokenText

TEXT = "def measure(value):\n    return value + 1  # naïve 🎈 and 漢字\n"


def direct(run, window):
    """Experts, weights and kept [L, T, K] of one window, by the run's own model at its own knob values."""
    seen, model = [], run._trainer.model.eval()
    hooks = [m.register_forward_hook(lambda m, i, routing: seen.append(routing))
             for m in model.modules() if isinstance(m, Router)]
    values = {name: knob.value for name, knob in run.knobs.items()}
    controls = RouterControls.constant(values["router_temp"], 5.0, values.get("capacity_factor", 1.0))
    with torch.no_grad():
        model(torch.tensor([window]), controls=controls)
    for hook in hooks:
        hook.remove()
    return [torch.stack([getattr(r, name) for r in seen]).numpy() for name in ("experts_TK", "weights_TK", "kept_TK")]


@pytest.mark.parametrize("changes", (
    {}, dict(top_k=2, norm_topk_prob=True), dict(top_k=2, dropless=False, capacity_factor=0.6),
    dict(n_layer=3, skip_first_n_moe=1), dict(balance="bias")),
    ids=("one pick", "two picks", "capacity", "a dense block first", "a balance bias"))
def test_assignments_are_those_of_a_forward_pass_without_noise(tiny_run, changes):
    """Every pick, weight and drop of a text longer than the model's window, as the run's own model makes them at a held
    temperature, or at that of the next step.
    """
    run = tiny_run(**changes)
    if changes:
        run.knobs["router_temp"].hold(0.7)
    run.step(2)
    if run._trainer.model.balance_bias is not None:
        run._trainer.model.balance_bias.uniform_(-1, 1)
    text = TEXT * 4
    ids = TokenText(load_tokens_tokenizer(run)).encode(text)
    assert len(ids) > 2 * 32
    found = run.inspect(text)
    assert found.token_ids.tolist() == ids and "".join(found.pieces) == text and found.step == 2
    for window, start in enumerate(range(0, len(ids), 32)):
        here = slice(start, start + 32)
        for got, want in zip((found.experts, found.weights, found.kept), direct(run, ids[here]), strict=True):
            np.testing.assert_array_equal(got[:, here], want)
        assert set(found.windows[here]) == {window}
    assert found.kept.all() == run.config.router.dropless
    assert found.blocks == tuple(range(changes.get("skip_first_n_moe", 0), run.config.model.n_layer))


def load_tokens_tokenizer(run):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(load_tokens(run.config.data, run.config.model.vocab_size).tokenizer_path))


def test_an_inspection_moves_nothing_of_the_run(tiny_run):
    """The steps after it, and the global random numbers, are to the bit those of a run that was never asked."""
    asked, silent = tiny_run("asked"), tiny_run("silent")
    for run in (asked, silent):
        run.step(2)
    before, training = torch.get_rng_state(), asked._trainer.model.training
    asked.inspect()
    asked.inspect(TEXT, step=0)
    asked.saturation()
    assert torch.equal(torch.get_rng_state(), before) and asked._trainer.model.training == training
    for run in (asked, silent):
        run.step(3)
    asked_rows, silent_rows = (run.metrics(per_layer=True).filter(regex="^(?!perf/)") for run in (asked, silent))
    assert asked_rows.equals(silent_rows) and len(asked.events()) == len(silent.events())
    weights = [run._trainer.state_dict()["model"] for run in (asked, silent)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_it_is_taken_between_two_steps_while_the_run_trains(tiny_run, monkeypatch):
    """What is seen of step n while training goes on is what is seen of the checkpoint of step n; training goes on.

    Training is a step or more ahead when the weights are read.
    """
    run, seen, read = tiny_run(save_interval=1, keep_checkpoints=1000), [], probe._read
    run.step(1)

    def late(config, weights, *rest):
        while run.current_step < weights.step + 1 and run.session.state == "training":
            time.sleep(0.001)
        return read(config, weights, *rest)
    monkeypatch.setattr(probe, "_read", late)
    run.session.start(40)
    thread = threading.Thread(target=lambda: seen.extend(run.inspect(TEXT) for _ in range(4)))
    thread.start()
    thread.join(60)
    run.session.wait()
    assert run.current_step == 41 and len(seen) == 4
    assert max(one.step for one in seen) < 41
    for one in seen:
        again = run.inspect(TEXT, step=one.step)
        assert np.array_equal(one.experts, again.experts) and np.array_equal(one.weights, again.weights)


def test_it_answers_after_training_has_failed(tiny_run):
    """What is asked for during a step that fails is answered all the same, of the last whole step."""
    run, inside, go_on, seen = tiny_run(), threading.Event(), threading.Event(), []
    run.step(1)

    def broken():
        inside.set()
        go_on.wait(30)
        raise OSError("the disk is gone")
    real, run._trainer.train.next = run._trainer.train.next, broken
    run.session.start(1)
    inside.wait(30)
    thread = threading.Thread(target=lambda: seen.append(run.inspect(TEXT)))
    thread.start()
    end = time.monotonic() + 60
    while not run.session.pending() and time.monotonic() < end:
        time.sleep(0.01)
    go_on.set()
    thread.join(30)
    run._trainer.train.next = real
    assert run.session.state == "failed" and [one.step for one in seen] == [1]


def test_a_run_that_was_only_opened_shows_its_saved_states(tiny_run, tmp_path):
    """By step, by a checkpoint's name, at the start, and now; another step is refused with those that are kept."""
    run = tiny_run()
    run.step(2)
    run.checkpoint("two")
    early = run.inspect(TEXT)
    run.step(1)
    late, start = run.inspect(TEXT), run.inspect(TEXT, step=0)
    zero, two = (late.changed_since(then)["saturation"].tolist() for then in (start, early))
    assert run.saturation("two", TEXT)["saturation"].tolist() == two
    path = run.path
    run.close()
    run = type(run).open(path)
    try:
        for want, got in ((early, run.inspect(TEXT, "two")), (early, run.inspect(TEXT, 2)), (late, run.inspect(TEXT)),
                          (start, run.inspect(TEXT, 0))):
            assert want.step == got.step and np.array_equal(want.weights, got.weights)
        table = run.saturation(texts=TEXT)
        assert table["step"].tolist() == [0, 0, 2, 2] and set(table["compared_with"]) == {3}
        assert table["saturation"].tolist() == zero + two
        with pytest.raises(ValueError, match="step = 1: no saved state at this step; available: 0, 2, 3"):
            run.inspect(TEXT, 1)
        with pytest.raises(ValueError, match="step = 'three': no checkpoint of that name; available: 'two'"):
            run.inspect(TEXT, "three")
        assert run.current_step == 3 and len(run.branches()) == 1
    finally:
        run.close()


def test_a_reader_of_the_store_sees_what_is_saved_while_another_trains(tiny_run):
    """Without a Run: now is the newest saved state, each kept one is to be had, and no file is touched."""
    run = tiny_run(save_interval=2, keep_checkpoints=9)
    run.step(3)
    run.checkpoint("three")
    run.step(2)
    want = {step: run.inspect(TEXT, step) for step in (2, "three", 4)}
    files = {file: file.stat().st_mtime_ns for file in run.path.rglob("*.safetensors")}
    run.session.start(30)
    with RunStore.open(run.path) as store:
        saved = probe.Saved(store)
        for step, one in want.items():
            assert np.array_equal(probe.inspect(saved, TEXT, step).weights, one.weights)
        now = probe.inspect(saved, TEXT)
        assert now.step >= 4 and set(probe.saturation(saved, [2], TEXT)["step"]) == {2}
        run.session.wait()
    assert all(file.stat().st_mtime_ns == at for file, at in files.items() if file.exists())


def test_weights_of_an_update_that_was_cut_short_are_not_shown(tiny_run):
    """They are of no step; what is shown is the newest state that was saved."""
    run = tiny_run()
    run.step(2)
    run.checkpoint("two")
    want = run.inspect(TEXT)
    with torch.no_grad():
        run._trainer.model.blocks[0].attn.o_proj.weight.add_(1.0)
    run._trainer.whole = False
    assert np.array_equal(run.inspect(TEXT).weights, want.weights)
    run._trainer.whole = True
    assert not np.array_equal(run.inspect(TEXT).weights, want.weights)


def test_the_probe_without_a_text_is_the_runs_validation(tiny_run, monkeypatch):
    """The same windows at every call, those that validation reads, cut into documents at the end of a text; where they
    are many, some from the first to near the last.
    """
    run = tiny_run(eval_iters=3)
    run.step(1)
    first, second = run.inspect(), run.inspect()
    rows = torch.cat(run._trainer.validation)[:, :-1]
    assert np.array_equal(first.token_ids, second.token_ids) and np.array_equal(first.token_ids, rows.flatten())
    ends = [(at + 1) % 32 != 0 and first.windows[at] == first.windows[at + 1] and token == 0
            for at, token in enumerate(first.token_ids[:-1])]
    assert first.documents.max() == len(rows) - 1 + sum(ends)
    monkeypatch.setattr(probe, "PROBE_TOKENS", 5 * 32)
    assert len(rows) == 12 and np.array_equal(run.inspect().token_ids, rows[[0, 2, 4, 7, 9]].flatten())


def test_an_array_of_ids_has_numbers_for_text(tiny_run, tmp_path):
    """Without a tokenizer a token reads as its number, the classes say nothing, and a text is refused."""
    ids = np.random.default_rng(random.randrange(2**32)).integers(0, 512, 20_000).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", ids)
    run = tiny_run(dataset_name=str(tmp_path / "tokens.npy"))
    found = run.inspect()
    assert found.pieces == tuple(f"[{token}]" for token in found.token_ids)
    assert found.mutual_information()["normalised"].isna().all() and len(found.tokens_of(0, 0)) > 0
    with pytest.raises(ValueError, match="this run has no tokenizer"):
        run.inspect(TEXT)


def test_what_cannot_be_asked_is_refused_in_one_line(tiny_run):
    run = tiny_run()
    for texts, said in ((3, "texts = '3'"), ([TEXT, 5], "must be a text"), ("", "texts: 0 tokens"),
                        ("a b " * 60_000, "must be 1 to 65,536")):
        with pytest.raises(ValueError, match=said):
            run.inspect(texts)
    with pytest.raises(ValueError, match=r"step = 1\.5: must be a step"):
        run.inspect(step=1.5)
    found = run.inspect(TEXT)
    for layer, expert in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match="must be 0 to"):
            found.tokens_of(layer, expert)
    with pytest.raises(ValueError, match="must have a layer with experts after it"):
        found.coactivation(1)
    with pytest.raises(ValueError, match="the same probe"):
        found.changed_since(run.inspect("another"))
    with pytest.raises(ValueError, match="a dense model"):
        tiny_run("dense", n_experts=0).inspect()
