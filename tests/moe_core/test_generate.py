"""Generation: what the cache gives is what a whole forward gives, row by row, and nothing of a run moves by it."""

import numpy as np
import pytest
import torch

from moe_core import Run
from moe_core.model import RouterControls, Transformer
from moe_core.model.generate import Decoder, generate, sample, stream
from moe_core.presets import preset
from moe_core.token_text import CLASSES

TINY = preset("nano", n_layer=3, d_model=32, n_head=4, expert_width=24, n_experts=4, vocab_size=61, block_size=24,
              router_temp_final=0.8)
VARIANTS = {
    "gated top-1": {},
    "top-2 GQA, bias balancing": dict(top_k=2, norm_topk_prob=True, n_kv_heads=2, attn_gate="none", qk_norm=False,
                                      balance="bias"),
    "learned positions, little room": dict(use_rope=False, dropless=False, capacity_factor=0.5, dropout=0.3),
    "dense block first, biases": dict(skip_first_n_moe=1, mlp_width=40, bias=True, n_kv_heads=1, top_k=2),
    "dense": dict(n_experts=0, mlp="gelu"),
}


def lively(config, seed=0, **how):
    """A model whose branches and balance bias matter, so that its text is no repetition of one token."""
    model = Transformer(config.model, config.router, seed=seed, **how)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down" in name:
                p.mul_(50)
        if model.balance_bias is not None:
            model.balance_bias.normal_(generator=generator)
    return model


def prompts(seed=0, lengths=(3, 9, 1)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 61, length).tolist() for length in lengths]


