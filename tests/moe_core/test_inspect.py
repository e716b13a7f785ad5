"""Which expert each token goes to, read beside the training; and what is said of it, on routers made to order."""

import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_core import probe
from moe_core.data import load_tokens, train_tokenizer
from moe_core.inspect import Inspection
from moe_core.model import RouterControls
from moe_core.model.router import Router
from moe_core.store import RunStore
from moe_core.token_text import CLASSES, TokenText, classes_of, pieces_of

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
    """Every pick, weight and drop of a text longer than the model's window, as the run's own model makes them."""
    run = tiny_run(**changes)
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
    path = run.path
    run.close()
    run = type(run).open(path)
    try:
        for want, got in ((early, run.inspect(TEXT, "two")), (early, run.inspect(TEXT, 2)), (late, run.inspect(TEXT)),
                          (start, run.inspect(TEXT, 0))):
            assert want.step == got.step and np.array_equal(want.weights, got.weights)
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


def test_the_probe_without_a_text_is_the_runs_validation(tiny_run):
    """The same windows at every call, those that validation reads, cut into documents at the end of a text."""
    run = tiny_run(eval_iters=3)
    run.step(1)
    first, second = run.inspect(), run.inspect()
    rows = torch.cat(run._trainer.validation)[:, :-1]
    assert np.array_equal(first.token_ids, second.token_ids) and np.array_equal(first.token_ids, rows.flatten())
    ends = [(at + 1) % 32 != 0 and first.windows[at] == first.windows[at + 1] and token == 0
            for at, token in enumerate(first.token_ids[:-1])]
    assert first.documents.max() == len(rows) - 1 + sum(ends)


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


# ---- what is said of an inspection -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 50, "It was 1859, the best of times.\n" * 50], 400)


def made(tokenizer, texts, choose, n_experts=4, n_layer=2, top_k=1, kinds=None):
    """An inspection whose experts [L, T, K] are what ``choose(classes, token ids)`` says."""
    text = TokenText(tokenizer)
    documents = [text.encode(one) for one in texts]
    token_bytes = [[text.bytes_of(i) for i in ids] for ids in documents]
    pieces = [pieces_of(own) for own in token_bytes]
    classes = np.concatenate([classes_of(p, [False] * len(p)) for p in pieces])
    ids = np.concatenate(documents)
    sizes = [len(d) for d in documents]
    experts = np.asarray(choose(classes, ids)).reshape(n_layer, len(ids), top_k)
    return Inspection(
        step=1, n_experts=n_experts, token_ids=ids, token_bytes=tuple(b for own in token_bytes for b in own),
        pieces=tuple(p for own in pieces for p in own), classes=classes, documents=np.repeat(range(len(sizes)), sizes),
        windows=np.zeros(len(ids), int), kinds=tuple(kinds or [None] * len(texts)), experts=experts,
        weights=np.ones(experts.shape, np.float32), kept=np.ones(experts.shape, bool), blocks=tuple(range(n_layer)))


def picks(rng, n_layer, n_tokens, n_experts, top_k):
    return rng.random((n_layer, n_tokens, n_experts)).argsort(-1)[..., :top_k]


@pytest.mark.parametrize("top_k", (1, 2))
def test_a_router_that_knows_nothing_has_no_mutual_information(tokenizer, top_k):
    """Random picks, many experts and rare classes: within the noise of 0, where the raw estimate is far from it."""
    rng = np.random.default_rng(random.randrange(2**32))
    found = made(tokenizer, [TEXT * 20, "It was 1859.\n" * 40], lambda c, ids: picks(rng, 40, len(c), 32, top_k),
                 n_experts=32, n_layer=40, top_k=top_k, kinds=["code", "prose"])
    table = found.mutual_information()
    assert set(table["about"]) == {"token class", "document kind"} and len(table) == 80
    error = table["spread"] / np.sqrt(40)
    for _, rows in table.groupby("about"):
        assert abs(rows["nats"].mean()) < 6 * error[rows.index].mean()
        assert rows["normalised"].abs().max() < 0.06
        assert rows["chance"].mean() > 15 * error[rows.index].mean()  # what was taken off is no trifle


