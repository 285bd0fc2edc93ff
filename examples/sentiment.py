"""Read each text's probabilities, and sort what is unsure to the end, where a person may look at it.

python examples/sentiment.py OUT/model [TEXTS]     the model of text_classification.py; texts one a line
"""

from __future__ import annotations

import sys
from pathlib import Path

import fastbert

TEXTS = [
    "An unforgettable, beautifully acted drama.",
    "It is neither good nor bad.",
    "The plot is a mess and the jokes fall flat.",
    "Some scenes drag, but the ending is worth the wait.",
]


def main() -> None:
    """Print a bar for each text, the surest first."""
    folder, *files = sys.argv[1:]
    texts = Path(files[0]).read_text(encoding="utf-8").splitlines() if files else TEXTS
    classifier = fastbert.TextClassifier.from_folder(folder)  # loaded once, for as many calls as you like
    found = classifier.classify(texts)
    for text, one in sorted(zip(texts, found, strict=True), key=lambda pair: -max(pair[1].probabilities.values())):
        positive = one.probabilities["positive"]
        bar = "+" * round(20 * positive)
        print(f"{bar:-<20} {positive:4.0%} positive  {text}")


if __name__ == "__main__":
    main()
