"""Streams: real files read through `datasets` as those of the hub are, with connections that drop."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_core import Run, checkpoint
from moe_core.config import DataConfig
from moe_core.data import DataError, documents, is_validation, load_tokens, open_data, settled, validation_batches
from moe_core.data.hub import Documents, is_dropped, open_hub, validation_tokens
from moe_core.data.pretrained import load_pretrained, of_backend
from moe_core.data.stream import Stream
from moe_core.data.tokenise import joined

B, S, VAL = 3, 16, 0.2


def quiet(line):
    pass


@pytest.fixture(scope="module")
def pretrained(tokenizer_folder):
    return load_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def texts(corpus):
    """A hundred short real documents in a random order; some on either side."""
    cut = [text[i : i + 300] for text in documents(DataConfig(str(corpus))) for i in range(0, len(text), 3000)]
    picked = [cut[i] for i in np.random.default_rng().permutation(len(cut))[:100]]
    assert 5 < sum(is_validation(text, VAL) for text in picked) < 50
    return picked


@pytest.fixture
def rows(texts, tmp_path, monkeypatch):
    """Opens three files of the documents as a stream; ``failing(n)`` is asked before each row."""
    import datasets

    monkeypatch.setattr("moe_core.data.hub.ROWS", 7)  # many places to drop at
    monkeypatch.setattr("moe_core.data.hub.WAITS", (0.01, 0.02, 0.04))
    files = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text("".join(json.dumps({"id": j, "text": text}) + "\n" for j, text in enumerate(texts[i::3])))

    def generate(files, drops):
        for file in files:
            for row in datasets.load_dataset("json", data_files=file, split="train", streaming=True,
                                             cache_dir=str(tmp_path / "unused")):
                if drops and drops.pop(0):
                    raise ConnectionError("peer reset")
                yield row

    class Pops(list):
        """Not copied or hashed by `datasets`: the drops of one stream, wherever it is opened again."""
        def __deepcopy__(self, memo):
            return self

        def __reduce__(self):
            return str, ("drops",)

    def make(drops=()):
        drops = Pops(drops)

        def opened():
            if drops and drops[0] == "open":
                del drops[0]
                raise TimeoutError("no answer")
            # One shard a file, as on the hub.
            return datasets.IterableDataset.from_generator(
                lambda files: generate(files, drops), gen_kwargs={"files": [str(file) for file in files]})
        return opened
    return make


@pytest.fixture
def stream(rows, pretrained):
    """Makes streams on those files and closes them."""
    made = []

    def make(drops=(), opened=None, say=quiet, **changes):
        fields = dict(block_size=S, batch_size=B, shuffle_buffer=50, seed=3, val_fraction=VAL, say=say)
        source = Documents(opened or rows(drops), "dataset_name = 'x'", "text", say)
        made.append(Stream(source, pretrained, **{**fields, **changes}))
        return made[-1]
    yield make
    for one in made:
        one.close()


def ids(pretrained, texts):
    return joined(pretrained.backend, [[text] for text in texts], pretrained.end_of_text, np.int64)


def in_order(texts):
    """As the files hold them."""
    return [text for i in range(3) for text in texts[i::3] if text.strip()]


def test_unshuffled_windows_are_the_training_documents_joined(stream, texts, pretrained, monkeypatch):
    """Every token of every training document in order, none of validation, over an epoch's end too; and the same text
    of documents that are too long to tokenise at once.
    """
    tokens = ids(pretrained, [text for text in in_order(texts) if not is_validation(text, VAL)])
    one, whole = stream(shuffle_buffer=1), len(tokens) // (S + 1)
    taken = torch.cat([one.next() for _ in range(whole // B + 1)]).flatten().numpy()
    assert np.array_equal(taken[: whole * (S + 1)], tokens[: whole * (S + 1)])
    # What is left of an epoch opens the next one.
    rest = tokens[whole * (S + 1) :]
    assert np.array_equal(taken[whole * (S + 1) :][: len(rest)], rest[: len(taken) - whole * (S + 1)])
    monkeypatch.setattr("moe_core.data.batches.ENCODE_CHARS", 100)
    cut = stream(shuffle_buffer=1)
    taken = torch.cat([cut.next() for _ in range(whole // B - 5)]).flatten().numpy()
    said, expected = (pretrained.backend.decode(some, skip_special_tokens=False) for some in (taken, tokens))
    assert not np.array_equal(taken, tokens[: len(taken)]) and expected.startswith(said.rstrip("\ufffd"))


def test_windows_are_shuffled_within_the_buffer_and_none_is_lost(stream, texts, pretrained):
    """Each buffer is the same windows as unshuffled in an order of its own, and the seed's; an epoch's last one is what
    is left of it.
    """
    plain, mixed, again, other = stream(shuffle_buffer=1), stream(), stream(), stream(seed=4)
    whole = len(ids(pretrained, [text for text in in_order(texts) if not is_validation(text, VAL)])) // (S + 1)
    windows = [np.concatenate([one.next().numpy() for _ in range(whole // B + 1)])
               for one in (plain, mixed, again, other)]
    orders = set()
    for start in (0, 50, 100):
        was, *now = (list(map(tuple, taken[start : start + 50])) for taken in windows)
        assert all(sorted(was) == sorted(taken) and was != taken for taken in now)
        assert now[0] == now[1] != now[2]
        orders.add(tuple(map(was.index, now[0])))
    assert len(orders) == 3
    assert len({tuple(sorted(map(tuple, taken[:whole]))) for taken in windows}) == 1


def test_stream_resumes_at_the_exact_next_window_from_any_batch(stream, tmp_path):
    """Through a checkpoint on disk, into a fresh stream, over buffers and epochs; an old state still holds later."""
    one, states, batches = stream(), [], []
    while len(states) < 60 or states[-40]["place"]["epoch"] < 1:
        states.append(one.state_dict())
        batches.append(one.next())
    for at in [0, 1, *np.random.default_rng().integers(2, len(states) - 30, 5), len(states) - 35]:
        checkpoint.save(tmp_path / "state.safetensors", states[at], {})
        for resumed in (stream(), one):
            resumed.load_state_dict(checkpoint.load(tmp_path / "state.safetensors"))
            assert all(torch.equal(resumed.next(), batch) for batch in batches[at : at + 30])


def test_stream_resumes_exactly_where_a_chunk_holds_many_buffers(stream):
    """From every batch of an epoch and past its end: what a state has left over may be several whole buffers."""
    one, states, batches = stream(shuffle_buffer=4), [], []
    while not states or states[-1]["place"]["epoch"] < 1:
        states.append(one.state_dict())
        batches.append(one.next())
    batches += [one.next() for _ in range(12)]
    assert max(len(state["place"]["left"]) for state in states if state["place"]["number"]) > 2 * 4 * (S + 1)
    resumed = stream(shuffle_buffer=4)
    for at, state in enumerate(states):
        resumed.load_state_dict(state)
        assert all(torch.equal(resumed.next(), batch) for batch in batches[at : at + 12])


def test_state_costs_nothing_and_holds_no_more_than_the_windows_to_come(stream):
    """It shares the buffer, which nothing writes to: the same whenever it is looked at, smaller with every batch."""
    one = stream()
    one.next()
    state = one.state_dict()
    before = state["windows"].clone()
    assert one.state_dict()["windows"].data_ptr() == state["windows"].data_ptr()
    assert state["windows"].shape == (50 - B, S + 1) and state["windows"].dtype == torch.uint16
    for _ in range(60):
        one.next()
    assert torch.equal(state["windows"], before)


@pytest.mark.parametrize("drops, waits", [
    ([0] * 20 + [1, 1], [1, 2]), ([0] * 9 + [1, "open", "open"], [1, 2, 4]), (([1] + [0] * 70) * 4, [1] * 4)])
def test_dropped_connection_is_taken_up_at_the_same_document(stream, drops, waits):
    """Twice in a row, while opening again, more often than there are tries in a row: the batches are those of a stream
    that never dropped.
    """
    said = []
    shaky, calm = stream(drops, say=said.append), stream()
    dropped, since = [], 0
    while len(dropped) < len(waits) or since < 60:  # and on with what was read after the last one
        assert torch.equal(shaky.next(), calm.next())
        since = since + 1 if len(dropped) == len(waits) else 0
        dropped = [line for line in said if "dropped" in line]
    assert len(dropped) == len(waits) and "retrying in 0.01 s (1 of 3)" in dropped[0]
    assert all(f"retrying in 0.0{wait} s" in line for line, wait in zip(dropped, waits, strict=True))


def test_what_may_pass_is_tried_again_and_what_will_not_is_not():
    """A busy server and a connection that broke, also as the cause of something; no refusal, no file that is not there,
    and nothing where there is to be no network.
    """
    def answer(status):
        error = RuntimeError("the server said so")
        error.response = types.SimpleNamespace(status_code=status)
        return error

    caused = RuntimeError("no rows")
    caused.__cause__ = TimeoutError()
    assert all(map(is_dropped, [*map(answer, (408, 429, 500, 503)), caused, OSError("reset"), EOFError()]))
    assert not any(map(is_dropped, [*map(answer, (401, 403, 404)), RuntimeError("x"), FileNotFoundError("x"),
                                    PermissionError("x"), ConnectionError("OfflineModeIsEnabled")]))


def test_connection_that_stays_gone_is_one_error_and_the_run_goes_on_from_there(stream, rows):
    """After the last try next() says so in one line; asked again, when it works again, not a window is missing."""
    calm, drops = stream(), [0] * 60 + [1] * 40
    gone = stream(drops)
    batches = [calm.next() for _ in range(200)]
    taken, errors = [], []
    while len(taken) < 200:
        try:
            taken.append(gone.next())
        except DataError as error:
            errors.append(str(error))
    assert all(map(torch.equal, taken, batches))
    assert len(errors) >= 2 and all("\n" not in line and "connection is gone (peer reset)" in line for line in errors)


def test_run_on_a_stream_pauses_when_it_is_gone_and_resumes_bit_exact(
        tiny, rows, tokenizer_folder, tmp_path, monkeypatch):
    """An outage, the run closed and opened again: the losses and weights are as without it, also when taken again."""
    drops = [0] * 30 + [1] * 8
    config = tiny(dataset_name="some/data", tokenizer=tokenizer_folder, vocab_size=4096, shuffle_buffer=40,
                  block_size=S, val_fraction=VAL, eval_take=9, eval_interval=4)
    calm, shaky = rows(), rows(drops)
    trained = []
    for name, opened in (("calm", calm), ("shaky", shaky)):
        monkeypatch.setattr("moe_core.data.source.open_hub", lambda data, split, opened=opened: opened())
        run = Run.create(tmp_path / name, config, say=quiet)
        while run.current_step < 40:
            try:
                run.step(4)
            except DataError as error:
                assert "connection is gone" in str(error) and run.session.state == "failed"
                run.close()
                run = Run.open(tmp_path / name)
        trained.append((run._trainer.state_dict()["model"], run.metrics()["train/ce"].tolist()))
        assert (run.events().kind == "error").any() == (name == "shaky")
        run.undo()
        run.rewind(17)  # takes steps again, and would say where one did not repeat
        run.step(1)
        assert not (run.events().kind == "alert").any()
        run.close()
    assert trained[0][1] == trained[1][1]
    assert all(torch.equal(trained[0][0][name], trained[1][0][name]) for name in trained[0][0])


def test_workers_give_the_same_batches_and_one_that_dies_loses_none(stream):
    """Two processes that tokenise; killed, each is an error at most, then new ones go on where the batches were."""
    calm, workers = stream(), stream(num_workers=2)
    assert all(torch.equal(workers.next(), calm.next()) for _ in range(40))
    for process in workers._tokenisers._processes:
        process._running.kill()
    errors = got = 0
    while got < 150:
        try:
            batch = workers.next()
        except DataError as error:
            errors += 1
            assert "num_workers" in str(error) and errors <= 2  # one for each process
            continue
        assert torch.equal(batch, calm.next())
        got += 1
    running = [process._running for process in workers._tokenisers._processes if process._running]
    workers.close()
    assert running and all(process.poll() is not None for process in running)


def test_closed_or_forgotten_stream_leaves_no_thread(stream, rows, pretrained):
    """Neither its reader nor those that tokenise outlive it, also where it was waiting out a dropped connection."""
    def ours():
        return {thread for thread in threading.enumerate() if thread.name.startswith("moe-")}

    before = ours()
    forgotten = Stream(Documents(rows(), "x", "text"), pretrained, block_size=S, batch_size=B, shuffle_buffer=9, seed=0)
    forgotten.next()
    closed = stream()
    closed.next()
    assert len(ours() - before) >= 4
    closed.close()
    del forgotten
    deadline = time.time() + 20
    while ours() - before and time.time() < deadline:
        time.sleep(0.01)
    assert not ours() - before


@pytest.mark.parametrize("workers", [0, 2])
def test_interpreter_ends_quietly_beside_a_stream_that_nobody_closed(corpus, tokenizer_folder, tmp_path, workers):
    """While the next buffer is being filled: status 0, not a word, and no process left behind."""
    script = f"""
        import datasets
        from moe_core.data.hub import Documents
        from moe_core.data.pretrained import load_pretrained
        from moe_core.data.stream import Stream
        def opened():
            return datasets.load_dataset("text", data_dir={str(corpus)!r}, split="train", streaming=True,
                                         cache_dir={str(tmp_path)!r})
        stream = Stream(Documents(opened, "x", "text"), load_pretrained({tokenizer_folder!r}), block_size=64,
                        batch_size=2, shuffle_buffer=200, seed=0, num_workers={workers}, say=lambda line: None)
        stream.next()
        print(*(process._running.pid for process in stream._tokenisers._processes if process._running))
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout.split()) == bool(workers)
    for pid in done.stdout.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_end_of_the_stream_is_said_once(stream):
    """However many epochs follow."""
    said = []
    one = stream(say=said.append)
    while one.state_dict()["place"]["epoch"] < 4:
        one.next()
    assert len(said) == 1 and "read to its end" in said[0]


