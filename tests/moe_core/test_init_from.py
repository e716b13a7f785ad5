"""Weights that a run begins with: another run's, a checkpoint's, a dense model's; and that it can go back to them."""

import shutil
from pathlib import Path

import pytest
import torch

from moe_core import ConfigError, Run
from moe_core.data.cache import cache_root
from moe_core.model import RouterControls
from moe_core.store import StoreError


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    """A small corpus of another kind: prose, as English as generated sentences are."""
    folder = tmp_path_factory.mktemp("prose")
    for at in range(30):
        (folder / f"{at}.txt").write_text("".join(
            f"The {a} {b} saw the {c} {at}.\n" for a in ("old", "new", "red") for b in ("house", "river", "mill")
            for c in ("road", "sea", "wood", "bell")))
    return folder


@pytest.fixture
def create(tmp_path):
    """Makes runs and closes them."""
    made = []

    def make(name, config, **how):
        made.append(Run.create(tmp_path / name, config, say=lambda line: None, **how))
        return made[-1]
    yield make
    for run in made:
        run.close()


def state(run):
    if run._trainer is None:
        run.resume()
    return run._trainer.model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_fine_tuning_begins_with_the_weights_and_a_fresh_schedule(tiny_run, tiny, create, other_text):
    """Step 0, the first rate of the warm-up, an empty optimizer, the parent's weights to the bit and its tokenizer."""
    parent = tiny_run("parent", balance="bias")
    parent.step(12)
    child = create("child", tiny(balance="bias", dataset_name=str(other_text), seed=5), init_from=parent)
    assert child.current_step == 0 and same(state(child), state(parent))
    assert not child._trainer.optimizer.state_dict()["state"]
    assert child.store.get_meta("parent") == {"path": str(parent.path.resolve()), "branch": 1, "step": 12,
                                              "how": "init_from", "optimizer": False}
    words = "def encode(self):\n    return The"
    assert child.generate(words, 4, temperature=0).text == parent.generate(words, 4, temperature=0).text
    child.step(2)
    assert child.metrics()["lr"].tolist() == parent.metrics()["lr"].tolist()[:2]


def test_fine_tuning_learns_faster_than_from_nothing(tiny_run, tiny, create):
    """Thirty steps in, the child's first loss on the same text is the parent's last, and not ln V."""
    parent = tiny_run("parent")
    parent.step(30)
    child = create("child", tiny(seed=9), init_from=parent.path)
    child.step(1)
    assert abs(child.metrics()["train/ce"].iloc[0] - parent.metrics()["train/ce"].iloc[-5:].mean()) < 0.3
    assert parent.metrics()["train/ce"].iloc[0] - child.metrics()["train/ce"].iloc[0] > 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "muon_sophia"])
def test_a_kept_optimizer_goes_on_under_the_new_rates(tiny_run, tiny, create, optimizer):
    """What it gathered is the parent's to the bit; rates and decay are the child's own."""
    parent = tiny_run("parent", optimizer=optimizer)
    parent.step(3)
    child = create("child", tiny(optimizer=optimizer, learning_rate=1e-4, min_lr=0.0, weight_decay=0.3),
                   init_from=parent, keep_optimizer=True)
    (now, before) = (run._trainer.optimizer.state_dict() for run in (child, parent))
    gathered = [[value for own in kept["state"].values() for value in own.values()] for kept in (now, before)]
    assert len(gathered[0]) == len(gathered[1]) > 0
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*gathered, strict=True))
    if optimizer == "adamw":
        assert {group["peak_lr"] for group in now["param_groups"]} == {1e-4}
        assert now["param_groups"][0]["weight_decay"] == 0.3
    child.step(1)


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_goes_back_to_what_it_began_with(tiny_run, tiny, create, tmp_path, kept):
    """Closed without a checkpoint and opened again, rewound to 0, replayed, forked: the same numbers to the bit."""
    parent = tiny_run("parent")
    parent.step(5)
    child = create("child", tiny(seed=3), init_from=parent, keep_optimizer=kept)
    began = {name: value.clone() for name, value in state(child).items()}
    child.step(4)
    losses = child.metrics()["train/ce"].tolist()
    child.rewind(0)
    assert same(state(child), began)
    child.step(4)
    assert child.metrics()["train/ce"].tolist() == losses
    assert (child.replay()["largest"] == 0).all()
    fork = child.fork(tmp_path / "fork")
    assert (fork.replay()["largest"] == 0).all()
    fork.close()
    child.close()
    for file in (child.path / "checkpoints").glob("*"):
        file.unlink()
    parent.close()
    shutil.rmtree(parent.path)
    again = Run.open(child.path)
    again.rewind(0)
    assert same(state(again), began)
    again.close()


