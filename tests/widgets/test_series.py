import numpy as np
import pandas as pd
import pytest

from moe_core.store import MAIN, RunStore
from widgets.record import Record
from widgets.series import Shares, thin


@pytest.fixture(params=range(3))
def rng(request):
    return np.random.default_rng(request.param)


@pytest.mark.parametrize("n", (7, 999, 1000, 1001, 4321, 100_003))
def test_a_thinned_line_keeps_every_spike(rng, n):
    """Of any stretch of points as long as two buckets, the drawn line shows the largest and the smallest."""
    x, y = np.arange(1, n + 1), rng.normal(size=n).astype(np.float32)
    y[rng.integers(n, size=5)] += rng.choice([-100, 100], 5)
    kept_x, kept_y = thin(x, y, 1000)
    assert len(kept_x) <= 1000
    assert (kept_x.dtype, kept_y.dtype) == (np.float32, np.float32)
    assert (kept_y == y[kept_x.astype(int) - 1]).all()  # each is a point of the line, at its own step
    assert kept_x[-1] == n
    stretch = 2 ** max(1, int(np.ceil(np.log2(2 * n / 998)))) if n > 1000 else 1
    for start in range(0, n, stretch):
        inside = (kept_x > start) & (kept_x <= start + stretch)
        assert kept_y[inside].max() == y[start : start + stretch].max()
        assert kept_y[inside].min() == y[start : start + stretch].min()


def test_a_growing_line_does_not_flicker(rng):
    """While a line grows its drawn points stay, but for the newest bucket, until their number must halve."""
    y = rng.normal(size=3000)
    before, after = (set(thin(np.arange(n), y[:n], 1000)[0].tolist()) for n in (2100, 2900))
    assert {step for step in before if step < 2096} <= after


def test_an_absent_value_hides_no_number(rng):
    y = np.full(5000, np.nan)
    seen = rng.choice(5000, 40, replace=False)
    y[seen] = rng.normal(size=40)
    _, kept = thin(np.arange(5000), y, 100)
    assert np.nanmax(kept) == np.float32(y[seen].max())
    assert np.nanmin(kept) == np.float32(y[seen].min())


def test_shares_are_the_same_from_a_frame_in_any_order_and_from_arrays(rng):
    shares = rng.random((5, 2, 3, 4)).astype(np.float32)
    step, layer, expert = (index.ravel() for index in np.indices((5, 3, 4)))
    frame = pd.DataFrame({"step": step + 1, "layer": layer, "expert": expert,
                          "demand": shares[:, 0].ravel(), "served": shares[:, 1].ravel()})
    for selection in (None, 1):
        of_frame = Shares.from_frame(frame.sample(frac=1, random_state=0), selection)
        of_arrays = Shares.of(np.arange(1, 6), shares, selection)
        for name in ("steps_n", "demand_nE", "served_nE", "now_2LE"):
            np.testing.assert_array_equal(getattr(of_frame, name), getattr(of_arrays, name))
    np.testing.assert_allclose(Shares.of(np.arange(5), shares, None).served_nE, shares[:, 1].mean(1), rtol=1e-6)
    for layer in range(3):
        np.testing.assert_array_equal(Shares.of(np.arange(5), shares, layer).demand_nE, shares[:, 0, layer])
    with pytest.raises(ValueError, match="59 rows for 5 steps"):
        Shares.from_frame(frame.iloc[1:])


def test_the_shares_of_a_long_run_are_never_in_memory_whole(rng, tmp_path, monkeypatch):
    """A store of 130 steps read 7 at a time, and written up: the same shares as of one read, each line contiguous."""
    shares = rng.random((130, 2, 3, 4)).astype(np.float32)
    with RunStore.create(tmp_path / "run", {"imported": True}) as store:
        for step, one in enumerate(shares, 1):
            store.log_step(MAIN, step, 0.0, {"train/loss": 1.0}, one)
        read = RunStore.read_steps

        def watched(*args, **how):
            part = read(*args, **how)
            assert len(part) <= 50 or not part.shares.size
            return part
        monkeypatch.setattr("moe_core.store.PART", 7)
        monkeypatch.setattr(RunStore, "read_steps", watched)
        for layer in (None, 2):
            of_parts, of_all = Shares.read(store, MAIN, layer), Shares.of(np.arange(1, 131), shares, layer)
            for name in ("steps_n", "demand_nE", "served_nE", "now_2LE"):
                np.testing.assert_array_equal(getattr(of_parts, name), getattr(of_all, name))
            for later in (of_parts, of_all, of_all.extended(of_parts.cut(slice(1)))):
                assert all(line.flags.c_contiguous for line in (*later.demand_nE.T, *later.served_nE.T))
        record = Record.read(store, told=False)
    np.testing.assert_array_equal(record.shares.served_nE, shares[:, 1].mean(1))
    np.testing.assert_array_equal(record.newest_n2LE, shares[-50:])
