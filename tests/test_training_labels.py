"""What training makes of the labels and tags that files and folders have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import transformers

from fastbert.errors import ArgumentError, CheckpointError
from fastbert.tasks import TextTagger
from fastbert.training import Settings, train

pytestmark = pytest.mark.filterwarnings("ignore:no losses.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.make(tmp_path_factory.mktemp("tiny"), dropout=0.0)


@pytest.fixture
def learn(folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Train on the contents of files, into `tmp_path / "out"`."""

    def learn(task: Any, name: str, content: str, valid: str | None = None, **changes: Any) -> dict[str, Any]:
        (tmp_path / name).write_text(content)
        if valid is not None:
            (tmp_path / f"valid_{name}").write_text(valid)
        given: dict[str, Any] = {"epochs": 1, "lr": 3e-3, "batch_tokens": 60, "max_length": 48, "model": str(folder)}
        given |= {"valid": None if valid is None else str(tmp_path / f"valid_{name}")}
        return train(
            Settings(task=task, train=str(tmp_path / name), **{**given, "out": str(tmp_path / "out"), **changes})
        )

    return learn


Learn = Callable[..., dict[str, Any]]

POS = "the DET\nfilm NOUN\nwas VERB\nvery ADV\nfine ADJ\n\na DET\nplot NOUN\nwas VERB\nawful ADJ\n\n"


def test_user_case_14_tags_without_prefix(learn: Learn, tmp_path: Path) -> None:
    metrics = learn("tag", "pos.txt", POS * 30, valid=POS, epochs=4, lr=1e-2)
    assert metrics["accuracy"] == metrics["f1"] == metrics["precision"] == metrics["recall"] == 1.0
    tagger = TextTagger.from_folder(tmp_path / "out", device="cpu")
    [found] = tagger.tag(["the film was very fine"], max_length=48)
    kinds = [(one.kind, one.text) for one in found]
    assert kinds == [("DET", "the"), ("NOUN", "film"), ("VERB", "was"), ("ADV", "very"), ("ADJ", "fine")]
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    pipe = transformers.pipeline(
        "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple", device="cpu"
    )
    assert [(one["entity_group"], one["word"]) for one in pipe("the film was very fine")] == kinds


def test_plain_tags_with_an_outside_are_entities(learn: Learn, tmp_path: Path) -> None:
    """As transformers' pipeline has it: neighbours of one tag are one."""
    lines = "ada PER\nhopper PER\nmet O\nin O\nparis LOC\n\ngrace PER\nmet O\nalan PER\n\n"
    metrics = learn("tag", "pii.txt", lines * 30, valid=lines, epochs=6, lr=1e-2)
    assert metrics["f1"] == 1.0
    [found] = TextTagger.from_folder(tmp_path / "out", device="cpu").tag(["ada hopper met in paris"], max_length=48)
    assert [(one.kind, one.text) for one in found] == [("PER", "ada hopper"), ("LOC", "paris")]


def test_entities_of_bioes_tags(learn: Learn, tmp_path: Path) -> None:
    lines = "ada B-PER\nhopper E-PER\nmet O\nin O\nparis S-LOC\n\nmet O\ngrace S-PER\nalan S-PER\n\n"
    assert learn("tag", "bioes.txt", lines * 30, valid=lines, epochs=8, lr=1e-2)["f1"] == 1.0
    [found] = TextTagger.from_folder(tmp_path / "out", device="cpu").tag(
        ["ada hopper met in paris grace alan"], max_length=48
    )
    assert [one.text for one in found][:2] == ["ada hopper", "paris"]


@pytest.mark.parametrize(
    ("valid", "message"),
    [("the O\n", None), ("the X\n", None), ("the B-X\n", "tags beside 'ADJ'"), ("the DET\nfilm\n", "line 2")],
)
def test_tags_of_the_validation_file(learn: Learn, valid: str, message: str | None) -> None:
    if message is None:  # a tag never trained on is missed
        assert learn("tag", "pos.txt", POS, valid=valid)["accuracy"] == 0.0
    else:
        with pytest.raises(ArgumentError, match=message):
            learn("tag", "pos.txt", POS, valid=valid)


def test_one_tag_is_nothing_to_learn(learn: Learn) -> None:
    with pytest.raises(ArgumentError, match="one tag, 'O'; expected at least two"):
        learn("tag", "one.txt", "the O\nfilm O\n\n")


def test_a_tagger_of_odd_tags_is_refused(learn: Learn, tmp_path: Path) -> None:
    learn("tag", "pos.txt", POS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["id2label"]["0"] = "B-DET"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape("the tag '") + ".*or tags of which none has such a prefix"):
        TextTagger.from_folder(tmp_path / "out")
