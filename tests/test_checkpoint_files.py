"""Files of a checkpoint folder as they may be: of wrong types, no files, links, shards; each is read or named."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch
from safetensors.torch import load_file, save_file

import fastbert
from fastbert.checkpoints.fields import Fields
from fastbert.config import EncoderConfig, HeadConfig
from fastbert.errors import ArgumentError, CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bert.make(tmp_path / "model")


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


# Fields


NO_NUMBER: list[Any] = ["3", True, [3], {}, float("nan"), float("inf")]


@pytest.mark.parametrize("value", [*NO_NUMBER, 3.0, 1e308, -1, 11], ids=repr)
def test_a_whole_number_is_one(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"f\.json: size: got .*; expected a whole number from 0 to 10"):
        Fields("f.json", {"size": value}).whole("size", 2, least=0, most=10)


@pytest.mark.parametrize("value", [*NO_NUMBER, -0.5, 10**400], ids=lambda value: repr(value)[:20])
def test_a_number_is_finite(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"f\.json: eps: got .*; expected a finite number of 0 or more"):
        Fields("f.json", {"eps": value}).number("eps", 2.0, least=0)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda fields: fields.flag("name", True), "true or false"),
        (lambda fields: fields.text("name", "x"), "a string"),
        (lambda fields: fields.text("name", "x", ["x", "y"]), "one of x, y"),
        (lambda fields: fields.texts("name"), "a list of strings"),
        (lambda fields: fields.mapping("name"), "an object"),
    ],
)
@pytest.mark.parametrize("value", [1, [1], 0.0, ["x", None]], ids=repr)
def test_other_kinds_are_what_they_are(read: Callable[[Fields], Any], expected: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"f\.json: name: got .*; expected {expected}\."):
        read(Fields("f.json", {"name": value}))


def test_missing_and_null_are_the_default() -> None:
    fields = Fields("f.json", {"null": None, "whole": 3, "number": 2, "flag": False, "text": "a", "texts": ["b"]})
    assert [fields.whole(name, 7, least=1) for name in ("absent", "null", "whole")] == [7, 7, 3]
    assert [fields.number(name, 7.5) for name in ("absent", "null", "number")] == [7.5, 7.5, 2.0]
    assert [fields.flag(name, True) for name in ("absent", "null", "flag")] == [True, True, False]
    assert [fields.text(name, "z", "az") for name in ("absent", "null", "text")] == ["z", "z", "a"]
    assert (fields.texts("texts"), fields.texts("null"), fields.mapping("null")) == (["b"], [], {})


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(CheckpointError) as caught:
        Fields("f.json", {"name": ["x" * 10_000]}).text("name", "")
    assert len(str(caught.value)) < 200


# Files that are no files


def replace_by(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "broken link": "/nowhere", "loop": path.name}[kind])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder", "broken link", "loop"])
def test_what_is_no_file_is_named_and_not_waited_for(
    kind: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    replace_by(kind, folder / name)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            fastbert.load(folder)
        except CheckpointError as error:
            caught.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "reading waits"
    assert caught and str(folder / name) in str(caught[0])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "."])
def test_what_is_closed_to_us_is_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, access = folder / name, os.access  # root may read everything, so the system is played
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(closed))}: got a .* closed to us"):
        fastbert.load(folder)


# Folders and their names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "hf download sentence-transformers/all-MiniLM-L6-v2 --local-dir"),
        ("bert-base-uncased", "hf download bert-base-uncased"),
        ("~/models/bert", "os.path.expanduser"),
        ("/nowhere/bert", "no folder there"),
        ("a\0b", "null"),
        ("a" * 5000, "too long"),
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize("as_path", [False, True])
def test_a_folder_that_is_not_there_gets_a_hint(name: str, message: str, as_path: bool) -> None:
    with pytest.raises(CheckpointError, match=message):
        fastbert.load(Path(name) if as_path else name)


@pytest.mark.parametrize("folder", [3, None, b"bytes", ["x"], object()])
def test_a_folder_is_a_path(folder: Any) -> None:
    with pytest.raises(ArgumentError, match=r"folder: got a .*; expected a path"):
        fastbert.load(folder)


def test_an_empty_name_is_not_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert fastbert.load(".")
    with pytest.raises(ArgumentError, match="folder: got ''; expected a path"):
        fastbert.load("")


@pytest.mark.parametrize("dtype", ["fp32", "float32", torch.int8, 3])
def test_a_dtype_is_torchs(folder: Path, dtype: Any) -> None:
    with pytest.raises(ArgumentError, match=r"dtype: got .*; expected a floating torch\.dtype .* torch\.float32"):
        fastbert.load(folder, dtype=dtype)


@pytest.mark.parametrize(
    "make", [EncoderConfig.from_hf, HeadConfig.from_hf, fastbert.graphed], ids=lambda make: make.__qualname__
)
@pytest.mark.parametrize("given", [None, 3, "bert-base"])
def test_what_is_no_config_and_no_model(make: Any, given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"(config|model): got a "):
        make(given)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a folder with config\.json"):
        fastbert.load(folder / "config.json")


def test_other_ways_to_write_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in (".", "./", f"{folder}/", f"{folder}//", f"{folder}/../{folder.name}"):
        assert fastbert.load(name).config.hidden_size == 32


def test_links_as_a_cache_of_the_hub_has_them(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    (tmp_path / "link").symlink_to(snapshot, target_is_directory=True)
    for place in (snapshot, tmp_path / "link"):
        assert fastbert.encode(["the film"], model=place, max_length=16).shape == (1, 32)


def test_reading_writes_nothing(folder: Path) -> None:
    before = folder.stat().st_mtime_ns, sorted(folder.iterdir())
    fastbert.encode(["the film"], model=folder, max_length=16)
    assert (folder.stat().st_mtime_ns, sorted(folder.iterdir())) == before


# Shards


def shard(folder: Path, ending: str) -> Path:
    """The weights in two shards of pickles or of safetensors, by hand; the index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "pytorch_model" if ending == "bin" else "model"
    names = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        part = {key: state[key].clone() for key in state if weight_map[key] == name}
        torch.save(part, folder / name) if ending == "bin" else save_file(part, folder / name)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_user_case_11_sharded_weights(ending: str, folder: Path) -> None:
    whole = fastbert.load(folder)
    shard(folder, ending)
    for (name, expected), got in zip(
        whole.state_dict().items(), fastbert.load(folder).state_dict().values(), strict=True
    ):
        assert torch.equal(expected, got), name


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize("name", ["../model-00001-of-00002", "/tmp/x", "sub/x", "C:x", "..\\x", 3, None])
def test_a_shard_is_in_the_folder(ending: str, name: Any, folder: Path) -> None:
    index = shard(folder, ending)
    content = json.loads(index.read_text())
    key = next(iter(content["weight_map"]))
    content["weight_map"][key] = f"{name}.{ending}" if isinstance(name, str) else name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{key}.*in the same folder"):
        fastbert.load(folder)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [([2**32, 2**32], [0, 0]), ([2**63], [0, 0]), ([-1], [0, 4]), ([2], [0, 4]), ([1], [4, 8]), ([1], [0, 2**63])],
)
def test_a_shape_that_its_bytes_are_not_of(shape: list[int], offsets: list[int], folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        fastbert.load(folder)


@pytest.mark.parametrize("name", ["a\0", "\ud800"])
def test_a_shard_whose_name_no_file_can_have(name: str, folder: Path) -> None:
    index = shard(folder, "safetensors")
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], f"{name}.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"(a.x00|.ud800).safetensors: got .*; expected a file"):
        fastbert.load(folder)