def test_a_router_that_follows_the_class_has_all_the_information_there_can_be(tokenizer):
    """Through a real model: the embedding says the class, the router reads it, and every layer scores 1."""
    classes = np.arange(len(CLASSES))
    one = made(tokenizer, [TEXT * 20], lambda c, ids: np.stack([c, c]), n_experts=len(classes))
    table = one.mutual_information()
    assert (table["normalised"] > 0.999).all()
    shares = np.bincount(one.classes, minlength=len(classes)) / len(one.classes)
    entropy = -sum(p * np.log(p) for p in shares if p)
    np.testing.assert_allclose(table["nats"] + table["chance"], entropy)
    # K = 2: a class has a pair of experts of its own, of which each token takes both.
    pairs = np.stack([2 * one.classes, 2 * one.classes + 1], -1)
    two = made(tokenizer, [TEXT * 20], lambda c, ids: np.stack([pairs, pairs]), n_experts=2 * len(classes), top_k=2)
    assert (two.mutual_information()["normalised"] > 0.999).all()
    # Fewer pairs than classes: the pair follows from the class, and which of the two experts it is nobody can know.
    halves = np.stack([one.classes % 2 * 2, one.classes % 2 * 2 + 1], -1)
    few = made(tokenizer, [TEXT * 20], lambda c, ids: np.stack([halves, halves]), top_k=2).mutual_information()
    assert (few["normalised"] > 0.999).all() and (few["nats"] < 0.8).all()
    collapsed = made(tokenizer, [TEXT], lambda c, ids: np.zeros((2, len(c))).astype(int))
    assert collapsed.mutual_information()["normalised"].isna().all()


def test_a_real_router_made_to_follow_the_class_is_seen_to(tiny_run):
    """A token's embedding set to its class and nothing else, its router to that class: MI near its maximum."""
    run = tiny_run(n_experts=16, n_layer=2)
    found = run.inspect(TEXT * 5)
    before = found.mutual_information()["normalised"].max()
    state = run._trainer.model.state_dict()
    direction = torch.eye(32)
    with torch.no_grad():
        state["embed.weight"].zero_()
        for token, kind in zip(found.token_ids.tolist(), found.classes.tolist(), strict=True):
            state["embed.weight"][token] = direction[kind]
        for name, value in state.items():
            if name.endswith("o_proj.weight") or name.endswith("w_down"):
                value.zero_()
            elif name.endswith("router.weight"):
                value.copy_(direction[: len(value)])
    after = run.inspect(TEXT * 5).mutual_information()["normalised"].min()
    assert after > 0.85 and after > before + 0.2


def test_coactivation_counts_every_pair_of_picks_once(tokenizer):
    """Rows add up to the picks of the first layer, columns to those of the second; equal layers lift the diagonal."""
    rng = np.random.default_rng(random.randrange(2**32))
    found = made(tokenizer, [TEXT * 9], lambda c, ids: picks(rng, 3, len(c), 4, 2), n_layer=3, top_k=2)
    for layer in (0, 1):
        counts, lift = found.coactivation(layer)
        for axis, experts in ((1, found.experts[layer]), (0, found.experts[layer + 1])):
            np.testing.assert_array_equal(counts.sum(axis=axis), 2 * np.bincount(experts.ravel(), minlength=4))
        assert counts.loc[1, 3] == sum(
            (1 in now) and (3 in after) for now, after in zip(*found.experts[layer : layer + 2], strict=True))
        assert abs(np.average(lift, weights=np.outer(counts.sum(axis=1), counts.sum(axis=0))) - 1) < 1e-9
    same = made(tokenizer, [TEXT * 9], lambda c, ids: np.stack([ids % 3] * 2))
    counts, lift = same.coactivation(0)
    shares = np.bincount(same.token_ids % 3, minlength=4) / len(same.token_ids)
    np.testing.assert_allclose(np.diag(lift)[:3], 1 / shares[:3])
    assert lift.loc[3].isna().all() and counts.to_numpy()[~np.eye(4, dtype=bool)].sum() == 0


def test_changed_since_counts_the_tokens_whose_experts_are_others(tokenizer):
    """Nothing since itself; a changed order of the same two experts is no change; chance is what chance gives."""
    rng = np.random.default_rng(random.randrange(2**32))
    one = made(tokenizer, [TEXT * 60], lambda c, ids: picks(rng, 2, len(c), 8, 2), n_experts=8, top_k=2)
    none = one.changed_since(replace(one, experts=one.experts[..., ::-1]))
    assert (none["changed"] == 0).all() and (none["saturation"] == 1).all()
    moved = one.experts.copy()
    half = len(one.token_ids) // 2
    moved[1, :half, 0] = [next(e for e in range(8) if e not in pair) for pair in moved[1, :half].tolist()]
    table = one.changed_since(replace(one, experts=moved))
    np.testing.assert_allclose(table["changed"], [0, half / len(one.token_ids)])
    np.testing.assert_allclose(table["saturation"], [1, 1 - half / len(one.token_ids) / 2])
    other = one.changed_since(replace(one, experts=picks(rng, 2, len(one.token_ids), 8, 2)))
    np.testing.assert_allclose(other["saturation"], other["chance"], atol=0.03)


