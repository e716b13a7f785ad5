"""Windows of a token stream: shuffled into batches, resumed at the exact next one, spread for validation."""

import json

import numpy as np
import pytest
import torch

from moe_core.data import Batches, DataError, validation_batches


@pytest.fixture(params=[0, 1])
def rng(request):
    return np.random.default_rng(request.param)


def numbered(windows, block_size, rest):
    """Tokens whose window i holds i everywhere, and some that fill no window."""
    return np.concatenate([np.repeat(np.arange(windows, dtype=np.uint16), block_size + 1),
                           np.full(rest, 60000, np.uint16)])


def taken(batches, n):
    """The windows of the next n batches, in order."""
    return torch.cat([batches.next() for _ in range(n)])[:, 0].tolist()


@pytest.mark.parametrize("windows, B", [(12, 4), (13, 4), (5, 5), (7, 1)])
def test_every_window_once_an_epoch_in_a_new_order_each_time(rng, windows, B):
    """Epochs run on without a gap, also inside a batch; the order depends on the seed and on nothing else."""
    tokens, seed = numbered(windows, 6, rest=5), int(rng.integers(1 << 31))
    order = taken(Batches(tokens, 6, B, seed), windows * 3)
    epochs = [order[i : i + windows] for i in range(0, len(order), windows)]
    assert all(sorted(epoch) == list(range(windows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert order == taken(Batches(tokens, 6, B, seed), windows * 3)
    assert order != taken(Batches(tokens, 6, B, seed + 1), windows * 3)


def test_batches_are_whole_windows_of_the_stream(rng):
    """A batch is int64 [B, S + 1], and each row is a run of the stream that starts at a multiple of S + 1."""
    tokens = rng.integers(0, 65536, 1000).astype(np.uint16)
    batch = Batches(tokens, 9, 8, 0).next()
    assert batch.shape == (8, 10) and batch.dtype == torch.int64
    stream = tokens.astype(np.int64).reshape(100, 10).tolist()
    assert all(row in stream for row in batch.tolist())


@pytest.mark.parametrize("windows, B", [(13, 4), (4, 4)])
def test_state_resumes_at_the_exact_next_window(rng, windows, B):
    """From the state at any step, through JSON, a fresh object goes on as the first one did."""
    tokens, seed = rng.integers(0, 999, windows * 7).astype(np.uint16), int(rng.integers(99))
    first = Batches(tokens, 6, B, seed)
    states, batches = zip(*[(json.dumps(first.state_dict()), first.next()) for _ in range(10)], strict=True)
    for step, state in enumerate(states):
        resumed = Batches(tokens, 6, B, seed)
        resumed.load_state_dict(json.loads(state))
        assert all(torch.equal(resumed.next(), batch) for batch in batches[step:])


def test_batches_refuse_what_cannot_fill_one_and_a_place_that_is_not_there():
    """Too little text for a batch or a window, or a place saved with other text: one line with the sizes."""
    tokens = numbered(3, 6, rest=4)
    with pytest.raises(DataError, match=r"^batch_size = 4: must be at most 3, the windows .* 25 training"):
        Batches(tokens, 6, 4, 0)
    with pytest.raises(DataError, match=r"^block_size = 25: must be less than the 25 training tokens"):
        Batches(tokens, 25, 4, 0)
    with pytest.raises(DataError, match=r"^block_size = 25: must be less than the 25 validation tokens"):
        validation_batches(tokens, 25, 4, 1)
    for state in ({"epoch": 0, "index": 3}, {"epoch": -1, "index": 0}):
        with pytest.raises(DataError, match=r"must be a place in these 3 windows"):
            Batches(tokens, 6, 3, 0).load_state_dict(state)


def test_validation_batches_are_fixed_and_spread_over_the_text():
    """The same distinct windows each time, in order, from first to near last; fewer when there are fewer."""
    tokens = numbered(50, 6, rest=3)
    batches = validation_batches(tokens, 6, 4, 3)
    picked = torch.cat(batches)[:, 0].tolist()
    assert [batch.shape for batch in batches] == [(4, 7)] * 3 and batches[0].dtype == torch.int64
    assert picked == sorted(set(picked)) and picked[0] == 0 and picked[-1] >= 45
    assert all(map(torch.equal, batches, validation_batches(tokens, 6, 4, 3)))
    assert len(validation_batches(tokens, 6, 4, 99)) == 12
    assert [batch.shape for batch in validation_batches(tokens[:21], 6, 4, 2)] == [(3, 7)]
