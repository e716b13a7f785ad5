"""To Hugging Face and back: what plain transformers loads computes the same, and comes back to the bit."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
)

from moe_core import ConfigError, Run
from moe_core.export import ExportError
from moe_core.hf import folder as hf
from moe_core.hf import forms
from moe_core.model import RouterControls, Transformer

FORMS = {
    "mixtral": dict(qk_norm=False, attn_gate="none", top_k=2, norm_topk_prob=True, n_kv_heads=1),
    "qwen3_moe": dict(attn_gate="none", top_k=2, skip_first_n_moe=1, mlp_width=40),
    "qwen3_next": dict(dropless=False, capacity_factor=1.0),
}


@pytest.fixture
def trained(tiny_run):
    """Makes runs of a form, of a few steps, at a temperature of 1.3, with weights far from where they began, and with
    numbers that ``transformers`` does not have of itself.
    """
    def make(form, name="run", **changes):
        run = tiny_run(name, router_bias=False, norm_eps=1e-3, qk_norm_eps=1e-3, rope_theta=500.0,
                       **{**FORMS[form], **changes})
        run.knobs["router_temp"].hold(1.3)
        run.step(3)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, p in run._trainer.model.named_parameters():
                if "norm" in name:  # also where 1 + w in float32 is not exact
                    p.copy_(torch.rand(p.shape, generator=generator) * 2 + 0.01)
                elif "o_proj" in name or "down" in name:
                    p.mul_(40)
                elif "embed" in name:
                    p.mul_(4)
        return run
    return make


@pytest.fixture
def create(tmp_path):
    made = []

    def make(name, config, say=lambda line: None, **how):
        made.append(Run.create(tmp_path / name, config, say, **how))
        return made[-1]
    yield make
    for run in made:
        run.close()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokens():
    return torch.randint(512, (3, 30), generator=torch.Generator().manual_seed(1))


HELD = [*(pytest.param(form, {}, id=form) for form in FORMS),
        pytest.param("qwen3_next", {"n_shared_experts": 2}, id="qwen3_next, shared experts")]


@pytest.mark.parametrize("form, more", [*HELD, pytest.param("mixtral", {"n_mtp": 1}, id="mixtral, tokens further on")])
def test_plain_transformers_computes_the_same(trained, tmp_path, form, more):
    """A class of its own, logits to 1e-5 with the router's temperature taken in, and a tokenizer that reads alike."""
    run = trained(form, **more)
    folder = run.export_hf(tmp_path / "out")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == form and type(model).__module__.startswith("transformers.models.")
    ours = run._trainer.model.eval()
    with torch.no_grad():
        expected = ours(tokens(), controls=RouterControls.constant(1.3, 0.0, 100.0)).logits_BSV
        actual = model(tokens()).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    text = "def f(self, **é):\n\treturn 1"
    assert tokenizer(text, add_special_tokens=False).input_ids == run.generate(text, 1).token_ids[:-1].tolist()
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id == 0
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 32
    assert model.config.router_aux_loss_coef == run.config.router.load_balance_alpha
    assert not any("mtp" in name for name in load_file(folder / hf.OWN))
    if form != "qwen3_next":  # which has a shared expert whether it is used or not
        assert f"{model.num_parameters():,} parameters" in (folder / "README.md").read_text()


@pytest.mark.parametrize("form, more", HELD)
def test_a_run_comes_back_to_the_bit(trained, create, tmp_path, form, more):
    """Every weight of a run that begins with the folder, norms and tempered routers too; and what it writes."""
    run = trained(form, **more)
    folder = run.export_hf(tmp_path / "out")
    said = []
    back = create("back", run.config.replace(router_temp_init=1.3, router_temp_anneal_iters=0, router_temp_final=1.3),
                  said.append, init_from_hf=folder)
    before, now = run._trainer.model.state_dict(), back._trainer.model.state_dict()
    assert before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in before)
    assert not any("router_temp" in line or "changed" in line for line in said)
    assert back.generate("import ", 10, temperature=0).text == run.generate("import ", 10, temperature=0).text
    assert back.store.get_meta("parent") == {"path": str(folder), "step": None, "how": "init_from_hf"}
    back.step(1)


def test_a_shared_expert_behind_a_gate_that_does_something_is_refused(tiny):
    """Half of it passes where the gate's weight is 0, which is exact; any other gate is none of ours."""
    config = tiny(**FORMS["qwen3_next"], n_shared_experts=1, router_bias=False)
    state = Transformer(config.model, config.router, seed=1).state_dict()
    theirs = forms.to_hf(state, config.model, "qwen3_next", temp=1.0)
    back = forms.from_hf(theirs, config.model, "qwen3_next")
    shared = [name for name in state if ".shared." in name]
    assert len(shared) == 6 and all(torch.equal(back[name], state[name]) for name in shared)
    theirs["model.layers.1.mlp.shared_expert_gate.weight"][0, 3] = 0.1
    with pytest.raises(ConfigError, match="gate of the shared expert of layer 1 in the folder: must be zero"):
        forms.from_hf(theirs, config.model, "qwen3_next")
    config = config.replace(n_shared_experts=0)
    with pytest.raises(ConfigError, match="shared expert of layer 0 in the folder: must be zero"):
        forms.from_hf(theirs, config.model, "qwen3_next")


