"""The nearest texts: exact, whatever searches; embeddings in a file, which a changed model or other texts don't get."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny_bert
import torch
from processes import PYTHON
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_sentence import sentence_folder, write

import fastbert
from fastbert.errors import ArgumentError, MissingError
from fastbert.tasks import similar as module
from fastbert.tasks.encode import TextEncoder
from fastbert.tasks.fingerprint import fingerprint, fingerprint_of_texts
from fastbert.tasks.hits import best_rows
from fastbert.tasks.similar import Library, TextIndex

WORDS = [*tiny_bert.PLAIN, *tiny_bert.GOOD, *tiny_bert.BAD, *tiny_bert.PEOPLE]
TEXTS = [f"{a} {b}" for a in WORDS[:12] for b in WORDS] + ["", "the film", "the film"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.make(tmp_path_factory.mktemp("similar") / "model")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.from_folder(folder, device="cpu")


def of_similarity(encoder: TextEncoder, name: str) -> TextEncoder:
    return replace(encoder, recipe=replace(encoder.recipe, similarity=name))


@pytest.mark.parametrize("library", get_args(Library))
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_the_nearest_are_found_by_every_library(
    similarity: str, library: Library, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library != "torch":
        pytest.importorskip(library, reason="searches")
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 2 * len(TEXTS))  # two queries at once
    encoder = of_similarity(encoder, similarity)
    index = TextIndex.of(TEXTS, encoder)
    queries = ["the film", "a very dull plot", ""]
    if similarity == "manhattan" and library != "torch":
        with pytest.raises(ArgumentError, match=r"library: got .*; expected 'torch', for the manhattan distance"):
            index.search(queries, library=library)
        return
    scores = encoder.similarity(encoder.encode_query(queries), encoder.encode_document(TEXTS))
    for count in (1, 10, len(TEXTS), len(TEXTS) + 1):
        for found, expected in zip(index.search(queries, top_k=count, library=library), scores, strict=True):
            assert len(found) == len({hit.row for hit in found}) == min(count, len(TEXTS))
            assert [hit.score for hit in found] == pytest.approx(np.sort(expected)[::-1][:count].tolist(), abs=1e-5)
            assert all(hit.score == pytest.approx(expected[hit.row], abs=1e-5) for hit in found)
            assert all(hit.text == TEXTS[hit.row] for hit in found)
    assert index.search([], library=library) == []


def test_as_sentence_transformers(encoder: TextEncoder) -> None:
    util = pytest.importorskip("sentence_transformers.util", reason="compares with its semantic_search")
    queries = ["the film", "a very dull plot"]
    theirs = util.semantic_search(encoder.encode_query(queries), encoder.encode_document(TEXTS), top_k=7)
    for found, expected in zip(TextIndex.of(TEXTS, encoder).search(queries, top_k=7), theirs, strict=True):
        assert [hit.score for hit in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)


def test_in_one_call(folder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    found = fastbert.similar("the film", iter(TEXTS), folder, top_k=3, embeddings=tmp_path / "kept.safetensors")
    assert found == TextIndex.of(TEXTS, encoder).search(["the film"], top_k=3)[0]
    assert {hit.row for hit in found} == {i for i, text in enumerate(TEXTS) if text == "the film"}
    assert {hit.text for hit in found} == {"the film"}
    assert fastbert.similar("a", [], encoder) == []


def test_fewer_hits_are_the_first_of_more(encoder: TextEncoder) -> None:
    index = TextIndex.of([f"the film {i % 7}" for i in range(50)], encoder)
    [most] = index.search(["film 3"], top_k=50)
    assert sorted(hit.row for hit in most) == list(range(50))
    for top_k in (1, 5, 10, 49):
        assert index.search(["film 3"], top_k=top_k) == [most[:top_k]]


def test_equal_ones_are_in_their_order() -> None:
    scores = np.array([1, 3, 2, 3, 3, 0, 2], np.float32)
    expected = [1, 3, 4, 2, 6, 0, 5]
    for count in range(1, 9):
        assert best_rows(scores, count).tolist() == expected[:count]


def test_many_texts_are_for_a_library_that_is_there(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    index = TextIndex.of(TEXTS, encoder)
    there: set[str] = set()
    monkeypatch.setattr(module, "find_spec", lambda name: name if name in there else None)
    assert index._library() == "torch"
    monkeypatch.setattr(module, "MANY_TEXTS", len(TEXTS) - 1)
    assert index._library() == "torch"
    there.add("usearch")
    assert index._library() == "usearch"
    there.add("faiss")
    assert index._library() == "faiss"
    assert TextIndex.of(TEXTS, of_similarity(encoder, "manhattan"))._library() == "torch"
    monkeypatch.setattr(module, "MANY_TEXTS", len(TEXTS))
    assert index._library() == "torch"


@pytest.mark.parametrize("library", ["faiss", "usearch"])
def test_a_library_that_is_not_there(library: Library, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (library, f"{library}.index"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(
        MissingError,
        match=rf"{library}: got a library that is not installed.*pip install {library}.*the extra `search`",
    ):
        TextIndex.of(TEXTS, encoder).search(["a"], library=library)


# ------------------------------------------------------------------------------------ embeddings in a file


def test_kept_embeddings_are_read_again(encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept"
    index = TextIndex.of(TEXTS, encoder, embeddings=path)
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]
    monkeypatch.setattr(TextEncoder, "encode_document", None)
    again = TextIndex.of(iter(TEXTS), encoder, embeddings=str(path))
    np.testing.assert_array_equal(again.embeddings, index.embeddings)
    assert again.search(["the plot"]) == index.search(["the plot"])


def test_other_texts_are_noticed(encoder: TextEncoder, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    TextIndex.of(["a", "b"], encoder, embeddings=path)
    before = path.read_bytes()
    for texts in (["a", "c"], ["b", "a"], ["a"], ["a", "b", ""], ["ab", ""], []):
        with pytest.raises(ArgumentError, match=r"embeddings: got .*kept, made of other texts; .* Delete the file"):
            TextIndex.of(texts, encoder, embeddings=path)
    assert path.read_bytes() == before
    assert fingerprint_of_texts(["a", "b"]) != fingerprint_of_texts(["a b"])


def no_change(folder: Path) -> None:
    pass


def one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["encoder.layer.1.output.dense.weight"]
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def one_word(folder: Path) -> None:
    words = (folder / "vocab.txt").read_text()
    (folder / "vocab.txt").write_text(words.replace("film\nplot\n", "plot\nfilm\n"))


def case(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"do_lower_case": False})


def pooling(folder: Path) -> None:
    sentence_folder(folder, "Normalize", pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})


def dense(folder: Path) -> None:
    sentence_folder(folder, "Dense", "Normalize")


def other_dense(folder: Path) -> None:
    dense(folder)
    tensors = load_file(folder / "2_Dense" / "model.safetensors")
    tensors["linear.bias"][0] += 1e-3
    save_file(tensors, folder / "2_Dense" / "model.safetensors")


def prompt(folder: Path) -> None:
    sentence_folder(folder, "Normalize")
    write(folder / "config_sentence_transformers.json", {"prompts": {"document": "the "}})


def epsilon(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "layer_norm_eps": 1e-5})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (no_change, one_weight),
        (no_change, one_word),
        (no_change, case),
        (no_change, epsilon),
        (no_change, pooling),
        (pooling, dense),
        (dense, other_dense),
        (pooling, prompt),
    ],
)
def test_a_changed_model_is_noticed(
    before: Callable[[Path], None], after: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    before(tmp_path / "model")
    TextIndex.of(["a"], TextEncoder.from_folder(tmp_path / "model", device="cpu"), embeddings=tmp_path / "kept")
    TextIndex.of(["a"], TextEncoder.from_folder(tmp_path / "model", device="cpu"), embeddings=tmp_path / "kept")
    after(tmp_path / "model")
    with pytest.raises(ArgumentError, match=r"kept, made by another model; expected the embeddings of this one"):
        TextIndex.of(["a"], TextEncoder.from_folder(tmp_path / "model", device="cpu"), embeddings=tmp_path / "kept")


def test_another_dtype_or_length_is_named(folder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    TextIndex.of(["a"], encoder, embeddings=tmp_path / "kept")
    with pytest.raises(ArgumentError, match=r"kept, made with max_length=48; expected max_length=9"):
        TextIndex.of(["a"], encoder, embeddings=tmp_path / "kept", max_length=9)
    other = TextEncoder.from_folder(folder, dtype="int8", device="cpu")
    with pytest.raises(ArgumentError, match=r"kept, made with dtype=torch.float32; expected dtype=int8"):
        TextIndex.of(["a"], other, embeddings=tmp_path / "kept")


def test_a_fingerprint_is_the_same_in_another_process(folder: Path, encoder: TextEncoder) -> None:
    code = (
        "from fastbert.tasks.encode import TextEncoder; from fastbert.tasks.fingerprint import fingerprint\n"
        f"print(fingerprint(TextEncoder.from_folder({str(folder)!r}, device='cpu')))"
    )
    root = Path(fastbert.__file__).parents[1]
    done = subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    encoder.encode(["cut " * 60], max_length=5)  # leaves no trace in the tokenizer's rules
    assert done.stdout.split() == [fingerprint(encoder)]


def test_what_is_no_file_of_embeddings(encoder: TextEncoder, tmp_path: Path) -> None:
    good = tmp_path / "good"
    TextIndex.of(["a", "b"], encoder, embeddings=good)
    (tmp_path / "short").write_bytes(good.read_bytes()[:-7])
    (tmp_path / "text").write_text("the film\n")
    save_file({"embeddings": torch.zeros(2, 32)}, tmp_path / "others")
    os.mkfifo(tmp_path / "pipe")
    with safe_open(good, "pt") as file:
        made, rows = file.metadata(), file.get_tensor("embeddings")
    save_file({"embeddings": rows.bfloat16()}, tmp_path / "half", made)
    save_file({"embeddings": rows.to(torch.float8_e4m3fn)}, tmp_path / "eighth", made)
    save_file({"embeddings": rows.index_fill(0, torch.tensor([1]), torch.nan)}, tmp_path / "nan", made)
    for name, message in (
        ("short", "is whole"),
        ("text", "is whole"),
        ("others", "something else"),
        (".", "a folder, pipe or device"),
        ("half", r"with BF16 \(2, 32\); expected F32 \(2, 32\)"),
        ("eighth", "with F8_E4M3"),
        ("nan", "with NaN or infinity"),
        ("pipe", "a folder, pipe or device"),
    ):
        with pytest.raises(ArgumentError, match=message):
            TextIndex.of(["a", "b"], encoder, embeddings=tmp_path / name)
    with pytest.raises(ArgumentError, match="Make the folder first"):
        TextIndex.of(["a", "b"], encoder, embeddings=tmp_path / "no" / "file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": ["a"]}, r"query: got a list; expected a string"),
        ({"texts": "a"}, r"texts: got a single string"),
        ({"texts": ["a", None]}, r"texts\[1\]: got None, which is missing"),
        ({"top_k": 0}, r"top_k: got 0; expected 1 or more"),
        ({"library": "numpy"}, r"library: got 'numpy'; expected one of torch, faiss, usearch"),
        ({"max_length": 100}, r"at most the model's 48 positions"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, encoder: TextEncoder) -> None:
    with pytest.raises(ArgumentError, match=message):
        fastbert.similar(**{"query": "a", "texts": ["b"], "model": encoder, **arguments})
