"""Search sentences by what they mean: embed them once, then a query is one matrix product.

python examples/semantic_search.py [--small] [QUERY ...]
"""

from __future__ import annotations

import argparse

import numpy as np
from reviews import reviews

import fastbert
from fastbert.assets import fetch

QUERIES = ["a thriller that kept me guessing until the end", "bad acting", "a film for the whole family"]


def main() -> None:
    """Embed, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", nargs="*", default=QUERIES)
    parser.add_argument("--small", action="store_true", help="among few sentences")
    options = parser.parse_args()

    sentences = [review["text"] for review in reviews(400 if options.small else 8500)]
    encoder = fastbert.TextEncoder.from_folder(fetch("minilm"))
    documents = encoder.encode_document(sentences, progress=True)  # keep these: np.save("documents.npy", documents)
    similarity = encoder.similarity(encoder.encode_query(options.queries), documents)
    for query, row in zip(options.queries, similarity, strict=True):
        print(query)
        for best in np.argsort(-row)[:3]:
            print(f"  {row[best]:.2f}  {sentences[best]}")


if __name__ == "__main__":
    main()
