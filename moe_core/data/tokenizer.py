"""Byte-level BPE: any text becomes tokens and comes back byte for byte.

Trained here on the training documents alone, so that the validation loss says nothing about text the
vocabulary has seen. (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes as in GPT-2.)
"""

from __future__ import annotations

from collections.abc import Iterable

END_OF_TEXT = "<|endoftext|>"  # id 0; follows every document; a text that contains it gets the same id
MIN_VOCAB = 257  # every byte, and END_OF_TEXT


def train_tokenizer(train_docs: Iterable[str], vocab_size: int):
    """A ``tokenizers.Tokenizer`` of at most ``vocab_size`` tokens (fewer when the text has no more pairs).

    The same documents in the same order give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(train_docs, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer
