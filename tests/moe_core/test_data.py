"""From documents to tokens, on the embedded corpus and on small folders of real text."""

import json
import os
import pty
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from moe_core.config import DataConfig
from moe_core.data import (
    DataError,
    documents,
    is_validation,
    load_tokens,
    train_tokenizer,
)

V = 300


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moe-workbench"


@pytest.fixture(scope="module")
def library():
    """The documents of the embedded corpus."""
    return list(documents(DataConfig()))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded corpus as nano reads it, twice, and the lines that were said."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        tokens = load_tokens(DataConfig(), 4096, said.append)
        patch.setattr("moe_core.data.batches.train_tokenizer", None)  # which is not to be called again
        return tokens, load_tokens(DataConfig(), 4096, said.append), said


@pytest.fixture(scope="module")
def docs(library):
    """Sixty short real documents in a random order; some on either side at val_fraction 0.2."""
    short = [text for text in library if len(text) < 4000]
    picked = [short[i] for i in np.random.default_rng(0).permutation(len(short))[:60]]
    assert 0 < sum(is_validation(text, 0.2) for text in picked) < 60
    return picked


def save_text(folder, texts):
    """A file for each document, named to trip a reader that takes names for patterns."""
    folder.mkdir()
    for i, text in enumerate(texts):
        name = f"{i:03d} [draft]{{a,b}}*é" + (".txt", ".py", ".MD")[i % 3]
        (folder / name).write_bytes((b"\xef\xbb\xbf" if i == 3 else b"")
                                    + text.replace("\n", "\r\n" if i == 4 else "\n").encode())
    return folder


def save_jsonl(file, texts, key="text"):
    file.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return file


def save_parquet(file, texts, key="text"):
    pq.write_table(pa.table({"id": range(len(texts)), key: texts}), file, row_group_size=7)
    return file


def save(file, content):
    file.write_bytes(content)
    return file


def config(path, **changes):
    return DataConfig(**{"dataset_name": str(path), "val_fraction": 0.2, **changes})


def load(path, vocab_size=V, say=lambda line: None, **changes):
    return load_tokens(config(path, **changes), vocab_size, say)


