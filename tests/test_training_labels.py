"""What training makes of the labels and tags that files and folders have."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch
import transformers
from safetensors.torch import load_file

from fastbert.errors import ArgumentError, CheckpointError
from fastbert.tasks.classify import TextClassifier
from fastbert.tasks.tag import TextTagger
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


# ------------------------------------------------------------------------------------------------ labels of classify


def opinions(*labels: object) -> str:
    """JSON lines, in turns, of texts that give their label away."""
    texts = ("the film was fine", "the plot was awful", "the music was great", "a very dull story")
    rows = [{"text": texts[i % 4], "label": label} for i, label in enumerate(labels)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def names(folder: Path) -> list[str]:
    return list(json.loads((folder / "config.json").read_text())["id2label"].values())


def test_user_case_18_int_labels_order(learn: Learn, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    learn("classify", "a.jsonl", opinions(*[*range(12)] * 2))
    assert names(tmp_path / "out") == [str(i) for i in range(12)]
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.id2label[10] == "10" and theirs.label2id["2"] == 2
    assert not [one for one in recwarn if "labels" in str(one.message)]


@pytest.mark.parametrize(
    ("labels", "order", "said"),
    [
        ([1, 2, 10], ["1", "2", "10"], "not 0 to 2: output 0 is label 1, output 1 is label 2, output 2 is label 10"),
        ([-1, 1, 0], ["-1", "0", "1"], "not 0 to 2: output 0 is label -1"),
        ([5, 100], ["5", "100"], "not 0 to 1"),
        (["01", "1", "0"], ["0", "01", "1"], None),  # names, as one is no integer's
        (["b", "10", "9"], ["10", "9", "b"], None),
    ],
)
def test_labels_that_are_not_0_to_n(
    learn: Learn, tmp_path: Path, labels: list[Any], order: list[str], said: str | None, recwarn: Any
) -> None:
    learn("classify", "a.jsonl", opinions(*labels * 4))
    assert names(tmp_path / "out") == order
    spoken = [str(one.message) for one in recwarn if "the labels are" in str(one.message)]
    assert len(spoken) == (said is not None)
    assert said is None or said in spoken[0]


@pytest.fixture(scope="module")
def classifier(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a classifier by transformers, its labels named so."""

    def make(*labels: str) -> Path:
        out = tmp_path_factory.mktemp("classifier")
        config = transformers.AutoConfig.from_pretrained(
            folder, id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
        )
        transformers.BertForSequenceClassification(config).save_pretrained(out)
        (out / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
        return out

    return make


Classifier = Callable[..., Path]


@pytest.mark.parametrize(
    ("own", "labels", "gone_on_with", "said"),
    [
        (("LABEL_0", "LABEL_1"), [1, 0], True, None),
        (("LABEL_0", "LABEL_1"), ["1", "0"], True, None),
        (("LABEL_0", "LABEL_1"), ["LABEL_1", "LABEL_0"], True, None),
        (("bad", "good"), [0, 1], True, "number those of .*: 0 is 'bad', 1 is 'good'"),
        (("good", "bad"), ["bad", "good"], True, None),  # in the folder's order
        (("bad", "so", "good"), ["bad", "good"], True, None),  # some of them
        (("LABEL_0", "LABEL_1"), [1, 2], False, "not gone on with, .* its labels are LABEL_0, LABEL_1, and .* 1, 2"),
        (("bad", "good"), ["pos", "neg"], False, "its labels are bad, good, and those of .* neg, pos"),
        (("bad", "good"), ["bad", "good", "so"], False, "not gone on with"),
    ],
)
def test_user_case_42_head_thrown_away(
    learn: Learn, classifier: Classifier, tmp_path: Path, own: tuple[str, ...], labels: list[Any], gone_on_with: bool,
    said: str | None, recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    model = classifier(*own)
    learn("classify", "a.jsonl", opinions(*labels * 10), valid=opinions(*labels), model=str(model), lr=1e-12)
    before, after = (load_file(path / "model.safetensors")["classifier.weight"] for path in (model, tmp_path / "out"))
    assert torch.allclose(before, after, atol=1e-6) if gone_on_with else before.shape != after.shape or (
        not torch.allclose(before, after, atol=1e-2)
    )  # fmt: skip
    if gone_on_with:
        assert names(tmp_path / "out") == list(own)
    spoken = [str(one.message) for one in recwarn if re.search("number those|gone on with", str(one.message))]
    assert len(spoken) == (said is not None)
    if said is not None:
        assert re.search(said, spoken[0], re.DOTALL)


def test_a_number_means_an_output_of_the_folder(learn: Learn, classifier: Classifier, tmp_path: Path) -> None:
    """Not the place of a label among those that the file has."""
    model = classifier("bad", "so", "good")
    with pytest.warns(UserWarning, match="0 is 'bad', 2 is 'good'"):
        learn("classify", "a.jsonl", opinions(0, 2, 0, 2), model=str(model), epochs=40, lr=1e-2)
    [found] = TextClassifier.from_folder(tmp_path / "out").classify(["the plot was awful"], max_length=48)
    assert found.label == "good" and found.probabilities["so"] < 0.1


def test_a_tagger_goes_on_with_some_of_its_tags(learn: Learn, tmp_path: Path) -> None:
    learn("tag", "pos.txt", POS * 10)
    before = load_file(tmp_path / "out" / "model.safetensors")["classifier.weight"]
    learn("tag", "less.txt", "the DET\nfilm NOUN\n\n", model=str(tmp_path / "out"), out=str(tmp_path / "on"), lr=1e-12)
    assert torch.allclose(load_file(tmp_path / "on" / "model.safetensors")["classifier.weight"], before, atol=1e-6)


def test_user_case_47_empty_label_in_training(learn: Learn, tmp_path: Path) -> None:
    rows = "text,label\n" + "the film was fine,pos\nthe plot was awful,neg\n" * 10 + "the music,\n"
    with pytest.raises(ArgumentError, match=r"line 22: got an empty label"):
        learn("classify", "t.csv", rows)
    with pytest.raises(ArgumentError, match=r"valid_t.csv, line 22: got an empty label"):
        learn("classify", "t.csv", rows.replace("the music,\n", ""), valid=rows)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- nothing to learn from


@pytest.mark.filterwarnings("ignore::fastbert.errors.UntrainedWarning")
def test_user_case_09_mlm_nothing_to_mask(learn: Learn, tmp_path: Path) -> None:
    """Documents of unknown tokens only, which may not be masked, and without any token."""
    documents = "the film was fine\n" * 20 + "\U0001f600\n\u4f60\u597d\n\u043f\u0440\u0438\n\u200b\n"
    for i, batch_tokens in enumerate((8, 1024)):
        with pytest.warns(UserWarning, match="3 of 23 rows have only special or unknown tokens and are not read"):
            metrics = learn("mlm", "t.txt", documents, out=str(tmp_path / f"o{i}"), batch_tokens=batch_tokens)
        assert metrics["train_loss"] > 1
    for nothing in ("\U0001f600\n\U0001f680 \U0001f680\n", "\u200b\n\u200b\u200b\n"):
        with pytest.raises(ArgumentError, match="only special or unknown tokens; expected tokens to predict"):
            learn("mlm", "n.txt", nothing)
        with pytest.raises(ArgumentError, match=r"valid_v\.txt: got only special or unknown tokens"):
            learn("mlm", "v.txt", documents, valid=nothing)


@pytest.mark.filterwarnings("ignore::fastbert.errors.UntrainedWarning", "ignore:.*less than two sentences")
def test_pairs_without_a_token_to_predict(learn: Learn, tmp_path: Path) -> None:
    """They still teach which sentence is next; their batch has no masked token, and its loss is of that alone."""
    unknown = "\U0001f600\n\U0001f680 \U0001f680\n\n"
    documents = unknown * 12 + "the film\na plot\n\n" * 4
    metrics = learn("pretrain", "p.txt", documents, valid=documents, batch_tokens=8)
    losses = [json.loads(line) for line in (tmp_path / "out" / "losses.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in losses if "loss" in line)
    assert 0 < metrics["mlm_loss"] < 20 and 0 < metrics["next_sentence_loss"] < 5
    with pytest.raises(ArgumentError, match="tokens to predict"):
        learn("pretrain", "n.txt", unknown * 3, out=str(tmp_path / "no"))


@pytest.mark.filterwarnings("ignore::fastbert.errors.UntrainedWarning")
@pytest.mark.parametrize(
    ("task", "name", "content", "valid"),
    [
        ("classify", "two.jsonl", opinions("a", "b"), opinions("a")),  # batches of one, a validation file of one
        ("classify", "empty.jsonl", '{"text": "", "label": "a"}\n{"text": "\\u200b", "label": "b"}\n', None),
        ("classify", "unknown.jsonl", '{"text": "\U0001f600", "label": "a"}\n{"text": "x", "label": "b"}\n', None),
        ("tag", "one.txt", "the O\nada B-PER\n", "the O\n"),
        ("mlm", "one.txt", "the film\n", "a\n"),
    ],
)
def test_least_that_can_be_learned(
    learn: Learn, tmp_path: Path, task: str, name: str, content: str, valid: str | None
) -> None:
    metrics = learn(task, name, content, valid=valid, batch_tokens=1, epochs=2)
    assert metrics["finished"] and math.isfinite(metrics["train_loss"])
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("task", "name", "content"),
    [
        ("classify", "a.csv", ""),
        ("classify", "a.csv", "text,label\n"),
        ("classify", "a.jsonl", "\n\n"),
        ("classify", "a.json", "[]"),
        ("tag", "a.txt", "-DOCSTART- O\n\n"),
        ("tag", "a.jsonl", '{"tokens": [], "tags": []}\n'),
        ("mlm", "a.txt", " \n"),
        ("pretrain", "a.txt", ""),
    ],
)
def test_files_without_examples(learn: Learn, task: str, name: str, content: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no examples"):
        learn(task, name, content)
    assert not (tmp_path / "out").exists()


def test_nothing_learned_is_said(learn: Learn, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="every text of the validation file gets the label '[ab]': it has learned no"):
        learn("classify", "a.jsonl", opinions(*"ab" * 5), valid=opinions(*"ab"), lr=1e-12)
    lines = "the O\n\n" * 30 + "the B-PER\n\n"  # what differs is not in the words
    with pytest.warns(UserWarning, match="every word of the validation file gets the tag '.*': it has learned nothing"):
        learn("tag", "a.txt", lines, valid=lines, out=str(tmp_path / "tagger"))
