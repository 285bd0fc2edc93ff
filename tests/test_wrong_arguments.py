"""Arguments of another kind than meant: an error of ours that names them, and never a right-looking answer."""

from __future__ import annotations

import re
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from torch import nn

import fastbert
from fastbert.checkpoints.load import load, save
from fastbert.config import HeadConfig
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.model.encoder import Encoder
from fastbert.model.heads import BertForSequenceClassification, BertForTokenClassification
from fastbert.training import Settings, train


class Table:
    """A data frame as pandas has it: to go through it gives the columns' names."""

    ndim = 2

    def __iter__(self) -> Iterator[str]:
        return iter(["text", "label"])


TEXTS = {
    "a dict": {"text": ["a film"]},
    "a mapping": UserDict(text=["a film"]),
    "a table": Table(),
    "None": None,
    "a number": 3,
    "a path": Path("texts.txt"),
    "bytes": b"a film",
    "an array without axes": np.array("a film"),
    "an array of two axes": np.array([["a film"]]),
    "a string of numpy": np.str_("a film"),
}


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """A task's model, loaded."""
    kind: type[Any] = request.param
    folder = tiny_bert.make(tmp_path)
    heads = {
        fastbert.TextClassifier: (BertForSequenceClassification, ("bad", "good")),
        fastbert.TextScorer: (BertForSequenceClassification, ("score",)),
        fastbert.TextTagger: (BertForTokenClassification, ("O", "B-PER")),
    }
    if kind in heads:
        head, labels = heads[kind]
        save(head(load(folder).config, HeadConfig(labels)), folder)
    return kind.from_folder(folder)


CALLS = [
    (fastbert.TextEncoder, "encode", {}),
    (fastbert.TextEncoder, "encode", {"prompt": "a"}),
    (fastbert.TextEncoder, "encode_stream", {}),
    (fastbert.TextClassifier, "classify", {}),
    (fastbert.TextScorer, "score", {}),
    (fastbert.TextTagger, "tag", {}),
]


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(("made", "call", "more"), CALLS, indirect=["made"])
def test_what_is_no_series_of_texts_is_refused(made: Any, call: str, more: dict[str, Any], texts: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^texts: got .*; expected a list of strings"):
        getattr(made, call)(texts, **more)


@pytest.mark.parametrize("made", [fastbert.TextEncoder], indirect=True)
def test_texts_come_in_anything_of_one_axis(made: fastbert.TextEncoder) -> None:
    class ByIndex:
        def __getitem__(self, i: int) -> str:
            return ["a film", "the plot"][i]

    expected = made.encode(["a film", "the plot"])
    for texts in (ByIndex(), np.array(["a film", "the plot"]), {"a film": 1, "the plot": 2}.keys()):
        assert np.array_equal(made.encode(texts), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [3, None, b"a", ["a"], ("a", "b", "c"), np.array(["a"])])
@pytest.mark.parametrize("made", [fastbert.TextEncoder], indirect=True)
def test_the_first_text_is_not_measured_by_itself(made: fastbert.TextEncoder, text: Any) -> None:
    with pytest.raises(ArgumentError, match=r"texts\[0\]: got a .*; expected a string, or a pair of strings\."):
        made.encode([text, "a"])


@pytest.mark.parametrize(("name", "value"), [("normalize", "no"), ("normalize", 1), ("prompt", 3), ("prompt", ["a"])])
@pytest.mark.parametrize("made", [fastbert.TextEncoder], indirect=True)
def test_options_of_another_type(made: fastbert.TextEncoder, name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"{name}: got {value!r}")):
        made.encode(["a"], **{name: value})


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", 99, [1]])
def test_a_device_that_torch_has_not(device: Any, tmp_path: Path) -> None:
    folder = tiny_bert.make(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\na,b\nc,d\n")
    settings = Settings(task="classify", model=folder, train=tmp_path / "train.csv", out=tmp_path / "out")
    for call in (
        lambda: load(folder, device=device),
        lambda: fastbert.TextEncoder.from_folder(folder, device=device),
        lambda: fastbert.TextClassifier.from_folder(folder, device=device),
        lambda: train(settings, device=device),
    ):
        with pytest.raises(ArgumentError, match=re.escape(f"device: got {device!r}; expected one that this torch")):
            call()


@pytest.mark.parametrize("kind", ["BertForMaskedLM", None, nn.Linear, HeadConfig])
def test_a_kind_that_is_no_class_of_ours(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"kind: got .*; expected EncoderModel or one of fastbert.EncoderFor"):
        load(tiny_bert.make(tmp_path), kind)


def test_what_can_not_be_saved(tmp_path: Path) -> None:
    folder = tiny_bert.make(tmp_path / "model")
    model = load(folder)
    for other in (None, "copy", nn.Linear(2, 2), model.encoder, fastbert.TextEncoder.from_folder(folder)):
        with pytest.raises(ArgumentError, match=r"model: got a .*; expected an EncoderModel of fastbert"):
            save(other, tmp_path / "copy")  # type: ignore[arg-type]
    for path in (None, 3, b"copy"):
        with pytest.raises(ArgumentError, match=r"folder: got a .*; expected a path"):
            save(model, path)  # type: ignore[arg-type]
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("module", ["None", "ours", "of another family"])
def test_what_is_no_encoder_of_transformers(module: str, tmp_path: Path) -> None:
    class Other(nn.Module):
        layer = nn.ModuleList()

    given: Any = {"None": None, "ours": load(tiny_bert.make(tmp_path)).encoder, "of another family": Other()}[module]
    with pytest.raises(CheckpointError, match=r"module: got .*; expected a BertEncoder of transformers"):
        Encoder.from_hf(given)


def test_what_can_not_be_quantized(tmp_path: Path) -> None:
    for other in (None, fastbert.TextEncoder.from_folder(tiny_bert.make(tmp_path))):
        with pytest.raises(ArgumentError, match=r"model: got a .*; expected a module with a fastbert.Encoder"):
            fastbert.quantize(other)  # type: ignore[type-var]


@pytest.mark.parametrize("made", [fastbert.TextScorer], indirect=True)
def test_a_score_that_is_not_finite_is_an_error(made: fastbert.TextScorer) -> None:
    """sentence-transformers #3233: a cross-encoder in half precision gives NaN, silently."""
    with torch.no_grad():
        made.model.bert.embeddings.word.weight[tiny_bert.VOCABULARY.index("plot")] = torch.nan
    assert np.isfinite(made.score([("the film", "a")])).all()
    with pytest.raises(BackendError, match=re.escape("texts[1]: got a result of NaN or infinity")):
        made.score([("the film", "a"), ("a plot", "a")])
