"""A small real corpus, a small model, and a cache folder of the tests' own."""

import json
import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from moe_core import Run, preset


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenised corpora go to a folder of this test session, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of some forty text files: sources of a few standard packages."""
    folder = tmp_path_factory.mktemp("corpus")
    for package in ("json", "email", "logging"):
        for source in (Path(json.__file__).parent.parent / package).rglob("*.py"):
            shutil.copy(source, folder / f"{package}_{source.stem}.txt")
    return folder


@pytest.fixture(scope="session")
def tiny(corpus):
    """Configs of a model that steps in milliseconds on the small corpus; any field can be changed."""
    def make(**changes):
        fields = dict(
            n_layer=2, d_model=32, n_head=2, n_experts=4, expert_width=48, block_size=32, vocab_size=512,
            batch_size=4, warmup_iters=5, eval_interval=10, eval_iters=2, device="cpu", dataset_name=str(corpus))
        return preset("nano").replace(**{**fields, **changes})
    return make


@pytest.fixture
def tiny_run(tiny, tmp_path):
    """Makes runs in a temporary folder and closes them."""
    made = []

    def make(name="run", **changes):
        made.append(Run.create(tmp_path / name, tiny(**changes), say=lambda line: None))
        return made[-1]
    yield make
    for run in made:
        run.close()
