"""From a config to the data of a run: what a name means, whose vocabulary it is, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from moe_core import Run
from moe_core.config import DataConfig
from moe_core.data import DataError, documents, is_validation, load_tokens, open_data, settled
from moe_core.data.pretrained import load_pretrained
from moe_core.data.source import kind_of
from moe_core.presets import preset


def quiet(line):
    pass


@pytest.mark.parametrize("name, kind", [
    ("stdlib", "embedded"), ("tokens.npy", "array"), ("../data/TRAIN.BIN", "array"), ("c4", "hub"),
    ("HuggingFaceFW/fineweb-edu", "hub"), ("user/data-v1.0", "hub"), ("text.txt", "files"), ("rows.jsonl.gz", "files"),
    ("./c4", "files"), ("~/c4", "files"), ("/c4", "files"), ("a/b/c", "files"), ("data/*", "files"), ("a b", "files"),
    ("data/", "files"), ("C:\\data", "files")])
def test_a_name_is_of_the_hub_only_where_it_cannot_be_a_path(name, kind):
    """One or two words that no file here has; whatever looks like a path is one."""
    assert kind_of(DataConfig(name)) == kind


def test_a_folder_here_goes_before_the_hub(tmp_path, monkeypatch):
    """A folder of that name in the working directory is what is meant."""
    monkeypatch.chdir(tmp_path)
    assert kind_of(DataConfig("allenai/c4")) == "hub"
    (tmp_path / "allenai" / "c4").mkdir(parents=True)
    assert kind_of(DataConfig("allenai/c4")) == "files"


@pytest.mark.parametrize("field, value, name", [
    ("val_data", "v.npy", "stdlib"), ("split", "foo", "stdlib"), ("dataset_config", "en", "a.npy"),
    ("val_data", "v.npy", "c4")])
def test_what_these_data_have_no_use_for_is_refused(field, value, name):
    """A field that only another kind of data reads, where it was set: one line with the field and its default."""
    config = preset("nano", dataset_name=name, tokenizer="gpt2").replace(**{field: value})
    with pytest.raises(DataError, match=f"^{field} = '{value}': must be .* for dataset_name = '{name}', which is not"):
        settled(config, quiet)


def test_vocabulary_follows_the_tokenizer(tokenizer_folder):
    """Padded to 128 where nobody chose it or chose the tokenizer's own; kept where there is room; said; once."""
    for config in (preset("nano"), preset("moe-203m"), preset("nano", vocab_size=700)):
        said, config = [], config.replace(tokenizer=tokenizer_folder)
        follows = settled(config, said.append)
        assert follows == config.replace(vocab_size=768) and len(said) == 1 and "vocab_size = 768" in said[0]
        assert settled(follows, said.append) == follows and len(said) == 1
    for config in (preset("nano"), preset("nano", vocab_size=900, tokenizer=tokenizer_folder)):
        assert settled(config, said.append) == config and len(said) == 1
    with pytest.raises(DataError, match=r"^vocab_size = 699: must be at least the 700 tokens of tokenizer = .*768"):
        settled(preset("nano", vocab_size=699, tokenizer=tokenizer_folder), quiet)


def test_a_run_keeps_the_vocabulary_that_its_tokenizer_asked_for(tiny_run, tokenizer_folder):
    """The config in the run's directory says it, the model has it, and the ids stay below the padding."""
    run = tiny_run(tokenizer=tokenizer_folder, vocab_size=4096)
    run.step(1)
    assert run.config.model.vocab_size == run.store.config["model"]["vocab_size"] == 768
    data = open_data(run.config, False, quiet)
    assert (data.vocab_size, data.end_of_text) == (700, 0)
    assert max(int(batch.max()) for batch in [data.train.next(), *data.validation]) < 700


def test_local_text_through_a_tokenizer_by_name(corpus, make_tokenizer):
    """Its documents come back whole, ended by its own mark; other content of the tokenizer is another cache."""
    keys = set()
    for changes, end, size in (({}, 0, 700), ({"eos_token": "<end>"}, 700, 701)):
        tokenizer = load_pretrained(make_tokenizer(**changes))
        tokens = load_tokens(DataConfig(str(corpus)), 512, quiet, tokenizer)
        keys.add(tokens.key)
        assert tokens.end_of_text == end == tokens.train[-1] and tokens.vocab_size == size
        texts = [text for text in documents(DataConfig(str(corpus))) if not is_validation(text, 0.05)]
        whole = "".join(text + tokenizer.backend.id_to_token(end) for text in texts)
        assert tokenizer.backend.decode(tokens.train.tolist(), skip_special_tokens=False) == whole
        assert np.array_equal(load_tokens(DataConfig(str(corpus)), 512, pytest.fail, tokenizer).train, tokens.train)
    assert len(keys) == 2