def test_every_place_with_weights_can_be_begun_from(tiny_run, tiny, create):
    """A run, its directory, the file of a named checkpoint: each gives the weights of its step."""
    parent = tiny_run("parent")
    parent.step(2)
    parent.checkpoint("two")
    parent.session.wait()
    early = {name: value.clone() for name, value in state(parent).items()}
    file = next((parent.path / "checkpoints").glob("*-two.safetensors"))
    parent.step(2)
    child = create("file", tiny(), init_from=file)
    assert same(state(child), early) and not child._trainer.optimizer.state_dict()["state"]
    assert same(state(create("open", tiny(), init_from=str(parent.path))), state(parent))
    late = {name: value.clone() for name, value in state(parent).items()}
    parent.close()
    assert same(state(create("closed", tiny(), init_from=parent.path)), late)


def test_the_tokenizer_stays_with_the_run(tiny_run, tiny, create, other_text):
    """With the cache's copy gone, the run's own takes its place when it is opened or attached to; also of runs made by
    its config.
    """
    parent = tiny_run("parent")
    child = create("child", tiny(dataset_name=str(other_text)), init_from=parent)
    later, plain = create("later", child.config, init_from=child), create("plain", child.config)
    for made, back in (child, Run.open), (later, Run.attach), (plain, Run.open):
        text = made.generate("def f", 5, temperature=0).text
        made.close()
        assert cache_root() in Path(made.config.data.tokenizer).parents
        shutil.rmtree(made.config.data.tokenizer)
        again = back(made.path)
        assert again.generate("def f", 5, temperature=0).text == text
        again.close()


@pytest.mark.parametrize("changes, said", [
    (dict(d_model=48), "d_model = 48: must be 32, as in .*parent"),
    (dict(expert_width=64), "expert_width = 64: must be 48"),
    (dict(n_experts=8), "n_experts = 8: must be 4"),
    (dict(qk_norm=False), "qk_norm = False: must be True"),
    (dict(vocab_size=600), "vocab_size = 600: must be 512"),
    (dict(balance="aux"), "balance = 'aux': must be 'bias' or 'both'"),
])
def test_a_mismatch_is_refused_by_its_field(tiny_run, tiny, create, tmp_path, changes, said):
    """Before anything is written."""
    parent = tiny_run("parent", balance="bias")
    with pytest.raises(ConfigError, match=said):
        create("child", tiny(**{"balance": "bias", **changes}), init_from=parent)
    assert not (tmp_path / "child").exists()


