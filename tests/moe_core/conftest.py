"""A tokenizer as AutoTokenizer finds it in a folder."""

import pytest
from tokenizers import Tokenizer

from moe_core.config import DataConfig
from moe_core.data import load_tokens

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
