"""A BERT of a few thousand parameters with its tokenizer, and toy tasks that it learns in seconds."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import torch

from fastbert.checkpoints.load import load, save
from fastbert.config import EncoderConfig, HeadConfig, ProblemType
from fastbert.model.body import BertModel
from fastbert.model.heads import BertForSequenceClassification

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PLAIN = ["film", "plot", "actor", "scene", "music", "story", "the", "a", "was", "and", "with", "very"]
GOOD, BAD = ["fine", "great", "lovely"], ["awful", "dull", "weak"]
PEOPLE, FAMILIES, PLACES = ["ada", "alan", "grace"], ["hopper", "turing"], ["paris", "oslo", "rome"]
VOCABULARY = [*SPECIAL, *PLAIN, *GOOD, *BAD, *PEOPLE, *FAMILIES, *PLACES, *".,()", "met", "in", "##s", "##burg"]


def make(folder: Path, *, dropout: float = 0.1, hidden_size: int = 32) -> Path:
    """Write a checkpoint folder, the same one each time."""
    config = EncoderConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        num_layers=2,
        num_heads=2,
        intermediate_size=48,
        max_positions=48,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save(BertModel(config), folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def with_prompts(folder: Path, **prompts: str) -> Path:
    """`make`, as a folder of sentence-transformers."""
    make(folder)
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"}]
    modules = [module | {"type": f"sentence_transformers.models.{module['type']}"} for module in modules]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def with_head(folder: Path, labels: int, problem: ProblemType | None = None) -> Path:
    """A classifier, the same one each time, beside the model that it is made of."""
    body = make(folder / "body")
    head = HeadConfig(tuple(f"LABEL_{i}" for i in range(labels)), problem)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        save(load(body, BertForSequenceClassification, head=head), folder / "model")
    return folder / "model"


def opinions(path: Path, count: int, seed: int) -> Path:
    """JSON lines of texts, one word of which gives the label away."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        label = draw.choice(["neg", "pos"])
        words = [*draw.choices(PLAIN, k=draw.randrange(1, 20)), draw.choice(GOOD if label == "pos" else BAD)]
        draw.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words), "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


def stories(path: Path, count: int, seed: int) -> Path:
    """Documents of one to seven sentences a line, an empty line between them; each document is full of one word."""
    draw = random.Random(seed)
    documents = []
    for _ in range(count):
        topic = draw.choice([*GOOD, *BAD, *PEOPLE])
        sentences = [[*draw.choices([*PLAIN, topic, topic], k=draw.randrange(1, 9)), topic] for _ in range(7)]
        documents.append("".join(" ".join(words) + "\n" for words in sentences[: draw.randrange(1, 8)]))
    path.write_text("\n".join(documents))
    return path


def names(path: Path, count: int, seed: int) -> Path:
    """CoNLL columns of sentences with people, of one or two words of several pieces, and places."""
    draw = random.Random(seed)
    lines = ["-DOCSTART- O", ""]
    for _ in range(count):
        for _ in range(draw.randrange(1, 4)):
            lines += [f"{word} O" for word in draw.choices(PLAIN, k=draw.randrange(4))]
            lines += [f"{draw.choice(PEOPLE)}s B-PER", *([f"{draw.choice(FAMILIES)} I-PER"] * draw.randrange(2))]
            lines += ["met O", "in O"]
            before, after = draw.choice([[], ["( O"]]), draw.choice([[], [") O"], [". O"], [", O"], [") O", ". O"]])
            lines += [*before, f"{draw.choice(PLACES)}burg B-LOC", *after]
        lines.append("")
    path.write_text("\n".join(lines))
    return path


def random_model(generator: torch.Generator, **options: Any) -> BertModel:
    """One in eval mode, every parameter of it off its initial value; `options` are an EncoderConfig's."""
    sizes = {"vocab_size": 50, "hidden_size": 48, "num_layers": 2, "num_heads": 3, "intermediate_size": 80}
    model = BertModel(EncoderConfig(**sizes | {"max_positions": 300} | options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