def as_documents(data, tokens):
    """The token stream as text again, cut at its end-of-text marks."""
    tokenizer = Tokenizer.from_file(str(data.tokenizer_path))
    stream = tokenizer.decode(tokens.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert stream.pop() == ""  # the last document is ended too
    return stream


def test_embedded_corpus_comes_back_from_its_tokens_document_by_document(embedded, library):
    """Both streams decode to exactly the documents of their side, in order: none lost, none on both."""
    data = embedded[0]
    for tokens, side in ((data.train, False), (data.val, True)):
        assert as_documents(data, tokens) == [text for text in library if is_validation(text, 0.05) is side]
    assert 2e6 < len(data.train) < 4e6 and 3e4 < len(data.val) < 4e5
    assert data.train.dtype == np.uint16 and data.vocab_size == 4096
    assert max(data.train.max(), data.val.max()) < 4096


def test_embedded_corpus_is_prepared_once_and_tells_what_it_does(embedded):
    """First use says two lines; the second trains and writes nothing, and maps the same files in silence."""
    data, again, said = embedded
    assert len(said) == 2 and all("\n" not in line and len(line) < 200 for line in said)
    assert "standard library" in said[0] and f"{len(data.train):,}" in said[1]
    assert again.key == data.key and np.array_equal(again.train, data.train)
    assert isinstance(again.train, np.memmap)


def test_tokenizer_is_that_of_the_training_documents_alone(embedded, library):
    """Training it again on the training side gives the stored one, to the last merge."""
    trained = train_tokenizer([text for text in library if not is_validation(text, 0.05)], 4096)
    assert json.loads(trained.to_str()) == json.loads(embedded[0].tokenizer_path.read_text())


@pytest.mark.parametrize("text", ["naïve 🦀 日本語\r\n\t  x\u00a0\n\n", "".join(map(chr, range(256))), " "])
def test_any_text_survives_the_tokenizer(embedded, text):
    """Byte-level: text that training never saw comes back exactly, without unknown tokens."""
    tokenizer = Tokenizer.from_file(str(embedded[0].tokenizer_path))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_text_jsonl_and_parquet_of_the_same_documents_are_the_same_corpus(docs, tmp_path, cache):
    """A folder, a glob and both row formats give equal documents, hence one key and one folder of tokens."""
    folder = save_text(tmp_path / "text [1]", docs)
    for i, file in enumerate(sorted(folder.iterdir())[:19:-1]):  # z is made before a
        (place := folder / "za"[i >= 20]).mkdir(exist_ok=True)
        file.rename(place / file.name)
    (folder / "ignored.csv").write_text("not,text")
    (folder / ".hidden.txt").write_text("not wanted")
    paths = [folder, save_jsonl(tmp_path / "rows [1].jsonl", docs), save_parquet(tmp_path / "rows [1].parquet", docs)]
    assert [list(documents(config(path))) for path in paths] == [docs] * 3
    assert len({load(path).key for path in paths}) == 1
    assert list(documents(config(tmp_path / "text ?1]" / "**" / "*.py"))) == docs[1::3]
    assert len([path for path in cache.iterdir() if path.name != "stamps"]) == 1


def test_split_is_by_the_document_alone(docs, tmp_path, cache):
    """Sides are disjoint, repeatable, and a document added to training leaves validation as it was."""
    before = load(save_jsonl(tmp_path / "before.jsonl", docs))
    sides = [set(as_documents(before, tokens)) for tokens in (before.train, before.val)]
    assert sides[0].isdisjoint(sides[1]) and sides[0] | sides[1] == set(docs)
    extra = next(f"# {i}\n" for i in range(99) if not is_validation(f"# {i}\n", 0.2))
    after = load(save_jsonl(tmp_path / "after.jsonl", [*docs[:30], extra, *docs[30:]]))
    assert as_documents(after, after.val) == as_documents(before, before.val)
    assert set(as_documents(after, after.train)) == sides[0] | {extra}


def test_split_takes_about_the_fraction_asked_and_grows_with_it(library):
    """The same documents in every process, on any machine; a larger fraction keeps those of a smaller one."""
    assert [i for i in range(40) if is_validation(f"document {i}", 0.1)] == [2, 10, 17, 37]
    texts = [f"{i} {text[:50]}" for i, text in enumerate(library * 5)]
    small, large = ({text for text in texts if is_validation(text, f)} for f in (0.05, 0.3))
    assert small < large
    for chosen, f in ((small, 0.05), (large, 0.3)):
        assert abs(len(chosen) - f * len(texts)) < 5 * (f * (1 - f) * len(texts)) ** 0.5


def test_key_changes_with_settings_and_content_and_with_nothing_else(docs, tmp_path, cache):
    """Another vocabulary, fraction, or character: another key. Touched or moved files: the same key."""
    folder = save_text(tmp_path / "text", docs)
    first = load(folder)
    keys = {first.key, load(folder, vocab_size=V + 1).key, load(folder, val_fraction=0.21).key}
    file = next(folder.glob("007*"))
    os.utime(file, ns=(1, 1))
    assert load(folder).key == first.key
    moved = folder.rename(tmp_path / "elsewhere")
    assert load(moved).key == first.key
    file = moved / file.name
    file.write_bytes(file.read_bytes()[:-1] + b"~")  # as long as before
    changed = load(moved)
    assert len({*keys, changed.key}) == 4
    texts = as_documents(changed, changed.train) + as_documents(changed, changed.val)
    assert sum(text.endswith("~") for text in texts) == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "other": text.upper()}) + "\n" for text in docs))
    assert load(rows).key != load(rows, text_key="other").key  # of the same file


def test_file_changed_while_the_corpus_is_prepared_is_not_missed(docs, tmp_path, cache):
    """What changes after the files were looked at is in these tokens or the next; no key names other text."""
    file = save_jsonl(tmp_path / "rows.jsonl", docs)
    load(file, say=lambda line: save_jsonl(file, docs[:50]))
    again = load(file)
    assert sorted(as_documents(again, again.train) + as_documents(again, again.val)) == sorted(docs[:50])
    book = tmp_path / "book.txt"
    book.write_text("\n".join(docs))
    with pytest.raises(DataError, match="must not change while it is read"):
        load(book, say=lambda line: book.write_text("\n".join(docs[:50])) if "cut into" in line else None)