def test_other_refusals(tiny_run, tiny, create, tokenizer_folder, make_tokenizer):
    """An optimizer of another kind or of other weights, a tokenizer that the weights do not know or whose texts end
    with another token, no run at all, two places at once.
    """
    parent, fresh = tiny_run("parent"), tiny_run("fresh").path
    named, other = tiny_run("named", tokenizer=tokenizer_folder, vocab_size=768), make_tokenizer(eos_token="e")
    parent.step(1)
    for how, changes, error, said in (
            (dict(keep_optimizer=True), dict(optimizer="sophia"), ConfigError, "optimizer = 'sophia': must be 'adamw'"),
            (dict(keep_optimizer=True), dict(router_bias=False), ConfigError, "router_bias = False: must be True"),
            (dict(init_from=named), dict(tokenizer=other, vocab_size=768), ConfigError, "tokenizer = .*: must be the"),
            (dict(init_from=fresh, keep_optimizer=True), {}, ConfigError, "fresh has not taken a step"),
            ({}, dict(tokenizer=tokenizer_folder, vocab_size=768), ConfigError, "tokenizer = .*: must be the one that"),
            (dict(init_from=parent.path / "nowhere"), {}, StoreError, "nowhere: there is no such directory"),
            (dict(upcycle_from=parent), {}, ConfigError, "init_from and upcycle_from: only one of them"),
            (dict(init_from=None, keep_optimizer=True), {}, ConfigError, "keep_optimizer = True")):
        with pytest.raises(error, match=said):
            create("child", tiny(**changes), **{"init_from": parent, **how})


def test_what_the_same_weights_compute_otherwise_is_said(tiny_run, tiny):
    """Fields that no shape depends on may change, and none does so unheard."""
    parent, said = tiny_run("parent"), []
    changes = dict(norm_eps=1e-3, qk_norm_eps=1e-4, rope_theta=500.0, top_k=2, router_scores="sigmoid",
                   norm_topk_prob=True)
    Run.create(parent.path.parent / "child", tiny(**changes, block_size=16), said.append, init_from=parent).close()
    heard = [line.split(":")[0] for line in said if "compute something else" in line]
    assert heard == [f"{name} = {value!r}" for name, value in changes.items()]


def test_a_router_may_lose_its_bias_and_gain_one(tiny_run, tiny, create):
    """What is left out is said; what is new is zero and changes no logit."""
    parent = tiny_run("parent")
    parent.step(5)
    said = []
    without = Run.create(parent.path.parent / "without", tiny(router_bias=False), said.append, init_from=parent)
    assert any("router_bias = False" in line for line in said) and "blocks.0.mlp.router.bias" not in state(without)
    back = create("back", tiny(), init_from=without)
    assert not state(back)["blocks.0.mlp.router.bias"].any()
    texts = [run.generate("def f", 8, temperature=0).text for run in (without, back)]
    without.close()
    assert texts[0] == texts[1]


# Upcycling

def lively(dense):
    """The run's dense model with branches that matter."""
    with torch.no_grad():
        for name, p in dense._trainer.model.named_parameters():
            if "norm" in name:
                p.mul_(1 + torch.rand(p.shape))
            elif "o_proj" in name or "down" in name:
                p.mul_(40)
    return dense


def outputs(model, tokens):
    controls = RouterControls.constant(1.5, 0.0, 1.0) if model.config.n_experts else None
    with torch.no_grad():
        return model.eval()(tokens, controls=controls).logits_BSV


@pytest.mark.parametrize("changes", [
    dict(top_k=2, norm_topk_prob=True), dict(top_k=4), dict(top_k=3, norm_topk_prob=True, skip_first_n_moe=1),
    dict(top_k=2, norm_topk_prob=True, bias=True, balance="bias"),
])
def test_upcycled_without_noise_computes_what_the_dense_model_did(tiny_run, tiny, create, changes):
    """Wherever a token's weights add up to one, whatever the router picks: logits to 1e-5."""
    dense = lively(tiny_run("dense", n_experts=0, mlp_width=48, bias=changes.get("bias", False)))
    moe = create("moe", tiny(mlp_width=48, **changes), upcycle_from=dense, upcycle_noise=0.0)
    tokens = torch.randint(512, (3, 32))
    torch.testing.assert_close(outputs(moe._trainer.model, tokens), outputs(dense._trainer.model, tokens), atol=1e-5,
                               rtol=1e-5)
    assert len({tuple(p.flatten().tolist()) for p in state(moe)["blocks.1.mlp.experts.w_up"]}) == 1