def test_each_epoch_has_every_document_in_an_order_of_its_own(rows):
    """The files take turns in being first."""
    source = Documents(rows(), "x", "text", quiet)
    orders = [[text for some, _ in source.read(epoch, None, threading.Event()) for text in some] for epoch in range(4)]
    assert len({tuple(sorted(order)) for order in orders}) == 1 < len({tuple(order) for order in orders})


@pytest.mark.parametrize("val_split", [None, "held-out"])
def test_a_stream_by_its_config_is_that_of_its_parts(stream, tiny, rows, texts, pretrained, tokenizer_folder,
                                                     monkeypatch, val_split):
    """Seed, buffer, splits: with a split for validation all of the other is trained on, else what is not held out."""
    opened = []
    monkeypatch.setattr("moe_core.data.source.open_hub", lambda data, split: opened.append(split) or rows()())
    config = settled(tiny(dataset_name=f"some/{os.urandom(4).hex()}", tokenizer=tokenizer_folder, vocab_size=4096,
                          shuffle_buffer=7, block_size=S, batch_size=B, seed=11, val_fraction=VAL, eval_take=9,
                          val_split=val_split), quiet)
    data = open_data(config, False, quiet)
    parts = stream(shuffle_buffer=7, seed=11, val_fraction=None if val_split else VAL)
    assert all(torch.equal(data.train.next(), parts.next()) for _ in range(20))
    data.train.close()
    chosen = [text for text in in_order(texts) if val_split or is_validation(text, VAL)][:9]
    batches = validation_batches(ids(pretrained, chosen), S, B, config.eval_iters)
    assert opened == [val_split or "train", "train"] and all(map(torch.equal, data.validation, batches))