def test_a_tokenizer_never_cuts_pads_or_decorates(make_tokenizer, tmp_path):
    """What its file asks for there is for other uses: a document's ids are those of its text, and no more."""
    from tokenizers import Tokenizer, processors

    folder = make_tokenizer()
    file = f"{folder}/tokenizer.json"
    backend = Tokenizer.from_file(file)
    plain = backend.encode("a text of several words").ids
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    backend.save(file)
    found = load_pretrained(folder)
    assert found.backend.encode("a text of several words", add_special_tokens=False).ids == plain



BAD = {
    "unknown tokenizer": (lambda f, t: dict(tokenizer="nobody/none"), "tokenizer", "cannot be loaded"),
    "folder without one": (lambda f, t: dict(tokenizer=str(t)), "tokenizer", "cannot be loaded"),
    "no end of text": (lambda f, t: dict(tokenizer=f(eos_token=None)), "tokenizer", "end-of-text"),
    "stream without one": (lambda f, t: dict(dataset_name="c4"), "dataset_name", "needs a tokenizer by name"),
    "mistyped path": (lambda f, t: dict(dataset_name=f"{t}/non", tokenizer=f()), "dataset_name", "no such file"),
    "unknown data set": (lambda f, t: dict(dataset_name="corpsu", tokenizer=f()), "dataset_name", "no such file"),
}


@pytest.mark.parametrize("change, field, hint", BAD.values(), ids=BAD)
def test_what_cannot_be_had_is_refused_in_one_line(tiny, make_tokenizer, tmp_path, monkeypatch, change, field, hint):
    """Offline, at once, and the line names the field and what is wrong or would be right."""
    monkeypatch.setattr("moe_core.data.hub.WAITS", (60,))
    with pytest.raises(DataError) as refused:
        config = tiny(vocab_size=4096, **change(make_tokenizer, tmp_path))
        open_data(settled(config, quiet), False, quiet)
    line = str(refused.value)
    assert line.startswith(f"{field} = ") and hint in line and "\n" not in line


def test_a_tokenizer_changed_behind_a_run_is_refused(tiny, make_tokenizer):
    """A folder that holds more tokens now than the model has rows."""
    folder = make_tokenizer()
    config = settled(tiny(tokenizer=folder, vocab_size=4096), quiet)
    shutil.copytree(make_tokenizer(additional_special_tokens=[f"<{i}>" for i in range(99)]), folder, dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"^vocab_size = 768: must be at least the 799 tokens"):
        open_data(config, False, quiet)


@pytest.mark.parametrize("name", ["rows.jsonl", "ids.npy"])
def test_other_training_data_under_the_same_name_are_said_once(tiny, tmp_path, name, capsys):
    """An alert and a line where a run that is opened again goes on with them; none for the same in a newer file."""
    file, words = tmp_path / name, [b.decode("latin-1") for b in np.random.default_rng(7).bytes(400).split(b"a")]

    def write(seed):
        rng = np.random.default_rng(seed)
        if name == "ids.npy":
            return np.save(file, rng.integers(0, 512, 9000).astype(np.uint16))
        file.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 80))}) + "\n" for _ in range(60)))

    write(0)
    Run.create(tmp_path / "run", tiny(dataset_name=str(file), vocab_size=512), say=quiet).close()
    for step, seed, alerts in ((1, 0, 0), (2, 1, 1), (3, 1, 1)):
        write(seed)
        run = Run.open(tmp_path / "run")
        if step == 2:
            run.rewind(1)  # some go back first
        run.step(1)
        texts = run.events().query("kind == 'alert'")["text"].tolist() if len(run.events()) else []
        run.close()
        changed = "the training data is not what it was up to step 1"
        assert len([text for text in texts if text.startswith(changed)]) == alerts
        assert (changed in capsys.readouterr().out) == (step == 2)


def test_one_way_in_gives_the_same_batches_as_its_parts(tiny):
    """Without a tokenizer by name nothing changed: the local corpus, its own vocabulary, in the same order."""
    from moe_core.data import Batches

    config = tiny()
    data, tokens = open_data(config, False, quiet), load_tokens(config.data, 512, quiet)
    assert torch.equal(data.train.next(), Batches(tokens.train, 32, 4, config.seed).next())
    assert data.tokenizer == str(tokens.tokenizer_path) and (data.vocab_size, data.end_of_text) == (512, 0)
