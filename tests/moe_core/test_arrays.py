"""Token ids that somebody else made, and batches made ready ahead of them."""

import threading
import time

import numpy as np
import pytest
import torch

from moe_core.config import DataConfig
from moe_core.data import Batches, DataError, open_data
from moe_core.data.arrays import token_arrays
from moe_core.data.prefetch import Ahead, Prefetched

V = 300


def quiet(line):
    pass


def save(path, tokens):
    if path.suffix == ".npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    return path


@pytest.fixture
def tokens():
    return np.random.default_rng().integers(0, V, 5000)


def arrays(path, **changes):
    return token_arrays(DataConfig(str(path), **changes), V, quiet)


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_array_is_mapped_and_split_at_its_end(tokens, tmp_path, suffix, dtype):
    """Any whole-number type; training is the beginning, validation the last val_fraction, or the other file."""
    path = save(tmp_path / f"train{suffix}", tokens.astype(dtype))
    train, val = arrays(path, val_fraction=0.1, token_dtype=dtype)
    assert isinstance(train, np.memmap) and len(val) == 500
    assert np.array_equal(np.concatenate([train, val]), tokens)
    other = save(tmp_path / f"val{suffix}", tokens[:99].astype(dtype))
    train, val = arrays(path, val_data=str(other), token_dtype=dtype)
    assert np.array_equal(train, tokens) and np.array_equal(val, tokens[:99])


def test_run_trains_on_arrays(tiny_run, tokens, tmp_path):
    """With no tokenizer at all: the windows are the file's, the vocabulary is the config's."""
    path = save(tmp_path / "train.npy", tokens.astype(np.uint16))
    run = tiny_run(dataset_name=str(path), vocab_size=V, val_fraction=0.1)
    run.step(10)
    assert run.metrics()["val/loss"].notna().any()
    data = open_data(run.config, False, quiet)
    assert (data.tokenizer, data.end_of_text, data.vocab_size) == (None, None, V)
    windows = {tuple(tokens[i : i + 33]) for i in range(0, 4500 - 33, 33)}
    assert all(tuple(row) in windows for row in data.train.next().numpy())


@pytest.mark.parametrize("bad", [V, 60000, -1])
def test_id_out_of_range_is_refused_with_its_place(tokens, tmp_path, bad, monkeypatch):
    """The first such id, across the chunks that are checked; and the file is refused again the next time."""
    monkeypatch.setattr("moe_core.data.arrays.CHUNK", 777)
    at = int(np.random.default_rng().integers(0, 4000))
    tokens[at], tokens[4500] = bad, bad
    path = save(tmp_path / "train.npy", tokens)
    for _ in range(2):
        with pytest.raises(DataError, match=f"holds token id {bad} at position {at:,}; must be 0 to 299, since vocab"):
            arrays(path)


def test_ids_are_checked_once_for_a_file_as_it_is(tokens, tmp_path, monkeypatch):
    """Not again for the same file; again after a change, for a smaller vocabulary, and as numbers of another width."""
    monkeypatch.setattr("moe_core.data.arrays.CHUNK", 777)
    tokens = np.minimum(tokens, 199)
    tokens[3] = 200
    path, said = save(tmp_path / "train.npy", tokens), []
    data = DataConfig(str(path))
    for _ in range(2):
        token_arrays(data, V, said.append)
        token_arrays(data, 201, said.append)
        assert len(said) == 1
    with pytest.raises(DataError, match="holds token id 200 at position"):
        token_arrays(data, 200, said.append)
    tokens[7] = V
    save(path, tokens)
    with pytest.raises(DataError, match="holds token id 300 at position 7;"):
        token_arrays(data, V, said.append)
    narrow = save(tmp_path / "train.bin", np.minimum(tokens, 200).astype(np.uint16))
    arrays(narrow)
    with pytest.raises(DataError, match="holds token id"):
        arrays(narrow, token_dtype="uint32")


def pickled(path):
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


HEADER = b"\x93NUMPY\1\0\x80\0{'descr': '<u2', 'fortran_order': False, 'shape': (%b,)}".ljust(140)