def test_typical_tokens_are_those_an_expert_has_more_than_its_share_of(tokenizer):
    """A common token that goes everywhere does not lead; the one sent here does; one seen once does not."""
    rng = np.random.default_rng(random.randrange(2**32))
    text = TokenText(tokenizer)
    special, = text.encode("def")

    def choose(classes, ids):
        experts = np.where(ids == special, 2, rng.integers(0, 4, len(ids)))
        return np.stack([experts, experts])
    found = made(tokenizer, ["def;" * 30 + "!" * 400 + TEXT], choose)
    table = found.tokens_of(0, 2)
    assert table["id"].iloc[0] == special and table["token"].iloc[0] == "'def'"
    assert table["count"].iloc[0] == table["total"].iloc[0] == (found.token_ids == special).sum()
    assert table["z"].is_monotonic_decreasing and (table["lift"] > 1).all()
    common = table[table["total"] > 300]
    assert (common["lift"] < 1.4).all() and (common["z"] < table["z"].iloc[0] / 2).all()
    assert special not in set(found.tokens_of(1, 0)["id"])
    once = table[table["total"] == 1]
    assert (once["z"] < 2).all()


def test_a_token_that_is_a_part_of_a_character_keeps_its_bytes(tokenizer):
    """Whatever the text, the pieces join to it and the bytes to its UTF-8; a character is shown once it is whole."""
    text = TokenText(tokenizer)
    fresh = "".join(chr(random.choice((random.randrange(32, 0xD800), random.randrange(0x1F300, 0x1F6FF))))
                    for _ in range(50))
    for one in (TEXT, fresh, "<script>alert('🎈')</script>\t\n"):
        own = [text.bytes_of(i) for i in text.encode(one)]
        assert b"".join(own) == one.encode() and "".join(pieces_of(own)) == one
    balloon = [text.bytes_of(i) for i in text.encode("🧿")]
    assert len(balloon) > 1 and pieces_of(balloon) == [""] * (len(balloon) - 1) + ["🧿"]
    assert pieces_of(balloon[:-1])[-1] == "\ufffd"


def test_each_token_is_of_the_class_that_its_place_in_the_text_gives_it():
    """Words by where they begin, reserved words as a whole, and what is no text on its own."""
    tokens = ["def", " mea", "sure", "(", "x", "1", "):", "\n    ", " return", " ", "12", ".5", " if", "fy",
              b"\xf0\x9f", b"\x8e\x88", "\t", "<end>", "naïve"]
    own = [t.encode() if isinstance(t, str) else t for t in tokens]
    special = [t == "<end>" for t in tokens]
    assert [CLASSES[c] for c in classes_of(pieces_of(own), special)] == [
        "keyword", "word start", "continuation", "punctuation", "word start", "continuation", "punctuation", "newline",
        "keyword", "space", "number", "number", "word start", "continuation", "byte", "punctuation", "space", "special",
        "word start"]


def test_tokenizers_that_are_not_byte_level_are_read_too():
    """Bytes in angle brackets and the sign for a space (SentencePiece), and pieces of words (WordPiece)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_of_emoji = [f"<0x{b:02X}>" for b in "🧿".encode()]
    vocab = {token: i for i, token in enumerate(["<unk>", "▁", "t", "h", "▁t", "▁th", "e", "▁the", *bytes_of_emoji])}
    sentence = Tokenizer(models.BPE(vocab, [("▁", "t"), ("▁t", "h"), ("▁th", "e")], byte_fallback=True,
                                    unk_token="<unk>"))
    sentence.pre_tokenizer = pre_tokenizers.Metaspace()
    sentence.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "route": 1, "##r": 2, "##s": 3}, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    for tokenizer, text, want in ((sentence, "the 🧿", [b" the", b" ", *([b] for b in "🧿".encode())]),
                                  (pieces, "routers route", [b" route", b"r", b"s", b" route"])):
        read = TokenText(tokenizer)
        assert [read.bytes_of(i) for i in read.encode(text)] == [bytes(one) for one in want]
