"""What is said of which expert each token goes to, on routers made to order."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_core.data import train_tokenizer
from moe_core.inspect import Inspection
from moe_core.token_text import CLASSES, TokenText, classes_of, pieces_of

TEXT = "def measure(value):\n    return value + 1  # naïve 🎈 and 漢字\n"


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
    # Of the kind of document too: the first is all of one expert's.
    n = len(TokenText(tokenizer).encode(TEXT * 20))
    kinds = made(tokenizer, [TEXT * 20, "It was 1859.\n" * 40], lambda c, ids: [np.arange(len(c)) >= n] * 2,
                 kinds=["prose", "code"]).mutual_information()
    assert (kinds[kinds["about"] == "document kind"]["normalised"] > 0.999).all()
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
    assert table["lift"].iloc[0] == pytest.approx(1 / found.shares()[0, 2])
    pairs = made(tokenizer, ["def;" * 30 + "!" * 400 + TEXT], lambda c, ids: np.stack(
        [np.stack([choose(c, ids)[0], np.full(len(ids), 4)], -1)] * 2), n_experts=5, top_k=2)
    top, n, here = pairs.tokens_of(0, 2).iloc[0], len(pairs.token_ids), (pairs.experts[0, :, 0] == 2).sum()
    assert top["lift"] == pytest.approx(0.5 / pairs.shares()[0, 2])
    # By hand: of its 2 * 30 picks 30 went here, and the prior's 10 tokens have as much of it as the probe has.
    own = top["total"] + 10 * top["total"] / n
    assert top["log_odds"] == pytest.approx(np.log(own / (here + 10 - own)) - np.log(own / (2 * n - here + 10 - own)))
    assert top["z"] == pytest.approx(top["log_odds"] / np.sqrt(2 / own))
    common = table[table["total"] > 300]
    assert (common["lift"] < 1.4).all() and (common["z"] < table["z"].iloc[0] / 2).all()
    assert special not in set(found.tokens_of(1, 0)["id"])
    once = table[table["total"] == 1]
    assert (once["z"] < 2).all()
