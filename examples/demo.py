"""Embed 300 sentences with all-MiniLM-L6-v2, find neighbours, and time fastbert beside the other libraries here.

    make demo            or, with fastbert installed:            python examples/demo.py

Ends with 1 if our embeddings are not those of transformers.
"""

from __future__ import annotations

import sys

import numpy as np
from rich.console import Console
from rich.table import Table

import fastbert
from fastbert.assets import fetch
from fastbert.rivals import SENTENCES

QUERIES = ("Tips for baking bread at home", "problems with a computer", "discoveries in astronomy")


def main() -> int:
    """The whole demo; the exit code."""
    console = Console(highlight=False)
    console.print("[bold]1. Weights[/bold]: all-MiniLM-L6-v2, about 84 MB the first time")
    folder = fetch("minilm")
    console.print(f"   {folder}\n")

    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    console.print(f"[bold]2. Embeddings[/bold] of {len(sentences)} sentences")
    encoder = fastbert.TextEncoder.from_folder(folder)
    embeddings = encoder.encode(sentences)
    console.print(f"   {embeddings.dtype} array of shape {embeddings.shape}\n")

    console.print("[bold]3. Nearest neighbours[/bold], by cosine")
    for query, cosines in zip(QUERIES, encoder.similarity(encoder.encode(QUERIES), embeddings), strict=True):
        table = Table("cosine", f'"{query}"', box=None)
        for row in np.argsort(-cosines)[:3]:
            table.add_row(f"{cosines[row]:.3f}", sentences[row])
        console.print(table, "")

    console.print("[bold]4. Speed[/bold], beside each library that is installed: fastbert bench, half a minute or more")
    report = fastbert.bench(folder, sentences, progress=sys.stderr.isatty())
    console.print(report, soft_wrap=True)
    return 1 if any(name.startswith("fastbert") for name in report.wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
