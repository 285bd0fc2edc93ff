"""Find near duplicates: texts that say the same in nearly the same words.

python examples/deduplication.py [FILE] [--least 0.9] [--small]     texts one a line; by default reviews of films
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from reviews import reviews

import fastbert
from fastbert.assets import fetch

BLOCK = 1024  # rows of similarities that are in memory at once


def main() -> None:
    """Print pairs of near duplicates, and how many texts are left without them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--least", type=float, default=0.9, help="the cosine from which on two texts are the same")
    parser.add_argument("--small", action="store_true", help="on few reviews")
    options = parser.parse_args()

    if options.file is not None:
        texts = options.file.read_text(encoding="utf-8").splitlines()
    else:
        texts = [review["text"] for review in reviews(400 if options.small else 8500)]
        texts += [
            text.replace(" is ", " was ").replace("film", "movie").upper() for text in texts[:5]
        ]  # so that some are
    embeddings = fastbert.encode(texts, model=fetch("minilm"), normalize=True, progress=True)
    dropped = set()
    for first, second, cosine in pairs(embeddings, options.least):
        print(f"{cosine:.3f}  {texts[first]}\n       {texts[second]}")
        dropped.add(second)
    print(f"{len(texts)} texts, {len(texts) - len(dropped)} without near duplicates")


def pairs(embeddings: npt.NDArray[np.float32], least: float) -> Iterator[tuple[int, int, float]]:
    """`(i, j, cosine)` of all pairs i < j that are this alike, a block of rows at a time."""
    for begin in range(0, len(embeddings), BLOCK):
        cosines = embeddings[begin : begin + BLOCK] @ embeddings[begin:].T
        for i, j in np.argwhere(np.triu(cosines >= least, k=1)):
            yield begin + int(i), begin + int(j), float(cosines[i, j])


if __name__ == "__main__":
    main()
