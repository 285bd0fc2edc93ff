"""Embed 300 sentences with all-MiniLM-L6-v2, find neighbours, and compare with transformers if it is installed.

    make demo            or, with fastbert installed:            python examples/demo.py

Ends with 1 if our embeddings are not those of transformers.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastbert
from fastbert.assets import fetch
from fastbert.backend import bfloat16_unserved, first_device, int8_unserved
from fastbert.tasks.loading import DTYPES

SENTENCES = Path(__file__).with_name("sentences.txt")
QUERIES = ("Tips for baking bread at home", "problems with a computer", "discoveries in astronomy")
MAX_LENGTH = 256
ROUNDS = 5

LARGEST_DIFFERENCE = 2e-5  # of an element of a normalised embedding, fp32
SMALLEST_COSINE = 0.9999  # between bf16 and transformers' fp32

Embeddings = npt.NDArray[np.float32]

console = Console(highlight=False)


def main() -> int:
    """The whole demo; the exit code."""
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    console.print("[bold]1. Weights[/bold]: all-MiniLM-L6-v2, about 84 MB the first time")
    folder = fetch("minilm")
    console.print(f"   {folder}\n")

    console.print(f"[bold]2. Embeddings[/bold] of {len(sentences)} sentences")
    fp32 = fastbert.encode(sentences, model=folder, dtype="fp32", max_length=MAX_LENGTH)
    bf16 = None
    if "bf16" not in unserved():
        bf16 = fastbert.encode(sentences, model=folder, dtype="bf16", max_length=MAX_LENGTH)
    console.print(f"   {fp32.dtype} array of shape {fp32.shape}\n")

    console.print("[bold]3. Nearest neighbours[/bold], by cosine")
    show_neighbours(sentences, fp32, fastbert.encode(QUERIES, model=folder, max_length=MAX_LENGTH))

    if importlib.util.find_spec("transformers") is None:
        console.print("[bold]4. transformers is not installed[/bold]: skipped the comparison and both throughputs.")
        console.print("   Install it with: pip install transformers")
        return 0
    console.print("[bold]4. The same sentences through transformers[/bold]")
    same = compare(fp32, bf16, Transformers(folder, torch.float32).encode(sentences))
    console.print(f"[bold]5. Throughput[/bold], tokenisation included, median of {ROUNDS} interleaved rounds")
    show_throughput(folder, sentences)
    return 0 if same else 1


def unserved() -> dict[str, str]:
    """Why a dtype is left out: by its name, in words."""
    device = first_device()
    int8 = "it is for CPUs" if device.type == "cuda" else int8_unserved(device)
    reasons = {"bf16": bfloat16_unserved(device), "int8": int8}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def show_neighbours(sentences: list[str], embeddings: Embeddings, queries: Embeddings) -> None:
    """Print the three sentences nearest to each query; all embeddings have length 1."""
    for query, cosines in zip(QUERIES, queries @ embeddings.T, strict=True):
        table = Table("cosine", f'"{query}"', box=None)
        for row in np.argsort(-cosines)[:3]:
            table.add_row(f"{cosines[row]:.3f}", sentences[row])
        console.print(table, "")


class Transformers:
    """What a careful user of transformers does: SDPA, batches sorted by length, mean pooling, length 1."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModel, AutoTokenizer, logging

        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype).eval()
        self.model.to(first_device())

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text."""
        ids: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return ids

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> Embeddings:
        """float32 `[texts, hidden]`."""
        ids = self.ids(texts)
        order = sorted(range(len(texts)), key=lambda row: -len(ids[row]))
        embeddings = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        for begin in range(0, len(order), 32):
            rows = order[begin : begin + 32]
            batch = self.tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            batch = batch.to(self.model.device)
            hidden = self.model(**batch).last_hidden_state.float()
            kept = batch["attention_mask"].unsqueeze(-1)
            mean = (hidden * kept).sum(1) / kept.sum(1)
            embeddings[rows] = torch.nn.functional.normalize(mean).cpu().numpy()
        return embeddings


def compare(fp32: Embeddings, bf16: Embeddings | None, theirs: Embeddings) -> bool:
    """Print how far we are from transformers' fp32; whether that is within the bounds."""
    largest = float(np.abs(fp32 - theirs).max())
    table = Table("", "got", "bound", box=None)
    table.add_row("fp32, largest |difference|", f"{largest:.1e}", f"<= {LARGEST_DIFFERENCE:.0e}")
    same = largest <= LARGEST_DIFFERENCE
    if bf16 is not None:
        cosines = (bf16 * theirs).sum(axis=1)
        table.add_row("bf16, worst cosine", f"{cosines.min():.6f}", f">= {SMALLEST_COSINE}")
        table.add_row("bf16, mean cosine", f"{cosines.mean():.6f}", f">= {SMALLEST_COSINE}")
        same = same and float(cosines.min()) >= SMALLEST_COSINE
    console.print(table, "")
    if not same:
        console.print("[bold red]   out of bounds[/bold red]\n")
    return same


def show_throughput(folder: Path, sentences: list[str]) -> None:
    """Print real tokens (no padding) a second of both, in the dtypes that are served here, and why others are not."""
    left_out = unserved()
    served = {name: dtype for name, dtype in DTYPES.items() if name not in left_out}
    fast = {name: fastbert.TextEncoder.from_folder(folder, dtype=name) for name in served}
    # transformers has no int8 on a CPU
    hugging = {name: Transformers(folder, dtype) for name, dtype in served.items() if name != "int8"}
    contenders: dict[str, Callable[[], Embeddings]] = {}
    for name in served:
        contenders[f"fastbert {name}"] = partial(fast[name].encode, sentences, max_length=MAX_LENGTH)
        if name in hugging:
            contenders[f"transformers {name}"] = partial(hugging[name].encode, sentences)

    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for counted in track([False] + [True] * ROUNDS, "   timing", console=console, transient=True):
        for contender, run in contenders.items():
            begin = time.perf_counter()
            run()
            if counted:
                seconds[contender].append(time.perf_counter() - begin)

    tokens = sum(len(ids) for ids in hugging["fp32"].ids(sentences))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    table = Table("", f"tokens/s ({tokens} tokens, {where})", box=None)
    for contender, values in seconds.items():
        table.add_row(contender, f"{tokens / statistics.median(values):,.0f}")
    console.print(table)
    for missing, reason in left_out.items():
        console.print(f"   No row for {missing}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
