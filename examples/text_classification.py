"""Fine-tune MiniLM to tell good reviews of films from bad ones, and label texts with it.

    python examples/text_classification.py OUT             some minutes on a CPU
    python examples/text_classification.py OUT --small     seconds

OUT/model is then a Hugging Face checkpoint: `examples/sentiment.py OUT/model` and `transformers.pipeline` read it too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reviews import reviews, write

import fastbert
from fastbert.assets import fetch
from fastbert.training import Settings, train

TEXTS = ["A warm and funny film with two great leads.", "Two hours of my life that I will never get back."]


def main() -> None:
    """Train, measure, label."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the data and the model")
    parser.add_argument("--small", action="store_true", help="on little data")
    options = parser.parse_args()

    rows = reviews(600 if options.small else 8500)
    held_out = len(rows) // 6
    settings = Settings(
        task="classify",
        model=str(fetch("minilm")),
        train=write(rows[held_out:], options.out / "train.jsonl"),
        valid=write(rows[:held_out], options.out / "valid.jsonl"),
        out=str(options.out / "model"),
        epochs=2,
        lr=2e-4 if options.small else 5e-5,
        max_length=64,
    )
    metrics = train(settings, progress=sys.stderr.isatty(), say=print)
    print(f"{metrics['accuracy']:.1%} of {held_out} reviews that it never saw are told right")

    for text, found in zip(TEXTS, fastbert.classify(TEXTS, options.out / "model"), strict=True):
        print(f"{found.label:8} {found.probabilities[found.label]:.2f}  {text}")


if __name__ == "__main__":
    main()
