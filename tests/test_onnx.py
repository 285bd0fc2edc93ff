"""Checkpoints as ONNX: what onnxruntime computes is what the model computes, and else nothing is written."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from command_line import Run
from test_sentence import sentence_folder
from torch import nn

import fastbert
from fastbert.checkpoints import onnx as module
from fastbert.errors import ArgumentError, BackendError, CheckpointError, MissingError
from fastbert.tasks.encode import TextEncoder

for name in ("onnx", "onnxscript"):
    pytest.importorskip(name, reason="torch writes ONNX by it")
onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was written")
pytestmark = [
    pytest.mark.filterwarnings("ignore:# The axis name"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BATCHES = ((3, 7), (1, 2), (6, 33))


def written(folder: Path, out: Path) -> Any:
    fastbert.convert(folder, out, to="onnx")
    return onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])


def batch(config: Any, shape: tuple[int, int], names: list[str]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(shape[1])
    ids = torch.randint(5, config.vocab_size, shape, generator=draw)
    mask = torch.ones_like(ids)
    for row in range(1, shape[0]):
        mask[row, max(1, shape[1] - 2 * row) :] = 0
    ids[mask == 0] = config.pad_token_id or 0
    types = torch.randint(2, shape, generator=draw)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: given[name] for name in names}


FAMILIES = ["Bert", "Electra", "Roberta", "DistilBert", "Albert", "ModernBert", "MPNet", "NomicBert", "Gte"]
HEADS = {
    "Model": ["last_hidden_state"],
    "ForMaskedLM": ["logits"],
    "ForSequenceClassification": ["logits"],
    "ForTokenClassification": ["logits"],
    "ForQuestionAnswering": ["start_logits", "end_logits"],
}
CASES = [
    pytest.param(family, head, marks=[] if (family, head) == ("Bert", "Model") else pytest.mark.long)
    for family in FAMILIES
    for head in HEADS
]


@pytest.mark.parametrize(("family", "head"), CASES)
def test_as_transformers(family: str, head: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="makes the model, and computes it")
    from test_families import theirs_of

    theirs = theirs_of(family, head)
    theirs.save_pretrained(tmp_path / "model")
    session = written(tmp_path / "model", tmp_path / "out")
    names = [one.name for one in session.get_inputs()]
    assert ("token_type_ids" in names) == (family in ("Bert", "Electra", "Albert", "NomicBert"))
    outputs = [one.name for one in session.get_outputs()]
    assert outputs[: len(HEADS[head])] == HEADS[head]
    for shape in BATCHES:
        given = batch(fastbert.load(tmp_path / "model").config, shape, names)
        with torch.inference_mode():
            expected = theirs(**given)
        found = session.run(outputs, {name: tensor.numpy() for name, tensor in given.items()})
        for name, got in zip(outputs, found, strict=True):
            wanted = getattr(expected, name).numpy()
            assert got.shape == wanted.shape
            if name not in ("pooler_output",) and head != "ForSequenceClassification":
                got, wanted = got[given["attention_mask"] == 1], wanted[given["attention_mask"] == 1]
            assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_jinas_bias_by_distance(tmp_path: Path) -> None:
    from fastbert.config import EncoderConfig
    from fastbert.model.body import EncoderModel

    generator = torch.Generator().manual_seed(0)
    config = EncoderConfig(50, 48, num_layers=2, num_heads=3, intermediate_size=80, max_positions=40, alibi=True)
    model = EncoderModel(config, pooler=False).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    recorded = module._Recorded(model)
    for shape in BATCHES:
        given = batch(config, shape, list(recorded.inputs))
        with torch.inference_mode():
            [got], expected = recorded(**given), model(**given).last_hidden_state
        is_token = given["attention_mask"] == 1
        torch.testing.assert_close(got[is_token], expected[is_token], atol=1e-5, rtol=0)


@pytest.mark.long
def test_embeddings_of_sentence_transformers_come_from_it(tmp_path: Path) -> None:
    """What goes beside model.onnx is what tells how embeddings are made of it."""
    folder = sentence_folder(tiny_bert.make(tmp_path / "model"), "Normalize")
    session = written(folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "1_Pooling", "config.json", "model.onnx", "modules.json", "vocab.txt"
    }  # fmt: skip
    encoder = TextEncoder.from_folder(folder, device="cpu")
    tokens = encoder.tokenizer.encode(["the film was great"], 48)
    ids = tokens.ids[None].astype(np.int64)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    mean = session.run(["last_hidden_state"], given)[0].mean(1)
    expected = encoder.encode(["the film was great"])
    np.testing.assert_allclose(mean / np.linalg.norm(mean), expected, atol=1e-5)


@pytest.mark.long
def test_half_precision_is_written_in_float32(tmp_path: Path) -> None:
    model = fastbert.load(tiny_bert.make(tmp_path / "model"))
    fastbert.save(model.bfloat16(), tmp_path / "half")
    (tmp_path / "half" / "vocab.txt").write_bytes((tmp_path / "model" / "vocab.txt").read_bytes())
    session = written(tmp_path / "half", tmp_path / "out")
    assert {one.type for one in session.get_outputs()} == {"tensor(float)"}


def test_what_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_bert.make(tmp_path / "model")
    attend = module.padded.Grid.attend

    def without_mask(grid: Any, *arguments: Any) -> torch.Tensor:
        return attend(module.padded.Grid(torch.ones_like(grid.is_token), grid.angles), *arguments)

    monkeypatch.setattr(module.padded.Grid, "attend", without_mask)
    with pytest.raises(BackendError, match=r"onnxruntime: got last_hidden_state that differs by .*; expected at most"):
        fastbert.convert(folder, tmp_path / "out", to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_can_not_be_written(tmp_path: Path) -> None:
    folder = tiny_bert.make(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastbert.convert(folder, tmp_path / "int8", dtype="int8")
    with pytest.raises(ArgumentError, match=r"which is in int8; expected a folder in floats"):
        fastbert.convert(tmp_path / "int8", tmp_path / "out", to="onnx")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(CheckpointError, match=r"no trained BertForSequenceClassification, which config.json names"):
        fastbert.convert(folder, tmp_path / "out", to="onnx")


@pytest.mark.parametrize("changes", [{}, {"conv_kernel_size": 3}])
def test_deberta_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="makes the model")
    from test_families import theirs_of

    theirs_of("DebertaV2", **changes).save_pretrained(tmp_path / "model")
    with pytest.raises(ArgumentError, match=r"of a model with (disentangled attention|a convolution)"):
        fastbert.convert(tmp_path / "model", tmp_path / "out", to="onnx")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_library_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingError, match=rf"{name}: got a library that is not installed.*the extra `onnx`"):
        fastbert.convert(tiny_bert.make(tmp_path / "model"), tmp_path / "out", to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.long
def test_a_model_of_no_layers(tmp_path: Path) -> None:
    from fastbert.config import EncoderConfig
    from fastbert.model.body import BertModel

    sizes = {"num_layers": 0, "num_heads": 2, "intermediate_size": 48}
    fastbert.save(BertModel(EncoderConfig(50, 32, **sizes)), tmp_path / "model")  # type: ignore[arg-type]
    assert isinstance(module._model(tmp_path / "model"), nn.Module)
    written(tmp_path / "model", tmp_path / "out")


def test_on_the_command_line(run: Run, tmp_path: Path) -> None:
    folder = tiny_bert.make(tmp_path / "model")
    result = run("convert", folder, tmp_path / "out", "--to", "onnx")
    assert (result.code, result.out, result.err) == (0, b"", "")
    assert (tmp_path / "out" / "model.onnx").exists()
    refused = run("convert", folder, tmp_path / "out", "--to", "onnx")
    assert refused.code == 2 and "which is there; expected a new folder" in refused.err