def test_two_processes_prepare_the_same_corpus_at_once(docs, tmp_path, cache):
    """Both miss the cache, both succeed with the same tokens, and nothing half-made stays behind."""
    file = save_parquet(tmp_path / "rows.parquet", docs)
    script = ("import sys; from moe_core.config import DataConfig; from moe_core.data import load_tokens\n"
              "def say(line):\n"
              "    if line.startswith('Preparing'): print(line, flush=True); sys.stdin.readline()\n"
              f"data = load_tokens(DataConfig({str(file)!r}, val_fraction=0.2), {V}, say)\n"
              "print(data.key, len(data.train), len(data.val), int(data.train.sum()))")
    both = [subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True) for _ in range(2)]
    assert all(process.stdout.readline().startswith("Preparing") for process in both)
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and results[0] == results[1]
    assert sorted(path.name for path in cache.iterdir()) == sorted([results[0].split()[0], "stamps"])
    assert len(list((cache / "stamps").iterdir())) == 1


@pytest.mark.parametrize("name", ["train.bin", "meta.json", "tokenizer.json"])
def test_damaged_cache_is_made_again(docs, tmp_path, cache, name):
    """A file cut short or gone costs a preparation, not wrong tokens."""
    file, said = save_jsonl(tmp_path / "rows.jsonl", docs), []
    whole = np.array(load(file).train)
    damaged = load(file).tokenizer_path.parent / name
    damaged.unlink() if name == "tokenizer.json" else os.truncate(damaged, 100)
    again = load(file, say=said.append)
    assert len(said) == 2 and np.array_equal(again.train, whole)
    assert load(file, say=said.append).key == again.key and len(said) == 2


@pytest.mark.parametrize("line_end", ["\n", " "])
def test_one_long_file_is_split_too(library, tmp_path, cache, line_end):
    """A corpus of one document is cut into pieces, at line ends where there are any; nothing is lost."""
    book, said = "".join(sorted(library, key=len)[-3:]).replace("\n", line_end), []
    data = load(save(tmp_path / "book.txt", book.encode()), say=said.append)
    train, val = as_documents(data, data.train), as_documents(data, data.val)
    assert 0.1 < len(val) / len(train + val) < 0.3 and "cut into" in said[1]
    assert sum(map(len, train + val)) == len(book)
    assert all(piece in book and len(piece) <= 2049 for piece in train + val)
    assert line_end != "\n" or all(piece.endswith("\n") for piece in train + val)


def test_documents_of_any_length_go_through_whole(docs, tmp_path, cache, monkeypatch):
    """Too long to tokenise at once, in a corpus too long to train on whole: still one document, in order."""
    monkeypatch.setattr("moe_core.data.batches.ENCODE_CHARS", 500)
    monkeypatch.setattr("moe_core.data.batches.TOKENIZER_CHARS", 9000)
    data = load(save_jsonl(tmp_path / "rows.jsonl", docs))
    assert data.vocab_size == V
    assert load(save_parquet(tmp_path / "rows.parquet", docs)).key != data.key  # another part was trained on
    assert as_documents(data, data.train) == [text for text in docs if not is_validation(text, 0.2)]
    assert as_documents(data, data.val) == [text for text in docs if is_validation(text, 0.2)]