BAD = {
    "not there": ("a.npy", lambda path: None, "no such file"),
    "2-D": ("a.npy", lambda path: np.save(path, np.zeros((4, 9), np.int64)), "is 2-D of int64"),
    "not whole numbers": ("a.npy", lambda path: np.save(path, np.zeros(9)), "is 1-D of float64"),
    "pickled": ("a.npy", pickled, "not a .npy file of plain numbers"),
    "longer than there are numbers": ("a.npy", lambda path: path.write_bytes(
        HEADER % (b"9" * 30)), "not a .npy file of plain numbers"),
    "of a shape that is none": ("a.npy", lambda path: path.write_bytes(HEADER % b"True"), "not a .npy file of plain"),
    "not .npy": ("a.npy", lambda path: path.write_bytes(b"PK\3\4 text"), "not a .npy file"),
    "no bytes": ("a.npy", lambda path: path.write_bytes(b""), "not a .npy file"),
    "empty .npy": ("a.npy", lambda path: np.save(path, np.zeros(0, np.int64)), "it is empty"),
    "empty .bin": ("a.bin", lambda path: path.write_bytes(b""), "it is empty"),
    "odd .bin": ("a.bin", lambda path: path.write_bytes(b"abc"), "is token_dtype right?"),
    "wider .bin": ("a.bin", lambda path: np.arange(V, dtype=np.int64).tofile(path), "is token_dtype right?"),
    "cut short": ("a.npy", lambda path: (np.save(path, np.zeros(99, np.int64)),
                                         path.write_bytes(path.read_bytes()[:300])), "not a .npy file"),
}


@pytest.mark.parametrize("field", ["dataset_name", "val_data"])
@pytest.mark.parametrize("name, make, hint", BAD.values(), ids=BAD)
def test_bad_array_is_refused_in_one_line(tokens, tmp_path, field, name, make, hint):
    """The line names the field, the file and what is wrong, for training and for validation."""
    make(tmp_path / name)
    good = str(save(tmp_path / "good.npy", tokens))
    fields = {"dataset_name": good, "val_data": good, field: str(tmp_path / name)}
    with pytest.raises(DataError) as refused:
        token_arrays(DataConfig(**fields), V, quiet)
    line = str(refused.value)
    assert line.startswith(f"{field} = ") and hint in line and "\n" not in line


def test_prefetched_batches_are_the_same_from_any_place(tokens):
    """Whatever is ready already, the state is that of the batches taken; it can be gone back to, and ahead."""
    plain, ahead = Batches(tokens, 9, 7, 5), Prefetched(Batches(tokens, 9, 7, 5), 4)
    states, batches = [], []
    for _ in range(160):  # two epochs
        assert ahead.state_dict() == plain.state_dict()
        states.append(ahead.state_dict())
        batches.append(ahead.next())
        assert torch.equal(batches[-1], plain.next())
    for at in np.random.default_rng().integers(0, 150, 20):
        ahead.load_state_dict(states[at])
        assert all(torch.equal(ahead.next(), batch) for batch in batches[at : at + 9])
    ahead.load_state_dict(ahead.state_dict())
    with pytest.raises(DataError, match="must be a place in these"):
        ahead.load_state_dict({"epoch": 0, "index": 501})
    ahead.close()


def test_ahead_makes_no_more_than_asked_and_passes_errors_on():
    """Two of depth 2 wait while none is taken; an error comes after what was ready, and not twice if it is over."""
    made, broken = [], threading.Event()

    def make(place, stop):
        while True:
            if place == 4 and broken.is_set():
                raise OSError("gone")
            made.append(place)
            place += 1
            yield place - 1, place
    ahead = Ahead(make, 0, depth=2)
    assert ahead.get() == 0
    time.sleep(0.1)
    assert made == [0, 1, 2]
    broken.set()
    assert [ahead.get() for _ in range(3)] == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            ahead.get()
        assert ahead.place == 4
    ahead.seek(3)
    assert ahead.get() == 3
    while ahead._line.error is None:
        time.sleep(0.001)
    broken.clear()
    assert ahead.get() == 4
    ahead.close()
    assert ahead.get() == 5  # opened again where it was
    ahead.close()
