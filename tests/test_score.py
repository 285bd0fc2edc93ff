"""Heads of one output and of several labels at once: cross-encoders, regressions, multi-label classifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastbert
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.model.heads import BertForSequenceClassification

PAIRS = [("the film", "was fine"), ("a", "dull plot , with a very lovely scene"), ("", "music")]


def logits(folder: Path, texts: list[Any]) -> Tensor:
    """float64, from the model by itself."""
    classifier = fastbert.load(folder, BertForSequenceClassification)
    tokenizer = fastbert.TextEncoder.from_folder(folder.parent / "body").tokenizer
    rows = []
    for text in texts:
        ids, types = tokenizer.encode([text], 48).packed([0])
        with torch.inference_mode():
            types = None if types is None else types[None]
            rows.append(classifier(ids[None], token_type_ids=types).logits[0].double())
    return torch.stack(rows)


def change(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize("file", ["config_sentence_transformers.json", "config.json", "config.json, of version 3"])
@pytest.mark.parametrize("name", [SIGMOID, IDENTITY, None])
def test_user_case_31_a_cross_encoder_gives_what_its_folder_says(file: str, name: str | None, tmp_path: Path) -> None:
    folder = tiny_bert.with_head(tmp_path, 1)
    if file == "config_sentence_transformers.json":
        change(folder / file, activation_fn=name, model_type="CrossEncoder")
    elif file == "config.json":
        change(folder / file, sentence_transformers={"activation_fn": name, "version": "4.0"})
    else:
        change(folder / "config.json", sbert_ce_default_activation_function=name)
    exact = logits(folder, PAIRS)[:, 0]
    got = fastbert.score(PAIRS, folder)
    assert got.dtype == np.float32
    assert np.allclose(got, (exact if name == IDENTITY else exact.sigmoid()).numpy(), atol=1e-5)


def test_user_case_31_a_regression_gives_its_output(tmp_path: Path) -> None:
    folder = tiny_bert.with_head(tmp_path, 1, "regression")
    texts = ["the film was fine", "a", ""]
    scorer = fastbert.TextScorer.from_folder(folder)
    assert np.allclose(scorer.score(texts), logits(folder, texts)[:, 0].numpy(), atol=1e-5)
    assert scorer.score([]).shape == (0,)
    with pytest.warns(UserWarning, match="1 text fills max_length=8"):
        scorer.score(["the film " * 20, "a"], max_length=8)
    with pytest.raises(ArgumentError, match="at most the model's 48 positions"):
        scorer.score(texts, max_length=49)


def test_user_case_31_classify_and_score_name_each_other(tmp_path: Path) -> None:
    one = tiny_bert.with_head(tmp_path / "one", 1)
    with pytest.raises(CheckpointError, match=r"1 outputs; expected a classifier of several labels\. fastbert\.score"):
        fastbert.classify(PAIRS, one)
    several = tiny_bert.with_head(tmp_path / "several", 3)
    with pytest.raises(CheckpointError, match=r"3 outputs; expected a head of one output\. Use fastbert\.classify"):
        fastbert.score(PAIRS, several)
    assert len(fastbert.classify(PAIRS, several)) == 3
    with pytest.raises(CheckpointError, match="no trained BertForSequenceClassification"):
        fastbert.score(PAIRS, tmp_path / "one" / "body")


def test_user_case_31_several_labels_at_once(tmp_path: Path) -> None:
    folder = tiny_bert.with_head(tmp_path, 3, "multi_label_classification")
    texts = ["the film was fine", "a dull plot"]
    for row, found in zip(logits(folder, texts).sigmoid(), fastbert.classify(texts, folder), strict=True):
        expected = {f"LABEL_{i}": value for i, value in enumerate(row.tolist())}
        assert found.probabilities == pytest.approx(expected, abs=1e-5)
        assert list(found.probabilities.values()) == sorted(found.probabilities.values(), reverse=True)
        assert found.label == max(expected, key=lambda label: expected[label])


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"sentence_transformers": {"activation_fn": "my.Sigmoid"}}, "activation_fn: got 'my.Sigmoid'"),
        ("config.json", {"sentence_transformers": []}, "sentence_transformers: got"),
        ("config.json", {"sbert_ce_default_activation_function": 3}, "sbert_ce_default_activation_function: got 3"),
        ("config_sentence_transformers.json", {"model_type": "SentenceTransformer"}, "model_type"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name"),
    ],
)
def test_what_a_cross_encoder_can_not_ask_for(file: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tiny_bert.with_head(tmp_path, 1)
    change(folder / file, **fields)
    with pytest.raises(CheckpointError, match=message):
        fastbert.score(PAIRS, folder)


@pytest.mark.parametrize("name", ["Sigmoid", "Identity"])
def test_user_case_31_scores_are_those_of_sentence_transformers(name: str, tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers", reason="compares with sentence-transformers")
    folder = tiny_bert.with_head(tmp_path, 1)
    model = theirs.CrossEncoder(str(folder), device="cpu", activation_fn=getattr(torch.nn, name)())
    model.save(str(tmp_path / "saved"))
    assert np.abs(fastbert.score(PAIRS, tmp_path / "saved") - model.predict(PAIRS)).max() < 2e-5


def test_user_case_31_several_labels_are_as_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    folder = tiny_bert.with_head(tmp_path, 3, "multi_label_classification")
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    [found] = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(
        ["a dull plot"]
    )
    [ours] = fastbert.classify(["a dull plot"], folder)
    assert ours.probabilities == pytest.approx({one["label"]: one["score"] for one in found}, abs=1e-5)


def test_a_score_that_overflows_is_named(tmp_path: Path) -> None:
    folder = tiny_bert.with_head(tmp_path, 1, "regression")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "classifier.weight": torch.full_like(tensors["classifier.weight"], 3e38)}, path)
    scorer = fastbert.TextScorer.from_folder(folder, device="cpu")
    with pytest.raises(BackendError, match=r"texts\[0\]: got a result of NaN or infinity"):
        scorer.score(PAIRS)
    assert scorer.score([]).shape == (0,)


DOCUMENTS = ["was fine", "dull plot , with a very lovely scene", "music", "the actor", "was fine", ""]


def test_rerank_orders_by_the_scores(tmp_path: Path) -> None:
    folder = tiny_bert.with_head(tmp_path, 1)
    scorer = fastbert.TextScorer.from_folder(folder, device="cpu")
    scores = scorer.score([("the film", document) for document in DOCUMENTS])
    found = scorer.rerank("the film", (document for document in DOCUMENTS))
    assert [hit.row for hit in found] == sorted(range(6), key=lambda row: (-scores[row], row))
    assert all(hit.text == DOCUMENTS[hit.row] and hit.score == pytest.approx(scores[hit.row]) for hit in found)
    assert scores[0] == scores[4] and [hit.row for hit in found if hit.text == "was fine"] == [0, 4]
    for count in range(1, 8):
        assert scorer.rerank("the film", DOCUMENTS, top_k=count) == found[:count]
    assert fastbert.rerank("the film", np.array(DOCUMENTS), folder, top_k=2) == found[:2]
    assert scorer.rerank("the film", []) == []


def test_rerank_is_that_of_sentence_transformers(tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers", reason="compares with sentence-transformers")
    model = theirs.CrossEncoder(str(tiny_bert.with_head(tmp_path, 1)), device="cpu")
    model.save(str(tmp_path / "saved"))
    expected = model.rank("the film", DOCUMENTS[:4], return_documents=True)
    found = fastbert.rerank("the film", DOCUMENTS[:4], tmp_path / "saved")
    assert [(hit.row, hit.text) for hit in found] == [(one["corpus_id"], one["text"]) for one in expected]
    assert [hit.score for hit in found] == pytest.approx([float(one["score"]) for one in expected], abs=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": ["a"]}, r"query: got a list; expected a string"),
        ({"documents": "a text"}, r"documents: got a single string"),
        ({"documents": ["a", ("b", "c")]}, r"documents\[1\]: got a tuple; expected a string"),
        ({"top_k": 0}, r"top_k: got 0; expected 1 or more"),
        ({"top_k": 1.5}, r"top_k: got 1.5; expected a whole number"),
    ],
)
def test_bad_arguments_of_rerank(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    scorer = fastbert.TextScorer.from_folder(tiny_bert.with_head(tmp_path, 1))
    with pytest.raises(ArgumentError, match=message):
        scorer.rerank(**{"query": "a", "documents": ["b"], **arguments})
