"""A tokenizer as AutoTokenizer finds it in a folder."""

import pytest
from tokenizers import Tokenizer

from moe_core.config import DataConfig
from moe_core.data import Batches, load_tokens, validation_batches
from moe_core.knobs import Knobs
from moe_core.trainer import Trainer

V = 700  # not a multiple of 128


@pytest.fixture(scope="session")
def make_tokenizer(corpus, tmp_path_factory):
    """Makes tokenizer folders of 700 tokens, trained on the small corpus, with any field of theirs changed."""
    from transformers import PreTrainedTokenizerFast

    trained = str(load_tokens(DataConfig(str(corpus)), V, lambda line: None).tokenizer_path)

    def make(**changes):
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(trained),
                                            **{"eos_token": "<|endoftext|>", **changes})
        tokenizer.save_pretrained(folder)
        return str(folder)
    return make


@pytest.fixture(scope="session")
def tokenizer_folder(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def make(tiny):
    """Makes trainers without a run around them, on the small corpus."""
    def trainer(**changes):
        config = tiny(**changes)
        tokens = load_tokens(config.data, config.model.vocab_size, say=lambda line: None)
        block, batch = config.model.block_size, config.optim.batch_size
        return Trainer(config, Knobs(config), Batches(tokens.train, block, batch, config.seed),
                       validation_batches(tokens.val, block, batch, config.eval_iters))
    return trainer
