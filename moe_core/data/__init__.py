"""Documents to tokens to batches. ``load_tokens`` and ``Batches`` are what a training run needs."""

from moe_core.data.batches import Batches, TokenData, load_tokens, validation_batches
from moe_core.data.corpus import DataError, documents, is_validation
from moe_core.data.tokenizer import train_tokenizer

__all__ = ["Batches", "DataError", "TokenData", "documents", "is_validation", "load_tokens",
           "train_tokenizer", "validation_batches"]