def test_reading_files_is_offline_and_silent_and_leaves_nothing(docs, tmp_path):
    """`datasets` opens no connection, prints no bar or log line, and fills no cache of its own."""
    folder, home = save_text(tmp_path / "text", docs), tmp_path / "home"
    save_jsonl(folder / "rows.jsonl", docs[:3])
    save_parquet(folder / "rows.parquet", docs[:3])
    (folder / "rows9.jsonl").write_text("{")
    home.mkdir()
    script = ("import sys; events = []\n"
              "outward = ('socket.connect', 'socket.getaddrinfo', 'socket.sendto')\n"
              "sys.addaudithook(lambda event, args: event in outward and events.append(event))\n"
              "from moe_core.config import DataConfig; from moe_core.data import documents, DataError\n"
              f"texts = documents(DataConfig({str(folder)!r})); n = 0\n"
              "try:\n"
              "    for text in texts: n += 1\n"
              "except DataError as error: print(n, len(str(error).splitlines()), events)\n"
              "import datasets; from datasets import logging\n"  # what the user had set is set again
              "print(datasets.are_progress_bars_disabled(), logging.get_verbosity() == logging.WARNING)\n"
              "print('all that was said', end='', file=sys.stderr)")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    screen, terminal = pty.openpty()  # bars are drawn on a terminal only
    done = subprocess.run([sys.executable, "-c", script], env={**env, "HOME": str(home)}, text=True,
                          stdout=subprocess.PIPE, stderr=terminal, timeout=60)
    assert os.read(screen, 1 << 16) == b"all that was said"
    assert done.stdout.split("\n") == ["66 1 []", "False True", ""]
    assert list(home.rglob("*")) == []


BAD = {  # name: the corpus in a folder, the field at fault, what the line says
    "missing": (lambda at: at / "none.txt", "dataset_name", "no such file or folder"),
    "the text itself": (lambda at: "It was a dark night. " * 500, "dataset_name", "no such file or folder"),
    "no file": (lambda at: at, "dataset_name", "must hold .txt"),
    "unknown kind": (lambda at: save(at / "a.pdf", b"text"), "dataset_name", "found .pdf"),
    "blank file": (lambda at: save(at / "a.txt", b" \n"), "dataset_name", "every document"),
    "blank rows": (lambda at: save_jsonl(at / "a.jsonl", [" ", None]), "dataset_name", "every document"),
    "empty jsonl": (lambda at: save(at / "a.jsonl", b""), "dataset_name", "every document"),
    "binary": (lambda at: save(at / "a.txt", b"PK\3\4\0\0"), "dataset_name", "a.txt is binary"),
    "latin-1": (lambda at: save(at / "a.txt", b"na\xefve"), "dataset_name", "a.txt is not UTF-8"),
    "column, jsonl": (lambda at: save_jsonl(at / "a.jsonl", "ab", "t"), "text_key", "'id', 't'"),
    "column, parquet": (lambda at: save_parquet(at / "a.parquet", "ab", "t"), "text_key", "'id', 't'"),
    "numbers": (lambda at: save_parquet(at / "a.parquet", [1, 2]), "text_key", "holds int"),
    "broken jsonl": (lambda at: save(at / "a.jsonl", b'{"text": "a"}\n{"te'), "dataset_name", "JSON lines"),
    "broken parquet": (lambda at: save(at / "a.parquet", b"PAR1 no"), "dataset_name", "Parquet"),
    "odd name": (lambda at: save(at / "a::b.txt", b"text"), "dataset_name", "cannot be read as text"),
    "too small": (lambda at: save(at / "a.txt", b"one line\n"), "dataset_name", "too few to split"),
}


@pytest.mark.parametrize("make, field, hint", BAD.values(), ids=BAD)
def test_bad_corpus_is_refused_in_one_line(tmp_path, cache, make, field, hint):
    """The line names the field and what is wrong or would be right; nothing is written."""
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError) as refused:
        load(make(tmp_path / "corpus"))
    line = str(refused.value)
    assert line.startswith(f"{field} = ") and hint in line and "\n" not in line
    assert not cache.exists()


def test_vocabulary_without_room_for_every_byte_is_refused(cache):
    """257 is the least: 256 bytes and the end-of-text mark."""
    with pytest.raises(DataError, match=r"^vocab_size = 256: must be at least 257"):
        load("stdlib", vocab_size=256)


def test_unwritable_cache_is_refused_in_one_line(docs, tmp_path, monkeypatch):
    """Where the cache cannot be, the line says so and how to choose another place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(save(tmp_path / "a file", b"")))
    with pytest.raises(DataError, match=r"^cache folder = .*XDG_CACHE_HOME names another place$"):
        load(save_jsonl(tmp_path / "rows.jsonl", docs))
