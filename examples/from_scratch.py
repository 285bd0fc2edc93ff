"""A small BERT from nothing: a vocabulary from reviews of films, then masked words and next sentences.

    python examples/from_scratch.py OUT             some minutes on a CPU; pip install matplotlib for the curve
    python examples/from_scratch.py OUT --small     less than a minute, and little is learned

Ends with 1 if the model predicts masked tokens no better than by how often each occurs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from reviews import reviews, write
from tokenizers import BertWordPieceTokenizer

from fastbert.backend import onednn_multiplies_bfloat16
from fastbert.checkpoints.special_tokens import BERT_NAMES
from fastbert.config import EncoderConfig
from fastbert.text.tokenizer import Tokenizer
from fastbert.training import Settings, scratch, train


def main() -> int:
    """Learn the vocabulary, then the model; print what it costs to predict a token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the data and the models; new or empty")
    parser.add_argument("--small", action="store_true", help="on little data")
    options = parser.parse_args()
    out: Path = options.out

    rows = reviews(800 if options.small else 12_500, "imdb")
    held_out, learned = rows[:500], rows[500:]
    learner = BertWordPieceTokenizer(lowercase=True)
    special = list(BERT_NAMES.values())
    texts = [row["text"] for row in learned]
    learner.train_from_iterator(texts, vocab_size=4000, special_tokens=special, show_progress=False)
    vocabulary = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    config = EncoderConfig(
        vocab_size=len(vocabulary),
        hidden_size=64 if options.small else 256,
        num_layers=2 if options.small else 4,
        num_heads=4,
        intermediate_size=256 if options.small else 1024,
        max_positions=128,
        hidden_dropout=0.0,  # so little text and so small a model have more to learn than to forget
        attention_dropout=0.0,
    )
    scratch(out / "untrained", vocabulary, config)
    entropy = unigram_entropy(Tokenizer.from_folder(out / "untrained"), [row["text"] for row in held_out])
    print(f"{len(vocabulary)} word pieces; by their frequencies alone a token costs {entropy:.2f} nats")

    settings = Settings(
        task="pretrain",
        model=str(out / "untrained"),
        train=write(learned, out / "train.jsonl"),
        valid=write(held_out, out / "valid.jsonl"),
        out=str(out / "trained"),
        epochs=6 if options.small else 2,
        lr=3e-3 if options.small else 1e-3,
        batch_tokens=1024 if options.small else 4096,
        max_length=128,
        dtype="bf16" if onednn_multiplies_bfloat16() else "fp32",
        warmup=0.05,
    )
    metrics = train(settings, progress=sys.stderr.isatty(), say=print)
    below = entropy - metrics["mlm_loss"]
    print(f"after {metrics['seconds']:.0f} s masked tokens cost {metrics['mlm_loss']:.2f} nats, {below:.2f} below")
    print(f"{metrics['next_sentence_accuracy']:.0%} of the next sentences are told right")
    return 0 if below > 0 else 1


def unigram_entropy(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Nats a token, by the frequencies of the texts themselves: what a model reaches that reads no context."""
    rows = tokenizer.encode_documents(texts, 128)
    ids = rows.ids[~np.isin(rows.ids, tokenizer.special_ids)]
    share = np.bincount(ids) / len(ids)
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


if __name__ == "__main__":
    sys.exit(main())
