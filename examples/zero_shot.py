"""Classify without training: a text gets the label whose description it is nearest to.

    python examples/zero_shot.py [--small]

Labels that are described in a sentence or two work better than labels of one word.
"""

from __future__ import annotations

import argparse

import numpy as np
from reviews import reviews

import fastbert
from fastbert.assets import fetch

LABELS = {
    "positive": ["a wonderful, moving and entertaining film", "one of the best films of the year"],
    "negative": ["a dull, badly made film", "a waste of time and money"],
}


def main() -> None:
    """Embed labels and texts, and count how often the nearest label is the right one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on few texts")
    options = parser.parse_args()

    rows = reviews(400 if options.small else 8500)
    encoder = fastbert.TextEncoder.from_folder(fetch("minilm"))
    names = list(LABELS)
    labels = np.stack([encoder.encode(described).mean(axis=0) for described in LABELS.values()])
    similarity = encoder.similarity(encoder.encode([row["text"] for row in rows], progress=True), labels)
    found = [names[i] for i in similarity.argmax(axis=1)]
    right = np.mean([one == row["label"] for one, row in zip(found, rows, strict=True)])
    print(f"{right:.1%} of {len(rows)} reviews are told right without training; by chance it were 50%")
    sure = np.abs(similarity[:, 0] - similarity[:, 1])
    for best in np.argsort(-sure)[:3]:
        print(f"  {found[best]:8} {rows[best]['text']}")


if __name__ == "__main__":
    main()
