"""Folders written anew: dtypes, shards, int8 that stays int8."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from safetensors.torch import load_file, save_file
from test_sentence import sentence_folder, write

import fastbert
from fastbert.checkpoints import files
from fastbert.checkpoints.int8 import FIELD, MARK
from fastbert.config import EncoderConfig, HeadConfig
from fastbert.cpu.int8 import pair_sums
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.model.body import BertModel
from fastbert.run.eight_bits import Int8Linear
from fastbert.tasks.encode import TextEncoder

TEXTS = ["the film was great", "a", "ada hopper met alan turing in paris , and the story was very lovely ."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tiny_bert.make(tmp_path / "model")
    (folder / "README.md").write_text("# A model\n")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_dtypes(name: Any, dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    before = files.read_tensors(folder)
    fastbert.convert(folder, tmp_path / "out", dtype=name)
    after = files.read_tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == dtype and torch.equal(after[key], tensor.to(dtype))
    assert config_of(tmp_path / "out") == {**config_of(folder), "dtype": str(dtype).removeprefix("torch.")}
    assert names(tmp_path / "out") == ["README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert next(fastbert.load(tmp_path / "out").parameters()).dtype == dtype
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    fastbert.convert(tmp_path / "out", tmp_path / "back", dtype="fp32")
    for key, tensor in files.read_tensors(tmp_path / "back").items():
        assert torch.equal(tensor, before[key].to(dtype).float())


def test_transformers_reads_it(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="reads what was written")
    fastbert.convert(folder, tmp_path / "out", dtype="bf16", shard_size=4000)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    expected = fastbert.load(folder).embeddings.word.weight.bfloat16()
    assert torch.equal(model.embeddings.word_embeddings.weight, expected)


@pytest.mark.parametrize(
    ("size", "most"), [(4000, 4000), ("4000", 4000), ("4KB", 4000), ("8 KiB", 8192), ("1gb", 10**9), (1, 1)]
)
def test_shards(size: int | str, most: int, folder: Path, tmp_path: Path) -> None:
    before = files.read_tensors(folder)
    fastbert.convert(folder, tmp_path / "out", shard_size=size)
    shards = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert (len(shards) == 1) == (most == 10**9) == (tmp_path / "out" / "model.safetensors").exists()
    for shard in shards:
        assert sum(tensor.nbytes for tensor in shard.values()) <= most or len(shard) == 1
    after = files.read_tensors(tmp_path / "out")
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert config_of(tmp_path / "out") == config_of(folder)
    if most < 10**9:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in before.values())}
        fastbert.convert(tmp_path / "out", tmp_path / "whole")
        assert names(tmp_path / "whole") == names(folder)


def pickled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = tensors["embeddings.word_embeddings.weight"]  # in the same memory
    tensors["cls.predictions.bias"] = torch.zeros(len(tensors["embeddings.word_embeddings.weight"]))
    tensors["pooler.dense.weight"] = tensors["pooler.dense.weight"].T.contiguous().T
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for name in ("model.onnx", "tf_model.h5", "flax_model.msgpack"):
        (folder / name).write_text("weights")


def test_a_pickle_with_tensors_in_one_memory(folder: Path, tmp_path: Path) -> None:
    pickled(folder)
    before = files.read_tensors(folder)
    fastbert.convert(folder, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert names(tmp_path / "out") == ["README.md", "config.json", "model.safetensors", "vocab.txt"]


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_folders_of_sentence_transformers(transformer: str, folder: Path, tmp_path: Path) -> None:
    if transformer:
        (folder / transformer).mkdir()
        for name in ("config.json", "model.safetensors", "vocab.txt"):
            (folder / name).rename(folder / transformer / name)
    sentence_folder(folder, "Dense", "Normalize", transformer=transformer)
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "the "}})
    fastbert.convert(folder, tmp_path / "out", dtype="bf16", shard_size="4KB")
    left_out = str(Path(transformer) / "model.safetensors")
    expected = {name for name in names(folder) if name != left_out}
    assert {name for name in names(tmp_path / "out") if "model-0" not in name and "index" not in name} == expected
    dense = Path("2_Dense") / "model.safetensors"
    assert (tmp_path / "out" / dense).read_bytes() == (folder / dense).read_bytes()
    got = TextEncoder.from_folder(tmp_path / "out", dtype="fp32", device="cpu").encode_query(TEXTS)
    assert np.abs(got - TextEncoder.from_folder(folder, device="cpu").encode_query(TEXTS)).max() < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "fp8"}, r"dtype: got 'fp8'; expected one of fp32, bf16, fp16, int8"),
        ({"to": "gguf"}, r"to: got 'gguf'; expected one of safetensors, onnx"),
        ({"to": "onnx", "dtype": "fp16"}, r"dtype: got 'fp16'; expected none for ONNX"),
        ({"to": "onnx", "shard_size": 3}, r"shard_size: got 3; expected none for ONNX"),
        ({"shard_size": 0}, r"shard_size: got 0; expected a positive number of bytes"),
        ({"shard_size": "2 potatoes"}, r"shard_size: got '2 potatoes'"),
        ({"shard_size": True}, r"shard_size: got True"),
        ({"out": "model"}, r"out: got .*model, which is there; expected a new folder, or an empty one"),
        ({"out": "model/vocab.txt"}, r"out: got .*vocab.txt, which is there"),
        ({"out": "no/out"}, r"out: got no folder .*no; expected"),
        ({"out": 5}, r"folder: got a int; expected a path"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    before = names(tmp_path)
    out = arguments.get("out", "out")
    arguments = {**arguments, "out": tmp_path / out if isinstance(out, str) else out}
    with pytest.raises(ArgumentError, match=message):
        fastbert.convert(folder, **arguments)
    assert names(tmp_path) == before


def test_folders_that_another_can_not_take_the_place_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "empty"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", tmp_path / "here"):
        with pytest.raises(ArgumentError, match=r"out: got .*here, the working folder or a mount"):
            fastbert.convert(folder, out)
    for link, to in (("to_empty", "empty"), ("to_nothing", "new"), ("loop", "loop")):
        (tmp_path / link).symlink_to(to)
    with pytest.raises(ArgumentError, match=r"out: got .*loop, which is there"):
        fastbert.convert(folder, tmp_path / "loop")
    for link in ("to_empty", "to_nothing"):
        fastbert.convert(folder, tmp_path / link)
        assert (tmp_path / link).is_symlink() and (tmp_path / link / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} >= {"here", "empty", "new"} and not list(tmp_path.glob(".*"))


def test_numbers_that_a_dtype_does_not_hold(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["pooler.dense.weight"][0, :2] = 70000.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArgumentError, match=r"dtype: got 2 numbers of pooler.dense.weight that are larger.*65504"):
        fastbert.convert(folder, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    fastbert.convert(folder, tmp_path / "out", dtype="bf16")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder there"):
        fastbert.convert(tmp_path / "nowhere", tmp_path / "out")
    folder = tiny_bert.make(tmp_path / "model")
    write(folder / "config.json", {**config_of(folder), "model_type": "t5"})
    with pytest.raises(CheckpointError, match="model_type"):
        fastbert.convert(folder, tmp_path / "out", dtype="bf16")
    assert names(tmp_path) == [f"model/{name}" for name in ("config.json", "model.safetensors", "vocab.txt")]


# ------------------------------------------------------------------------------------ int8


def same_modules(got: torch.nn.Module, expected: torch.nn.Module) -> None:
    one, other = got.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name
    assert any(isinstance(part, Int8Linear) for part in got.modules())


@pytest.mark.filterwarnings("ignore:int8 is slower")
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_int8_is_what_quantize_makes(source: torch.dtype, folder: Path, tmp_path: Path) -> None:
    fastbert.save(fastbert.load(folder, dtype=source), folder)
    fastbert.convert(folder, tmp_path / "out", dtype="int8")
    expected = fastbert.quantize(fastbert.load(folder, dtype=torch.float32), dtype="int8")
    same_modules(fastbert.load(tmp_path / "out"), expected)
    same_modules(fastbert.load(tmp_path / "out", dtype=torch.float32), expected)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    key = "encoder.layer.0.intermediate.dense.weight"
    assert (
        tensors[key].dtype == torch.int8
        and tensors[key].shape == (48, 32, 1)
        and tensors[f"{key}_scale"].shape == (48,)
    )
    assert sum(tensor.dtype == torch.int8 for tensor in tensors.values()) == 2 * 6
    assert config_of(tmp_path / "out")[FIELD] == MARK and config_of(tmp_path / "out")["dtype"] == "float32"
    encoder = TextEncoder.from_folder(folder, dtype="int8", device="cpu")
    for dtype in (None, "int8"):
        kept = TextEncoder.from_folder(tmp_path / "out", dtype=dtype, device="cpu")  # type: ignore[arg-type]
        np.testing.assert_array_equal(kept.encode(TEXTS), encoder.encode(TEXTS))


@pytest.mark.filterwarnings("ignore:int8 is slower")
def test_int8_again(folder: Path, tmp_path: Path) -> None:
    """In shards, and in int8 once more, it is the same; in floats it is what the whole numbers stand for."""
    fastbert.convert(folder, tmp_path / "once", dtype="int8")
    once = files.read_tensors(tmp_path / "once")
    for out, options in (("shards", {"shard_size": "4KB"}), ("twice", {"dtype": "int8"})):
        fastbert.convert(tmp_path / "once", tmp_path / out, **options)  # type: ignore[arg-type]
        again = files.read_tensors(tmp_path / out)
        assert again.keys() == once.keys() and all(torch.equal(again[key], once[key]) for key in once)
        same_modules(fastbert.load(tmp_path / out), fastbert.load(tmp_path / "once"))
    fastbert.convert(tmp_path / "once", tmp_path / "floats", dtype="fp32")
    floats, before = files.read_tensors(tmp_path / "floats"), files.read_tensors(folder)
    assert floats.keys() == before.keys() and FIELD not in config_of(tmp_path / "floats")
    for key, tensor in before.items():
        error = (floats[key] - tensor).abs().amax(-1)
        scale = once.get(f"{key}_scale")
        assert (error <= scale * 0.501).all() if scale is not None else not error.any()


@pytest.mark.filterwarnings("ignore:int8 is slower")
@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForMaskedLM", "ForTokenClassification"])
def test_heads_over_int8(kind: str, folder: Path, tmp_path: Path) -> None:
    labels = HeadConfig(("O", "B-PER")) if "Masked" not in kind else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fastbert.load(folder, getattr(fastbert, f"Bert{kind}"), head=labels)
    fastbert.save(model, tmp_path / "head")
    shutil.copy(folder / "vocab.txt", tmp_path / "head")
    fastbert.convert(tmp_path / "head", tmp_path / "out", dtype="int8")
    got = fastbert.load(tmp_path / "out", getattr(fastbert, f"Bert{kind}"))
    same_modules(got, fastbert.quantize(model, dtype="int8"))
    if kind == "ForSequenceClassification":
        assert fastbert.classify(TEXTS, tmp_path / "out") == fastbert.TextClassifier.from_folder(
            tmp_path / "head", dtype="int8", device="cpu"
        ).classify(TEXTS)


FAMILIES = ["Roberta", "DistilBert", "Albert", "ModernBert", "MPNet", "NomicBert", "Gte", "DebertaV2"]


@pytest.mark.filterwarnings("ignore:int8 is slower")
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_int8(family: str, tmp_path: Path) -> None:
    """Fused products, halves that are swapped, layers that share weights."""
    pytest.importorskip("transformers", reason="makes the model")
    from test_families import theirs_of

    theirs_of(family).save_pretrained(tmp_path / "model")
    fastbert.convert(tmp_path / "model", tmp_path / "out", dtype="int8")
    same_modules(fastbert.load(tmp_path / "out"), fastbert.quantize(fastbert.load(tmp_path / "model"), dtype="int8"))


@pytest.mark.filterwarnings("ignore:int8 is slower")
def test_an_int8_folder_stays_int8(folder: Path, tmp_path: Path) -> None:
    fastbert.convert(folder, tmp_path / "out", dtype="int8")
    with pytest.raises(ArgumentError, match=r"dtype: got torch.bfloat16; .* for a folder in int8\. .*fastbert convert"):
        fastbert.load(tmp_path / "out", dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match=r"dtype: got 'fp32'; expected int8 or nothing, for a folder in int8"):
        TextEncoder.from_folder(tmp_path / "out", dtype="fp32")
    with pytest.raises(CheckpointError, match=r"model: got a quantized model; .* fastbert.convert writes"):
        fastbert.save(fastbert.load(tmp_path / "out"), tmp_path / "saved")
    with pytest.raises(ArgumentError, match="can't be trained"):
        fastbert.load(tmp_path / "out").train()
    assert fastbert.load(tmp_path / "out", frozen=True)(torch.tensor([[2, 5, 3]])).last_hidden_state.shape == (1, 3, 32)


def test_transformers_refuses_an_int8_folder(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="is to refuse it")
    fastbert.convert(folder, tmp_path / "out", dtype="int8")
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModel.from_pretrained(tmp_path / "out")


def no_scale(tensors: dict[str, Any]) -> None:
    del tensors["encoder.layer.0.output.dense.weight_scale"]


def zero_scale(tensors: dict[str, Any]) -> None:
    tensors["encoder.layer.0.output.dense.weight_scale"][3] = 0


def short_scale(tensors: dict[str, Any]) -> None:
    tensors["encoder.layer.0.output.dense.weight_scale"] = torch.ones(3)


def large_values(tensors: dict[str, Any]) -> None:
    tensors["encoder.layer.0.output.dense.weight"][:] = 100


def a_float(tensors: dict[str, Any]) -> None:
    tensors["encoder.layer.0.output.dense.weight"] = torch.ones(32, 48)
    del tensors["encoder.layer.0.output.dense.weight_scale"]


@pytest.mark.filterwarnings("ignore:int8 is slower")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_scale, r"output\.dense\.weight: got int8 \(32, 48, 1\), and no scale"),
        (zero_scale, r"weight_scale: got numbers that are not positive"),
        (short_scale, r"and a scale of torch.float32 \(3,\)"),
        (large_values, r"got two weights that sum to 200; expected at most 128"),
        (a_float, r"scales: got none for encoder\.layer\.0\.output\.dense\.weight"),
    ],
)
def test_damaged_int8_is_named(damage: Callable[[Any], None], message: str, folder: Path, tmp_path: Path) -> None:
    fastbert.convert(folder, tmp_path / "out", dtype="int8")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert int(pair_sums(tensors["encoder.layer.0.output.dense.weight"][..., 0]).max()) in (127, 128)
    damage(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        fastbert.load(tmp_path / "out")


def test_another_format_of_ours_is_refused(folder: Path) -> None:
    write(folder / "config.json", {**config_of(folder), FIELD: {**MARK, "dtype": "int4"}})
    with pytest.raises(CheckpointError, match=r"quantization_config: got .*int4.*; expected .*int8"):
        fastbert.load(folder)


def test_a_model_of_no_layers(tmp_path: Path) -> None:
    fastbert.save(BertModel(EncoderConfig(50, 32, num_layers=0, num_heads=2, intermediate_size=48)), tmp_path / "model")
    fastbert.convert(tmp_path / "model", tmp_path / "out", dtype="int8")
    ids = torch.tensor([[2, 5, 3]])
    with torch.no_grad():
        got, expected = (fastbert.load(tmp_path / one)(ids).last_hidden_state for one in ("out", "model"))
    assert torch.equal(got, expected)
