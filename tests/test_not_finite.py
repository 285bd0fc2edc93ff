"""NaN and infinity: in a checkpoint, and in results, where they are errors and no answers."""

import re

import numpy as np
import pytest
import safetensors.torch
import tiny_bert
import torch

import fastbert
from fastbert.checkpoints.load import save
from fastbert.config import HeadConfig
from fastbert.errors import BackendError, CheckpointError
from fastbert.model.heads import BertForSequenceClassification, BertForTokenClassification

TASKS = {
    "encode": (None, fastbert.TextEncoder, lambda made, texts: made.encode(texts)),
    "classify": (BertForSequenceClassification, fastbert.TextClassifier, lambda made, texts: made.classify(texts)),
    "tag": (BertForTokenClassification, fastbert.TextTagger, lambda made, texts: made.tag(texts)),
}


@pytest.fixture
def folder(request, tmp_path):
    """Of the task's model."""
    kind = TASKS[request.param][0]
    made = tiny_bert.make(tmp_path)
    if kind is not None:
        labels = ("O", "B-PER") if request.param == "tag" else ("bad", "good")
        save(kind(fastbert.load(made).config, HeadConfig(labels)), made)
    return made


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("folder", TASKS, indirect=True)
def test_user_case_p5_a_checkpoint_with_a_nan_is_found_when_it_is_loaded(folder, number, request):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    key = next(key for key in tensors if key.endswith("encoder.layer.0.output.dense.bias"))
    tensors[key][3] = number
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    kind = TASKS[request.node.callspec.params["folder"]][1]
    with pytest.raises(CheckpointError, match=re.escape(key)) as error:
        kind.from_folder(folder)
    assert f"1 of {tensors[key].numel()} numbers" in str(error.value)


def test_large_weights_are_no_infinity(tmp_path):
    """Their sum is, in half precision and in single."""
    folder = tiny_bert.make(tmp_path)
    model = fastbert.load(folder)
    with torch.no_grad():
        model.embeddings.position.weight.fill_(torch.finfo(torch.float32).max)
    save(model, folder)
    fastbert.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("folder", TASKS, indirect=True)
def test_user_case_p5_a_result_that_is_not_finite_is_an_error(folder, dtype, request):
    """A word whose row overflows, in the second text; the first is answered."""
    _, kind, run = TASKS[request.node.callspec.params["folder"]]
    made = kind.from_folder(folder)
    made.model.to(dtype)
    body = getattr(made.model, "bert", made.model)
    word = tiny_bert.VOCABULARY.index("plot")
    with torch.no_grad():
        body.embeddings.word.weight[word] = torch.inf
    assert len(run(made, ["the film"])) == 1
    with pytest.raises(BackendError, match=re.escape("texts[1]: got a result of NaN or infinity")):
        run(made, ["the film", "a plot", "the actor"])


def test_streams_are_checked_too(tmp_path):
    made = fastbert.TextEncoder.from_folder(tiny_bert.make(tmp_path))
    with torch.no_grad():
        made.model.embeddings.word.weight[tiny_bert.VOCABULARY.index("plot")] = torch.nan
    stream = made.encode_stream(["the film", "a plot"], texts_at_once=1)
    assert np.isfinite(next(stream)).all()
    with pytest.raises(BackendError, match="NaN"):
        next(stream)
