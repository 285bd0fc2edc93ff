"""sentence-transformers' trainer, the encoder computed by fastbert: learn that two halves of a review belong together.

    python examples/sentence_transformers_training.py OUT [--small]

Needs sentence-transformers, accelerate and datasets: pip install 'sentence-transformers[train]'
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset
from reviews import reviews
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

import fastbert
from fastbert.assets import fetch


def main() -> None:
    """Train, save, and print how often the nearest second half is the right one, before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the model")
    parser.add_argument("--small", action="store_true", help="on little data")
    options = parser.parse_args()

    halves = []
    for review in reviews(300 if options.small else 3000, "imdb"):
        words = review["text"].split()[:60]
        halves.append((" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])))
    held_out, learned = halves[: len(halves) // 5], halves[len(halves) // 5 :]

    model = SentenceTransformer(str(fetch("minilm")))
    fastbert.accelerate(model)  # the one line
    before = share_found(model, held_out)
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            str(options.out / "run"),
            num_train_epochs=1,
            learning_rate=5e-5,
            per_device_train_batch_size=32,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"first": [a for a, _ in learned], "second": [b for _, b in learned]}),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    after = share_found(model, held_out)
    model.save_pretrained(str(options.out / "model"))  # a folder as any other: fastbert.encode reads it, too
    print(f"the right half is the nearest of {len(held_out)} in {before:.1%} before and {after:.1%} after training")


def share_found(model: SentenceTransformer, pairs: list[tuple[str, str]]) -> float:
    """How often the second half that is nearest to a first one is its own."""
    first, second = (model.encode(list(texts), normalize_embeddings=True) for texts in zip(*pairs, strict=True))
    return float(np.mean((first @ second.T).argmax(axis=1) == np.arange(len(pairs))))


if __name__ == "__main__":
    main()
