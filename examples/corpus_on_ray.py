"""Embed a corpus of many files on a Ray cluster, or on this machine's cores; what was stopped goes on where it was.

python examples/corpus_on_ray.py OUT [--small]     needs the extra `ray`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as parquet
from reviews import reviews, write

import fastbert.ray
from fastbert.assets import fetch


def main() -> None:
    """Write a corpus, embed it, and read a part of what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the corpus and the embeddings; call again to go on")
    parser.add_argument("--small", action="store_true", help="on few reviews")
    options = parser.parse_args()

    corpus, embeddings = options.out / "corpus", options.out / "embeddings"
    if not corpus.exists():  # a file that was written again would be embedded again
        rows = reviews(400 if options.small else 8500)
        for i, begin in enumerate(range(0, len(rows), len(rows) // 4)):
            write(rows[begin : begin + len(rows) // 4], corpus / f"part-{i}.jsonl")
    written = fastbert.ray.encode(corpus, fetch("minilm"), embeddings, format="parquet")
    print(f"{written.rows} rows written in {written.shards} shards, {written.before} shards were there")
    shard = min(embeddings.rglob("*.parquet"))
    print(f"{shard.name}:\n{parquet.read_table(shard).schema.to_string(show_schema_metadata=False)}")


if __name__ == "__main__":
    main()
