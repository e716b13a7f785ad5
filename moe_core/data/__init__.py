"""Documents to tokens to batches. ``open_data`` is what a training run needs."""

from moe_core.data.batches import Batches, TokenData, load_tokens, validation_batches
from moe_core.data.corpus import DataError, documents, is_validation
from moe_core.data.source import Data, fingerprint, open_data, settled, tokenizer_of
from moe_core.data.tokenizer import train_tokenizer

__all__ = ["Batches", "Data", "DataError", "TokenData", "documents", "fingerprint", "is_validation", "load_tokens",
           "open_data", "settled", "tokenizer_of", "train_tokenizer", "validation_batches"]