@pytest.mark.parametrize("changes", [
    dict(top_k=1), dict(top_k=4, router_scores="sigmoid", balance="bias"),
    dict(routing="expert", dropless=False, capacity_factor=1.0, balance="none")])
def test_upcycled_the_dense_branch_is_computed_on_average(tiny_run, tiny, create, changes):
    """Scaled by a token's weights over their mean: within a tenth of the dense branch, biases too, of which p alone
    leaves less than half, and four sigmoids twice as much.
    """
    dense = lively(tiny_run("dense", n_experts=0, mlp_width=48, bias=True))
    with torch.no_grad():
        for name, p in dense._trainer.model.named_parameters():
            if "mlp" in name and name.endswith("bias"):
                p.normal_()
    moe = create("moe", tiny(**changes, bias=True), upcycle_from=dense, upcycle_noise=0.0)
    own, theirs = moe._trainer.model.blocks[0], dense._trainer.model.blocks[0]
    x = torch.randn(1, 3000, 32)
    with torch.no_grad():
        branch, routing = own.mlp(own.mlp_norm(x), RouterControls.constant(1.5, 0.0, 1.0), None, None)
        expected = theirs.mlp(theirs.mlp_norm(x))
    ratio = float((branch * expected).sum() / expected.square().sum())
    weight = float((routing.weights_TK * routing.kept_TK).sum(-1).mean())
    assert abs(weight - 1) > 0.5 and abs(ratio - 1) < 0.1


def test_upcycling_noise_has_its_std_and_comes_from_the_seed(tiny_run, tiny, create):
    """Relative to each matrix; one seed gives the same experts, which differ among themselves."""
    dense = tiny_run("dense", n_experts=0, mlp_width=48)
    moes = [create(f"moe{at}", tiny(top_k=2, norm_topk_prob=True, seed=seed), upcycle_from=dense.path,
                   upcycle_noise=0.1) for at, seed in enumerate((1, 1, 2))]
    up, router = ([state(moe)[f"blocks.0.mlp.{name}"] for moe in moes] for name in ("experts.w_up", "router.weight"))
    assert torch.equal(up[0], up[1]) and not torch.equal(up[0], up[2]) and not torch.equal(up[0][0], up[0][1])
    assert torch.equal(router[0], router[1]) and not torch.equal(router[0], router[2])
    original = state(dense)["blocks.0.mlp.up_proj.weight"].mT
    relative = (up[0] - original).square().mean().sqrt() / original.square().mean().sqrt()
    assert abs(float(relative) - 0.1) < 0.005
    assert moes[0].store.get_meta("parent")["how"] == "upcycle_from"


@pytest.mark.parametrize("of, changes, said", [
    (dict(n_experts=0, mlp_width=64), {}, "expert_width = 48: must be 64"),
    (dict(n_experts=0, mlp="gelu"), {}, "mlp = 'gelu' in .*: must be 'swiglu'"),
    ({}, {}, "must be a dense model"), (dict(n_experts=0, mlp_width=48), dict(n_experts=0), "n_experts = 0"),
])
def test_what_cannot_be_upcycled_is_refused(tiny_run, tiny, create, of, changes, said):
    """By the field, before anything is written."""
    with pytest.raises(ConfigError, match=said):
        create("moe", tiny(**changes), upcycle_from=tiny_run("dense", **of))


def test_a_start_that_is_gone_is_no_fresh_start(tiny_run, tiny, create):
    """Without its file the run refuses to begin anew from random weights."""
    child = create("child", tiny(), init_from=tiny_run("parent"))
    child.close()
    (child.path / "start.safetensors").unlink()
    for file in (child.path / "checkpoints").glob("*"):
        file.unlink()
    again = Run.open(child.path)
    with pytest.raises(RuntimeError, match=r"start.safetensors: cannot be read"):
        again.step(1)
    again.close()