@pytest.mark.parametrize("kind, fields", [
    (MixtralForCausalLM, dict(intermediate_size=48, num_local_experts=4)),
    (Qwen3MoeForCausalLM, dict(moe_intermediate_size=48, num_experts=4)),  # whose head_dim need not be said
])
def test_a_folder_of_transformers_goes_in_and_out_to_the_bit(tiny, create, tmp_path, tokenizer_folder, kind, fields):
    """A model that transformers made and saved: every tensor of the export is its own again. Its vocabulary stays as
    large as it is, though its tokenizer, which a config may also name, would have one padded.
    """
    made = kind(kind.config_class(
        vocab_size=700, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_experts_per_tok=2, tie_word_embeddings=True, max_position_embeddings=32, **fields)).float()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    made.save_pretrained(tmp_path / "in")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "in")
    config = tiny().replace(**hf.fields(tmp_path / "in"))
    router = config.router
    assert (config.model.router_bias, router.router_temp_init, router.router_temp_final) == (False, 1.0, 1.0)
    run = create("run", config, init_from_hf=tmp_path / "in")
    again = load(run.export_hf(tmp_path / "out")).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in made.state_dict().items())
    for its, how in ((run.config, {"init_from": run}),
                     (config.replace(tokenizer=str(tmp_path / "in")), {"init_from_hf": tmp_path / "in"})):
        child = create(*how, its, **how)
        assert torch.equal(child._trainer.model.embed.weight, run._trainer.model.embed.weight)