def whole_forward(model, prompt, n, temp=TINY.router.router_temp_final):
    """Greedy, one row by itself, everything read again for each token, by the model's own forward with ample room."""
    tokens = list(prompt)
    controls = RouterControls.constant(temp, 0.0, 100.0)
    model.eval()
    for _ in range(n):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]), controls=controls).logits_BSV[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_is_the_whole_forward_to_the_token(variant):
    """Greedy, prompts of unequal length in one batch, up to the last position; in training mode too."""
    model, n = lively(TINY.replace(**VARIANTS[variant])).train(), 15
    cached = generate(model, prompts(), n, temperature=0)
    again = generate(model, prompts(), n, temperature=0, use_cache=False)
    expected = [whole_forward(model, prompt, n) for prompt in prompts()]
    assert cached == again == expected
    assert len({token for text in expected for token in text}) > 8  # it does say something


def test_a_bfloat16_model_reads_a_prompt_as_its_own_forward_does():
    """To the bit; and goes on from there."""
    model, prompt = lively(TINY, compute_dtype=torch.bfloat16).eval(), prompts()[1]
    with torch.no_grad():
        decoder = Decoder(model, 1, 12)
        logits, _ = decoder.feed([prompt])
        assert torch.equal(logits, model(torch.tensor([prompt])).logits_BSV[:, -1].float())
        assert decoder.feed([[3]])[0].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_each_row_are_those_of_the_row_alone(variant):
    """To 1e-5, after the prompt and after each of four tokens."""
    model = lively(TINY.replace(**VARIANTS[variant])).eval()
    decoder, news, texts = Decoder(model, 3, 24), prompts(), [[], [], []]
    controls = RouterControls.constant(0.8, 0.0, 100.0)
    for _ in range(5):
        texts = [text + new for text, new in zip(texts, news, strict=True)]
        with torch.no_grad():
            logits, _ = decoder.feed(news)
            alone = torch.cat([model(torch.tensor([text]), controls=controls).logits_BSV[:, -1] for text in texts])
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
        news = [[int(token)] for token in torch.randint(61, (3,))]


def test_the_cache_holds_the_shared_heads_alone():
    """Grouped-query attention keeps n_kv_heads of keys and values, not n_head."""
    model = lively(TINY.replace(n_kv_heads=2))
    cache = Decoder(model, 3, 10).caches[0]
    assert cache.k_BGSC.shape == cache.v_BGSC.shape == (3, 2, 10, 8)


def test_nothing_is_dropped_and_no_text_depends_on_its_neighbours():
    """With room for half of an even load, a batch of the same prompt many times goes on as the prompt alone does."""
    model = lively(TINY.replace(dropless=False, capacity_factor=0.5))
    [alone] = generate(model, prompts(lengths=(7,)), 8, temperature=0)
    assert generate(model, prompts(lengths=(7,)) * 6, 8, temperature=0) == [alone] * 6


def test_experts_are_those_of_the_routers_for_every_token():
    """The prompt's, each new token's and the last one's: the picks and weights of one whole forward, in order."""
    model = lively(TINY.replace(top_k=2, norm_topk_prob=True, balance="bias"))
    fed = list(stream(model, prompts(), 6, temperature=0))
    heard = []
    for block in model.blocks:
        block.mlp.router.register_forward_hook(lambda router, inputs, routing: heard.append(routing))
    for row, prompt in enumerate(prompts()):
        ids, experts, weights = (np.concatenate([getattr(f, name)[row] for f in fed], axis)
                                 for name, axis in (("token_ids", 0), ("experts", 1), ("weights", 1)))
        assert len(ids) == len(prompt) + 6 == experts.shape[1]
        heard.clear()
        model.eval()(torch.tensor([ids.tolist()]))
        assert np.array_equal(experts, torch.stack([routing.experts_TK for routing in heard]))
        np.testing.assert_allclose(weights, torch.stack([routing.weights_TK for routing in heard]).detach(), atol=1e-5)


def test_a_row_ends_at_the_end_of_text_and_the_others_go_on():
    """It keeps the mark, is fed nothing more, and the other rows are as without it."""
    model = lively(TINY)
    free = generate(model, prompts(), 12, temperature=0)
    end = free[0][5]  # what the first row says third
    fed = list(stream(model, prompts(), 12, temperature=0, end_of_text=end))
    for row, (prompt, text) in enumerate(zip(prompts(), free, strict=True)):
        new = text[len(prompt):]
        expected = prompt + (new[: new.index(end) + 1] if end in new else new)
        assert np.concatenate([f.token_ids[row] for f in fed]).tolist() == expected
    assert sum(len(f.token_ids[0]) for f in fed) == 6


def test_sampling_is_from_the_tempered_distribution_and_from_what_is_kept_of_it():
    """Over 40,000 draws the shares are the probabilities; top_k and top_p leave the literal sets; 0 is greedy."""
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    def shares(**how):
        drawn = sample(logits.expand(40_000, -1), generator=torch.Generator().manual_seed(3), **how)
        return torch.bincount(drawn, minlength=4) / len(drawn)
    tempered = (logits / 2).softmax(-1)
    assert (shares(temperature=2.0) - tempered).abs().max() < 0.01
    assert (shares(temperature=1.0, top_k=2) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.01
    assert (shares(temperature=1.0, top_p=0.81) - torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95).abs().max() < 0.01
    assert shares(temperature=1.0, top_p=0.01).tolist() == shares(temperature=0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("how, said", [
    (dict(max_new_tokens=16), r"max_new_tokens = 16: .*1 to 15 here: block_size = 24.*9 tokens"),
    (dict(temperature=-1.0), "temperature = -1.0"), (dict(top_k=0), "top_k = 0"), (dict(top_p=1.5), "top_p = 1.5"),
    (dict(top_p=0.0), "top_p = 0.0"),
])
def test_what_cannot_be_is_refused_in_one_line(how, said):
    """Before anything is read, with the field, the value and what would be right."""
    with pytest.raises(ValueError, match=said):
        generate(lively(TINY), prompts(), **how)


def test_a_text_never_outgrows_the_block():
    """Without max_new_tokens it fills the block; a prompt that fills it already is refused."""
    model = lively(TINY)
    assert [len(text) for text in generate(model, prompts(lengths=(9, 3)), temperature=0)] == [24, 18]
    with pytest.raises(ValueError, match=r"24 tokens; must be at most 23.*block_size = 24"):
        generate(model, prompts(lengths=(24,)))


# A run's

def test_a_run_that_generates_is_the_run_that_does_not(tiny_run):
    """Rows, random numbers and training mode are the same to the bit, also where it is asked while training."""
    runs = [tiny_run(name, dropout=0.1) for name in ("asked", "left alone")]
    for run in runs:
        run.step(3)
    assert runs[0].generate("def f(", 8).step == 3
    training = runs[0]._trainer.model.training
    for run in runs:
        run.session.start(12)
    during = [runs[0].generate("import ", 4, temperature=0) for _ in range(3)]
    for run in runs:
        run.session.wait()
    assert all(3 <= text.step <= 15 for text in during)
    assert training and runs[0]._trainer.model.training
    rows = [run.metrics().drop(columns=["perf/tok_s", "perf/data_wait"]) for run in runs]
    assert rows[0].equals(rows[1])
    assert torch.equal(*(run._trainer.noise.get_state() for run in runs))


def test_a_text_its_tokens_and_experts_belong_together(tiny_run):
    """One seed gives one text, another another; ids read as the text; the prompt's experts are run.inspect's."""
    run = tiny_run(top_k=2, norm_topk_prob=True, balance="bias", router_temp_final=0.7, n_layer=3, skip_first_n_moe=1)
    run.step(4)
    one, same, other = (run.generate("class Thé:", 12, seed=seed) for seed in (1, 1, 2))
    assert one.text == same.text != other.text and one.text.startswith("class Thé:")
    assert one.text == one.text[:10] + one.continuation and len(one.token_ids) == one.n_prompt + 12
    seen = one.inspection()
    assert "".join(seen.pieces) == one.text
    probe = run.inspect("class Thé:")
    assert np.array_equal(probe.experts, one.experts[:, : one.n_prompt])
    assert probe.blocks == seen.blocks == one.blocks == (1, 2)
    assert np.array_equal(probe.classes, seen.classes[: one.n_prompt])
    np.testing.assert_allclose(probe.weights, one.weights[:, : one.n_prompt], atol=1e-6)
    assert one.experts.shape == (2, len(one.token_ids), 2)
    *_, last = run.stream("class Thé:", 12, seed=1)
    assert last.text == one.text
    many = run.generate(["class Thé:", "", "if x"], 5, temperature=0)
    alone = [run.generate(prompt, 5, temperature=0) for prompt in ("class Thé:", "", "if x")]
    assert [text.text for text in many] == [text.text for text in alone]
    assert CLASSES[many[1].inspection().classes[0]] == "special"  # the mark that a document begins after
    assert "endoftext" not in many[1].text
    run._trainer.model.embed.weight.data.zero_()  # every token is as likely, and the first of them ends a text
    assert run.generate("if x", 5, temperature=0).token_ids[many[2].n_prompt :].tolist() == [0]


def test_any_state_of_a_run_can_write(tiny_run):
    """The start, a named checkpoint and now give what a whole forward of those weights gives."""
    run = tiny_run()
    run.step(2)
    run.checkpoint("two")
    run.step(20)
    texts = {step: run.generate("def ", 10, step=step, temperature=0) for step in (0, "two", None)}
    assert [text.step for text in texts.values()] == [0, 2, 22]
    ids, n_prompt = texts[None].token_ids.tolist(), texts[None].n_prompt
    assert ids == whole_forward(run._trainer.model, ids[:n_prompt], 10, run.knobs["router_temp"].value)
    run.close()
    attached = Run.attach(run.path)  # as another process sees it: the newest saved state
    assert attached.generate("def ", 10, temperature=0).token_ids.tolist() == ids
    attached.close()


def test_a_run_without_a_tokenizer_goes_on_with_ids(tiny_run, tmp_path):
    """Token ids in, token ids out; a text is refused in one line."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 300, 20_000).astype(np.uint16))
    run = tiny_run(dataset_name=str(tmp_path / "ids.npy"), n_experts=0)
    text = run.generate([5, 6, 7], 4)
    assert text.token_ids[:3].tolist() == [5, 6, 7] and len(text.token_ids) == 7 and text.experts.shape == (0, 7, 1)
    assert text.text.startswith("[5][6][7][")
    for prompt, said in (("text", "no tokenizer"), (7, "prompt = 7: must be a text"), ([], "at least one token"),
                         ([300, 512], "must be 0 to 511"), ([3, "a"], r"prompt = 3: must be a text")):
        with pytest.raises(ValueError, match=said):
            run.generate(prompt, 4)