def test_a_shard_that_is_missing_or_damaged(folder: Path) -> None:
    index = shard(folder, "bin")
    second = folder / "pytorch_model-00002-of-00002.bin"
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="pytorch_model-00002-of-00002"):
        fastbert.load(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match="pytorch_model-00002-of-00002"):
        fastbert.load(folder)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON object"):
        fastbert.load(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    index = shard(folder, "safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    key = next(iter(weight_map))
    other = next(name for name in weight_map.values() if name != weight_map[key])
    save_file(load_file(folder / other) | {key: torch.zeros(3)}, folder / other)
    with pytest.raises(CheckpointError, match=f"tensor {key} in .* and .*; expected it in"):
        fastbert.load(folder)


def test_tensors_of_other_layouts_in_a_pickle(folder: Path) -> None:
    state: dict[Any, torch.Tensor] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(state | {"pooler.dense.bias": torch.eye(4).to_sparse()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pooler\.dense\.bias"):
        fastbert.load(folder)
    torch.save(state | {3: torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*no string: 3"):
        fastbert.load(folder)


def test_a_small_pickle_does_not_fill_the_memory(folder: Path) -> None:
    """A tensor may be one number that stands for 10**9 rows of them."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    fastbert.load(folder)
    [word] = [key for key in state if key.endswith("word_embeddings.weight")]
    torch.save({**state, word: torch.zeros(1, 1).expand(10**9, 32)}, folder / "pytorch_model.bin")
    change(folder, vocab_size=10**9)
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight: shape \(1000000000, 32\) in 4 bytes"):
        fastbert.load(folder)


def test_a_lone_surrogate_is_saved_as_it_came(folder: Path, tmp_path: Path) -> None:
    """JSON can spell what UTF-8 can't."""
    change(folder, id2label={"0": "\ud800", "1": "ä"})
    fastbert.save(fastbert.load(folder), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["id2label"] == {"0": "\ud800", "1": "ä"}
    assert "ä".encode() in (tmp_path / "saved" / "config.json").read_bytes()
