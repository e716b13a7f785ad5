"""How quick data is: ``python tests/bench/data.py``.

From text to batch: a Parquet file of the standard library's sources, streamed by ``datasets``, tokenised, packed,
shuffled and cut into batches, beside ``tokenizers`` alone on the same documents, in memory, with the same cores.
From a memory-mapped file: batches of a token array in the page cache, beside a plain NumPy copy of as many bytes.
All take turns, in rounds; the bars are a ratio of 0.8 and 50 million tokens a second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_core.config import DataConfig
from moe_core.data import Batches, documents, train_tokenizer
from moe_core.data.hub import Documents
from moe_core.data.pretrained import load_pretrained
from moe_core.data.stream import CHUNK_CHARS, Stream

BATCH, BLOCK, WINDOWS = 8, 1024, 256


def prepare(folder: Path, vocab_size: int) -> list[str]:
    """A tokenizer, a Parquet file of documents and an array of tokens in the folder; returns the documents."""
    import datasets  # noqa: F401  # so that no round pays for it
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import PreTrainedTokenizerFast

    texts = list(documents(DataConfig()))
    PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(texts, vocab_size),
                            eos_token="<|endoftext|>").save_pretrained(folder / "tokenizer")
    pq.write_table(pa.table({"text": texts, "id": range(len(texts))}), folder / "text.parquet", row_group_size=100)
    np.random.default_rng(0).integers(0, vocab_size, 1 << 26).astype(np.uint16).tofile(folder / "tokens.bin")
    return texts


def alone(tokenizer, texts: list[str]) -> int:
    """The tokens of the documents by the tokenizers library, with as much text in a call as the stream gives it."""
    chunk, chars, tokens = [], 0, 0
    for text in [*texts, None]:
        if text is None or chars >= CHUNK_CHARS:
            tokens += sum(map(len, tokenizer.backend.encode_batch_fast(chunk, add_special_tokens=False)))
            chunk, chars = [], 0
        if text is not None:
            chunk.append(text)
            chars += len(text)
    return tokens


def streamed(tokenizer, file: Path, workers: int, batches: int) -> int:
    """The tokens of so many batches, from opening the file on."""
    import datasets

    def opened():
        return datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True,
                                     cache_dir=str(file.parent / "unused"))
    stream = Stream(Documents(opened, "bench", "text"), tokenizer, block_size=BLOCK, batch_size=BATCH, seed=0,
                    shuffle_buffer=WINDOWS, num_workers=workers, say=lambda line: None)
    tokens = sum(stream.next().numel() for _ in range(batches))
    stream.close()
    return tokens


def mapped(file: Path, batches: int = 4000) -> int:
    """The tokens of so many Batches of a memory-mapped array."""
    source = Batches(np.memmap(file, np.uint16, mode="r"), BLOCK, BATCH, seed=0)
    return sum(source.next().numel() for _ in range(batches))


def copied(file: Path, batches: int = 4000) -> int:
    """As many tokens, in order, by NumPy alone."""
    tokens, size = np.memmap(file, np.uint16, mode="r"), BATCH * (BLOCK + 1)
    return sum(len(tokens[(at := i * size % (len(tokens) - size)) : at + size].astype(np.int64))
               for i in range(batches))


def timed(way: Callable[[], int]) -> tuple[float, float]:
    """Million tokens a second, and a CPU second of this process and those that it waited for."""
    started, used = time.perf_counter(), sum(os.times()[:4])
    tokens = way()
    return tokens / 1e6 / (time.perf_counter() - started), tokens / 1e6 / max(0.01, sum(os.times()[:4]) - used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = prepare(folder, options.vocab_size)
        tokenizer = load_pretrained(str(folder / "tokenizer"))
        file, array = folder / "text.parquet", folder / "tokens.bin"
        batches = alone(tokenizer, texts) // (BATCH * (BLOCK + 1))  # an epoch: as many tokens as alone
        ways = {
            "tokenizers alone": lambda: alone(tokenizer, texts),
            "text to batch, num_workers = 0": lambda: streamed(tokenizer, file, 0, batches),
            f"text to batch, num_workers = {options.workers}": lambda: streamed(
                tokenizer, file, options.workers, batches),
            "NumPy copy of a mapped file": lambda: copied(array),
            "batches of a mapped file": lambda: mapped(array),
        }
        speeds = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                speeds[name].append(timed(way))
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds, "
          f"vocab_size {options.vocab_size}, batches of {BATCH} x {BLOCK + 1}")
    print(f"{'':34} {'million tokens/s':>16} {'lowest':>8} {'highest':>8}   ratio to the first of its kind, by round: "
          "of the time, of the CPU time")
    for name, values in speeds.items():
        first = speeds["NumPy copy of a mapped file" if "mapped" in name else "tokenizers alone"]
        wall = [value[0] for value in values]
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(values, first, strict=True)) for i in (0, 1)]
        print(f"{name:34} {statistics.median(wall):16.2f} {min(wall):8.2f} {max(wall):8.2f}   "
              f"{ratios[0]:.2f} {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