def test_a_fresh_process_with_plain_transformers_writes_the_same_text(trained, tmp_path):
    """Greedy, from the folder alone, in a Python that has never heard of moe_core."""
    run = trained("qwen3_next")
    folder, prompt = run.export_hf(tmp_path / "out"), "class Reader:\n    def "
    script = """
        import sys, torch
        sys.modules["moe_core"] = None
        from transformers import AutoModelForCausalLM, AutoTokenizer
        torch.set_num_threads(1)
        model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
        ids = tokenizer(sys.argv[2], return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0]
        sys.stdout.buffer.write(tokenizer.decode(out, skip_special_tokens=True).encode())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(folder), prompt], capture_output=True,
                          cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == run.generate(prompt, 12, temperature=0).text


def test_a_tokenizer_given_by_name_travels_along(tiny_run, tiny, create, tokenizer_folder, tmp_path):
    """Into the folder, and into the run that begins with it on data of its own: the same ids for the same text."""
    run = tiny_run(tokenizer=tokenizer_folder, vocab_size=768, router_bias=False)
    folder, text = run.export_hf(tmp_path / "out"), "import os\n\n\nclass Thé(object): pass"
    ids = AutoTokenizer.from_pretrained(tokenizer_folder)(text, add_special_tokens=False).input_ids
    assert AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids == ids
    back = create("back", tiny(vocab_size=768, router_bias=False), init_from_hf=folder)
    assert back.generate(text, 1).token_ids[:-1].tolist() == ids
    child = create("child", tiny(vocab_size=768, router_bias=False, val_fraction=0.1), init_from=run)
    assert child.generate(text, 1).token_ids[:-1].tolist() == ids


def test_weights_that_changed_after_the_export_are_taken_as_they_are(trained, create, tmp_path):
    """What was kept for exactness is not believed any more, and this is said."""
    run = trained("qwen3_moe")
    folder = run.export_hf(tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    gate = next(name for name in stored if name.endswith("mlp.gate.weight"))
    stored[gate] = stored[gate] * 2
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said = []
    back = create("back", run.config, said.append, init_from_hf=folder)
    assert any("changed" in line for line in said) and any("router_temp = 1.5: at 1" in line for line in said)
    assert torch.equal(back._trainer.model.state_dict()["blocks.1.mlp.router.weight"], stored[gate])


def test_a_large_model_is_in_several_files(trained, tmp_path, monkeypatch):
    """Shards with their index; what loads from them is the same."""
    run = trained("qwen3_next")
    whole = load(run.export_hf(tmp_path / "one")).state_dict()
    monkeypatch.setattr(hf, "SHARD", "100KB")
    folder = run.export_hf(tmp_path / "many")
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").exists()
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # who may read one may read all
    parts = load(folder).state_dict()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_card_says_what_the_store_knows(trained, tmp_path, monkeypatch):
    """Steps, tokens, both losses, the routing's numbers and the run's findings at the step that is exported; no path of
    this machine.
    """
    read, asked = hf.card.health.read, []
    monkeypatch.setattr(hf.card.health, "read", lambda *what: asked.append(what[2]) or read(*what))
    run = trained("qwen3_next", eval_interval=2)
    run.checkpoint("early")
    run.step(8)
    card = (run.export_hf(tmp_path / "out") / "README.md").read_text()
    rows = run.metrics()
    assert card.startswith("---\nlibrary_name: transformers\n") and "| steps | 11 |" in card
    assert f"| tokens seen | {11 * 4 * 32:,} |" in card
    assert f"| train/ce | {rows['train/ce'].iloc[-1]:.4f} (step 11) |" in card
    assert f"| val/loss | {rows['val/loss'].loc[10]:.4f} (step 10) |" in card
    assert f"{rows['router/entropy_mean'].iloc[-1]:.4g}" in card and "temperature of 1.3" in card
    assert all(finding.level in card for finding in run.health())
    assert str(tmp_path) not in card and str(run.config.data.dataset_name) not in card
    early = (run.export_hf(tmp_path / "early", step="early") / "README.md").read_text()
    assert "| steps | 3 |" in early and f"{rows['val/loss'].loc[2]:.4f} (step 2)" in early
    assert asked[0] == 11 and asked[-1] == 3


@pytest.mark.parametrize("changes, said", [
    (dict(use_rope=False), "use_rope = False"), (dict(n_experts=0), "n_experts = 0"), (dict(bias=True), "bias = True"),
    (dict(qk_norm=False), "attn_gate = 'sigmoid_head'"), (dict(qk_norm_eps=1e-3), "qk_norm_eps = 0.001"),
    (dict(qk_norm=False, attn_gate="none"), "norm_topk_prob = False"),
    (dict(n_shared_experts=1, attn_gate="none"), "n_shared_experts = 1"),
    (dict(routing="expert", dropless=False, balance="none"), "routing = 'expert'"),
    (dict(router_scores="sigmoid"), "router_scores = 'sigmoid'"),
    (dict(FORMS["mixtral"], skip_first_n_moe=1), "skip_first_n_moe = 1"),
    (dict(skip_first_n_moe=1, mlp="gelu"), "mlp = 'gelu'"),
    (dict(router_bias=True), r"router_bias = True: .*blocks\.0\.mlp\.router\.bias"),
    (dict(balance="bias"), "balance bias: no Hugging Face form"),
])
def test_what_no_form_holds_is_refused_by_name(tiny_run, tmp_path, changes, said):
    """And nothing is left behind."""
    run = tiny_run(**{"router_bias": False, **changes})
    run.step(1)
    with pytest.raises(ConfigError, match=said):
        run.export_hf(tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_folder_that_is_there_stays_as_it_is(trained, tmp_path, monkeypatch):
    """It is refused, whatever it holds; and of one that a full disk refuses nothing stays."""
    run = trained("qwen3_next")
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(ExportError, match="out: not written: No space left on device"):
        patch.setattr(hf.card, "card", lambda *about: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        run.export_hf(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=r"out: exists already"):
        run.export_hf(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind, name, value", [
    (Qwen3MoeConfig, "attention_bias", True), (Qwen3MoeConfig, "decoder_sparse_step", 2),
    (Qwen3MoeConfig, "mlp_only_layers", [1]), (Qwen3MoeConfig, "head_dim", 32),
    (Qwen3NextConfig, "layer_types", ["full_attention", "linear_attention"]),
    (Qwen3NextConfig, "rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25})])
def test_what_a_model_of_ours_cannot_do_is_refused_by_its_field(kind, name, value):
    """And the same configuration without it is taken."""
    plain = dict(hidden_size=64, num_attention_heads=4, head_dim=16, num_hidden_layers=2, tie_word_embeddings=True)
    if kind is Qwen3NextConfig:
        plain |= dict(layer_types=["full_attention"] * 2, rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0})
    assert forms.fields_of(kind(**plain))["d_model"] == 64
    with pytest.raises(ConfigError, match=f"^{'partial_rotary_factor' if 'rope' in name else name} = .* in the folder"):
        forms.fields_of(kind(**plain | {name: value}))


@pytest.mark.parametrize("key, value, said", [
    ("tie_word_embeddings", False, "tie_word_embeddings = False"), ("sliding_window", 16, "sliding_window = 16"),
    ("hidden_act", "gelu", "hidden_act = 'gelu'"), ("rope_parameters", {"rope_type": "linear", "factor": 2.0,
                                                                       "rope_theta": 1e4}, "rope_type = 'linear'"),
    ("model_type", "llama", "model_type = 'llama'"), ("num_experts_per_tok", 3, "top_k = 2: must be 3"),
    ("num_hidden_layers", 3, "n_layer = 2: must be 3"), ("num_attention_heads", 0, "out': cannot be loaded"),
])
def test_a_folder_that_is_no_model_of_ours_is_refused_by_its_field(trained, create, tmp_path, key, value, said):
    """Before its weights are read, and before anything is written."""
    run = trained("mixtral")
    folder = run.export_hf(tmp_path / "out")
    theirs = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(theirs))
    (folder / hf.OWN).unlink()
    with pytest.raises(ConfigError, match=said):
        create("back", run.config, init_from_hf=folder)
    assert not (tmp_path / "back").exists()