def test_ids_beyond_two_bytes_stay_whole(stream, rows, texts, corpus):
    """Of a vocabulary of more than 65,536: in a stream, through a process too, in its validation, and in the cache."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({".": 3, "[UNK]": 70_000}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    wide, key = of_backend("wide", backend, 66_000), os.urandom(4).hex()
    assert wide.vocab_size == 70_001 and wide.digest != of_backend("wide", backend, 3).digest
    one = Stream(Documents(rows(), "x", "text"), wide, block_size=S, batch_size=B, shuffle_buffer=1, seed=0,
                 num_workers=1)
    expected = ids(wide, in_order(texts))[: 20 * B * (S + 1)]
    taken = torch.cat([one.next() for _ in range(20)]).flatten().numpy()
    one.close()
    assert {3, 66_000, 70_000} <= set(taken) and np.array_equal(taken[: len(expected)], expected)
    data = DataConfig(key, val_fraction=VAL, eval_take=5, val_split="test")
    found = validation_tokens(Documents(rows(), "x", "text", quiet), wide, data, quiet)
    assert np.array_equal(found, ids(wide, in_order(texts)[:5]))
    local = DataConfig(str(corpus), val_fraction=VAL)
    tokens = load_tokens(local, 512, quiet, wide)
    assert np.array_equal(tokens.train, ids(wide, [t for t in documents(local) if not is_validation(t, VAL)]))


def test_validation_documents_are_fixed_and_never_trained_on(rows, texts, pretrained):
    """The first that the hash puts there, or of a split of their own; read once, then the cache's; others where
    anything that they depend on is another.
    """
    source = Documents(rows(), "dataset_name = 'x'", "text", quiet)
    gone = Documents(lambda: pytest.fail("read again"), "dataset_name = 'x'", "text", quiet)
    key = os.urandom(4).hex()
    for data, chosen in (
            (DataConfig(key, val_fraction=VAL, eval_take=5), [t for t in in_order(texts) if is_validation(t, VAL)][:5]),
            (DataConfig(key, val_fraction=VAL, eval_take=5, val_split="test"), in_order(texts)[:5])):
        for documents_ in (source, gone):
            assert np.array_equal(validation_tokens(documents_, pretrained, data, quiet), ids(pretrained, chosen))
    said, data = [], DataConfig(key, val_fraction=VAL, eval_take=5)
    for change in (dict(dataset_config="b"), dict(split="b"), dict(val_fraction=0.3), dict(eval_take=6),
                   dict(text_key="b"), dict(val_split="b")):
        validation_tokens(source, pretrained, replace(data, **change), said.append)
    validation_tokens(source, replace(pretrained, digest="b"), data, said.append)
    assert len(said) == 7


def parquet(path, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return "parquet", path


def lines(path, text):
    path.write_text(text)
    return "json", path


BAD = {
    "no column": (lambda at: parquet(at, words=["a"], id=[1]), "text_key", "'words', 'id'"),
    "no column, rows unknown": (lambda at: lines(at, '{"words": "a"}\n'), "text_key", "'words'"),
    "numbers": (lambda at: parquet(at, text=[1, 2]), "text_key", "holds int"),
    "blank": (lambda at: parquet(at, text=[" ", None, ""]), "dataset_name", "must hold text"),
    "broken": (lambda at: lines(at, '{"text": "a"}\n{"te'), "dataset_name", "cannot be read"),
    "binary": (lambda at: lines(at, "PK\3\4\0\0"), "dataset_name", "cannot be read"),
    "no such file": (lambda at: ("json", at), "dataset_name", "cannot be read"),
}


@pytest.mark.parametrize("make, field, hint", BAD.values(), ids=BAD)
def test_bad_stream_is_refused_at_once_in_one_line(stream, tmp_path, make, field, hint):
    """Trying again would not help: no wait, no new try, and the line names the field and what is wrong."""
    import datasets

    kind, path = make(tmp_path / "data")
    one = stream(say=lambda line: pytest.fail(line) if "try" in line else None, opened=lambda: datasets.load_dataset(
        kind, data_files=str(path), split="train", streaming=True, cache_dir=str(tmp_path / "unused")))
    with pytest.raises(DataError) as refused:
        one.next()
    line = str(refused.value)
    assert line.startswith(f"{field} = ") and hint in line and "\n" not in line


def test_data_set_is_opened_by_its_config_and_split(tmp_path, monkeypatch):
    """As on the hub, from its card; one that it does not have is one line that names those that it has."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "unused")
    (tmp_path / "set").mkdir()
    card = "---\nconfigs:\n"
    for config in ("big", "small"):
        (tmp_path / "set" / f"{config}.jsonl").write_text(json.dumps({"text": config}) + "\n")
        card += f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}.jsonl\n"
    (tmp_path / "set" / "README.md").write_text(card + "---\n")
    data = DataConfig(str(tmp_path / "set"), dataset_config="small")
    assert [row["text"] for row in open_hub(data, "train")] == ["small"]
    for changed, split, line in (
            (data, "test", r"^split = 'test': must be a split .*\['train'\]"),
            (replace(data, val_split="dev"), "dev", r"^val_split = 'dev': must be a split .*\['train'\]"),
            (replace(data, dataset_config="tiny"), "train", r"^dataset_config = 'tiny': .*\['big', 'small'\]"),
            (replace(data, dataset_config=None), "train", r"^dataset_config = None: .*\['big', 'small'\]")):
        with pytest.raises(DataError, match=line):
            open_hub(replace(changed, split=split if changed.val_split is None else "train"), split)


def test_state_of_another_stream_is_refused(stream, make_tokenizer, rows):
    """Another block size, another content of the tokenizer: one line, instead of other text."""
    state = stream().state_dict()
    with pytest.raises(DataError, match=r"^block_size = 32: the state was saved with block_size = 16"):
        stream(block_size=32).load_state_dict(state)
    other = load_pretrained(make_tokenizer(eos_token="<end>"))
    with pytest.raises(DataError, match=r"^tokenizer = .*content has changed"):
        Stream(Documents(rows(), "x", "text"), other, block_size=S, batch_size=B, shuffle_buffer=9,
               seed=0).load_state_dict(state)
