"""Folders of sentence-transformers: pooling, Dense, Normalize, lengths, letters and prompts are the folder's."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import fastbert
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.model.sentence import ACTIVATIONS, SIMILARITIES, Dense, Embedder, LayerNorm, Mode
from fastbert.packing import Packing
from fastbert.tasks.encode import TextEncoder
from fastbert.testing import assert_close

OLD = "sentence_transformers.models."
MODES: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TEXTS = ["the film was fine", "a", "", "ada hopper met alan turing in paris , and the story was very lovely ."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bert.make(tmp_path / "model")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def sentence_folder(
    folder: Path,
    *modules: str,
    pooling: dict[str, Any] | None = None,
    dense: dict[str, Any] | None = None,
    transformer: str = "",
    package: str = OLD,
) -> Path:
    """Writes modules.json and a folder for each module; `modules` follow a Transformer and a Pooling."""
    names = ["Transformer", "Pooling", *modules]
    paths = [transformer, *(f"{i}_{name}" for i, name in enumerate(names) if i)]
    write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": package + name}
            for i, (name, path) in enumerate(zip(names, paths, strict=True))
        ],
    )
    write(folder / "1_Pooling/config.json", {"word_embedding_dimension": 32} | (pooling or {}))
    for name, path in zip(names, paths, strict=True):
        if name == "Dense":
            settings = {"in_features": 32, "out_features": 16, "bias": True} | (dense or {})
            settings.setdefault("activation_function", "torch.nn.modules.activation.Tanh")
            write(folder / path / "config.json", settings)
            out, width = settings["out_features"], settings["in_features"]
            generator = torch.Generator().manual_seed(3)
            tensors = {"linear.weight": torch.randn(out, width, generator=generator)}
            if settings["bias"]:
                tensors["linear.bias"] = torch.randn(out, generator=generator)
            save_file(tensors, folder / path / "model.safetensors")
        if name == "LayerNorm":
            write(folder / path / "config.json", {"dimension": 32})
            generator = torch.Generator().manual_seed(4)
            tensors = {f"norm.{part}": torch.randn(32, generator=generator) for part in ("weight", "bias")}
            save_file(tensors, folder / path / "model.safetensors")
    return folder


def hidden(folder: Path, texts: list[str], max_length: int = 48) -> list[Tensor]:
    """float64 `[tokens, hidden]` of each text, from the model by itself."""
    encoder = TextEncoder.from_folder(folder)
    states = []
    for text in texts:
        ids = encoder.tokenizer.encode([text], max_length).ids
        with torch.inference_mode():
            states.append(encoder.model(torch.tensor(ids)[None].long()).last_hidden_state[0].double())
    return states


def pooled(states: Tensor, mode: Mode) -> Tensor:
    length = len(states)
    weights = torch.arange(1, length + 1, dtype=torch.float64)[:, None]
    return {
        "cls": states[0],
        "max": states.max(0).values,
        "mean": states.mean(0),
        "mean_sqrt_len_tokens": states.sum(0) / length**0.5,
        "weightedmean": (states * weights).sum(0) / weights.sum(),
        "lasttoken": states[-1],
    }[mode]


def near(got: np.ndarray, expected: list[Tensor] | Tensor) -> bool:
    rows = torch.stack(expected) if isinstance(expected, list) else expected
    return got.shape == tuple(rows.shape) and bool(np.allclose(got, rows.numpy(), atol=2e-5))


# Pooling


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("normalise", [True, False])
def test_user_case_06_pooling_is_the_folders(name: str, normalise: bool, folder: Path) -> None:
    states = hidden(folder, TEXTS)
    sentence_folder(folder, *["Normalize"] * normalise, pooling=dict.fromkeys(MODES, False) | {name: True})
    expected = torch.stack([pooled(one, MODES[name]) for one in states])
    assert near(fastbert.encode(TEXTS, model=folder), F.normalize(expected) if normalise else expected)


def test_user_case_06_what_a_call_asks_for_comes_first(folder: Path) -> None:
    states = hidden(folder, TEXTS)
    sentence_folder(folder, "Normalize", pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    encoder = TextEncoder.from_folder(folder)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # what any model may be asked for needs no word, and neither does its own pooling
        assert near(encoder.encode(TEXTS, normalize=False), [one[0] for one in states])
        assert near(encoder.encode(TEXTS, normalize=False, pooling="cls"), [one[0] for one in states])
    means = torch.stack([one.mean(0) for one in states])
    with pytest.warns(UserWarning, match="pooling='mean' is taken in place of the folder's 'cls'"):
        assert near(encoder.encode(TEXTS, pooling="mean"), F.normalize(means))
    with pytest.warns(UserWarning, match="in place of the folder's 'cls'"):  # as the README writes it
        got = fastbert.encode(TEXTS, model=folder, dtype="fp32", pooling="mean", normalize=True, max_length=48)
    assert near(got, F.normalize(means))


def test_a_folder_that_says_nothing_of_pooling_has_none_to_differ_from(folder: Path) -> None:
    states = hidden(folder, TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = fastbert.encode(TEXTS, model=folder, pooling="cls", normalize=False)
    assert near(got, [one[0] for one in states])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("mean",)),
        (dict.fromkeys(MODES, False), ("mean",)),
        (dict.fromkeys(MODES, True), tuple(MODES.values())),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["mean", "cls", "weightedmean"]}, ("mean", "cls", "weightedmean")),
        ({"pooling_mode": "max", "pooling_mode_cls_token": True, "include_prompt": True}, ("max",)),
    ],
)
def test_several_poolings_are_side_by_side(settings: dict[str, Any], expected: tuple[Mode, ...], folder: Path) -> None:
    states = hidden(folder, TEXTS)
    encoder = TextEncoder.from_folder(sentence_folder(folder, pooling=settings))
    got = encoder.encode(TEXTS)
    assert near(got, [torch.cat([pooled(one, mode) for mode in expected]) for one in states])
    assert got.shape[1] == encoder.width() == 32 * len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES.values())
def test_pooling_of_packed_rows(mode: Mode, dtype: torch.dtype) -> None:
    lengths = [5, 0, 1, 300, 2]
    states = torch.randn(320, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)  # slack
    got = Embedder((mode,))(states, Packing.from_lengths(lengths))
    parts = states[: sum(lengths)].double().split(lengths)
    exact = torch.stack([pooled(part, mode) if len(part) else torch.zeros(24, dtype=torch.float64) for part in parts])
    plain = [pooled(part.float(), mode).float() if len(part) else torch.zeros(24) for part in parts]
    assert got.dtype == torch.float32
    assert_close(got, torch.stack(plain), exact, factor=3, what=mode)
    nothing = Embedder((mode,), (F.normalize,))(states[:0], Packing.from_lengths([0, 0]))
    assert torch.equal(nothing, torch.zeros(2, 24))


# Dense and Normalize


def dense(x: Tensor, folder: Path, activation: str) -> Tensor:
    from safetensors.torch import load_file

    tensors = {key: tensor.double() for key, tensor in load_file(folder / "model.safetensors").items()}
    return ACTIVATIONS[activation](F.linear(x, tensors["linear.weight"], tensors.get("linear.bias")))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", ["model.safetensors", "pytorch_model.bin"])
def test_user_case_07_dense_is_part_of_the_embedding(bias: bool, kept: str, folder: Path) -> None:
    means = torch.stack([one.mean(0) for one in hidden(folder, TEXTS)])
    sentence_folder(folder, "Dense", "Normalize", dense={"bias": bias})
    expected = F.normalize(dense(means, folder / "2_Dense", "Tanh"))
    if kept == "pytorch_model.bin":
        from safetensors.torch import load_file

        torch.save(load_file(folder / "2_Dense/model.safetensors"), folder / "2_Dense/pytorch_model.bin")
        (folder / "2_Dense/model.safetensors").unlink()
    assert near(fastbert.encode(TEXTS, model=folder), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_torchs(name: str) -> None:
    x = torch.linspace(-4, 4, 101)
    assert torch.equal(ACTIVATIONS[name](x), getattr(torch.nn, name)()(x))


def test_dense_layers_in_a_row_and_a_normalize_between(folder: Path) -> None:
    means = torch.stack([one.mean(0) for one in hidden(folder, TEXTS)])
    identity = {"activation_function": "torch.nn.modules.linear.Identity", "out_features": 32}
    sentence_folder(folder, "Normalize", "Dense", "Dropout", "Dense", dense=identity)
    encoder = TextEncoder.from_folder(folder)
    x = dense(F.normalize(means), folder / "3_Dense", "Identity")
    x = dense(x, folder / "5_Dense", "Identity")
    assert near(encoder.encode(TEXTS), x)
    assert near(encoder.encode(TEXTS, normalize=True), F.normalize(x))


def test_pooling_that_does_not_fit_the_dense(folder: Path) -> None:
    pooling = {"pooling_mode": ["cls", "mean"]}
    sentence_folder(folder, "Dense", dense={"in_features": 64}, pooling=pooling)
    encoder = TextEncoder.from_folder(folder)
    assert encoder.encode(TEXTS).shape == (4, 16)
    with pytest.raises(ArgumentError, match="pooling: got 32 columns; expected the 64 that the Dense after it reads"):
        encoder.encode(TEXTS, pooling="mean")
    write(folder / "1_Pooling/config.json", {"pooling_mode": "mean"})
    with pytest.raises(CheckpointError, match="pooling: got 32 columns"):
        TextEncoder.from_folder(folder)


# LayerNorm


@pytest.mark.parametrize("width", [1, 2, 33])
def test_layer_norm_of_embeddings(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, weight, bias = (torch.randn(*shape, width, generator=generator) for shape in ((5,), (), ()))
    x[1] = 7.3  # constant: what is left is the bias
    exact = x.double() - x.double().mean(1, keepdim=True)
    exact = exact / (exact.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    assert_close(LayerNorm(weight, bias)(x), F.layer_norm(x, (width,), weight, bias), exact, factor=3, what="LayerNorm")


def test_layer_norm_is_part_of_the_embedding(folder: Path) -> None:
    means = torch.stack([one.mean(0) for one in hidden(folder, TEXTS)])
    sentence_folder(folder, "LayerNorm", "Normalize", "Dense")
    from safetensors.torch import load_file

    norm = {name: x.double() for name, x in load_file(folder / "2_LayerNorm/model.safetensors").items()}
    x = F.layer_norm(means, (32,), norm["norm.weight"], norm["norm.bias"])
    assert near(fastbert.encode(TEXTS, model=folder), dense(F.normalize(x), folder / "4_Dense", "Tanh"))
    with pytest.raises(ArgumentError, match="pooling: got 64 columns; expected the 32 that the LayerNorm after it"):
        Embedder(("cls", "mean"), (LayerNorm(torch.ones(32), torch.ones(32)),)).width(32)


# Fewer columns


@pytest.mark.parametrize("modules", [[], ["Normalize"], ["Dense"], ["Dense", "Normalize"]], ids=str)
def test_columns_are_cut_off_after_the_folders_modules(modules: list[str], folder: Path) -> None:
    encoder = TextEncoder.from_folder(sentence_folder(folder, *modules))
    whole, bare = encoder.encode(TEXTS), encoder.encode(TEXTS, normalize=False)
    got = encoder.encode(TEXTS, truncate_dim=7)
    assert got.flags.c_contiguous and encoder.width(truncate_dim=7) == 7
    assert np.array_equal(got, whole[:, :7])
    first = bare[:, :7]
    assert np.array_equal(encoder.encode(TEXTS, truncate_dim=7, normalize=False), first)
    unit = first / np.linalg.norm(first, axis=1, keepdims=True)
    assert np.allclose(encoder.encode(TEXTS, truncate_dim=7, normalize=True), unit, atol=1e-6)
    assert np.array_equal(next(iter(encoder.encode_stream(TEXTS, truncate_dim=7))), got)
    assert np.array_equal(fastbert.encode(TEXTS, model=encoder, truncate_dim=7), got)
    assert np.array_equal(encoder.encode(TEXTS, truncate_dim=whole.shape[1]), whole)


def test_fewer_columns_where_a_folder_has_no_modules_are_of_length_1(folder: Path) -> None:
    first = fastbert.encode(TEXTS, model=folder, normalize=False)[:, :7]
    got = fastbert.encode(TEXTS, model=folder, truncate_dim=7)
    assert np.allclose(got, first / np.linalg.norm(first, axis=1, keepdims=True), atol=1e-6)


def test_a_folder_may_say_how_many_columns_are_kept(folder: Path) -> None:
    whole = fastbert.encode(TEXTS, model=sentence_folder(folder, "Normalize"))
    for says, kept in ((5, 5), (100, 32)):  # as in sentence-transformers, more than there are is all of them
        write(folder / "config_sentence_transformers.json", {"truncate_dim": says})
        encoder = TextEncoder.from_folder(folder)
        assert np.array_equal(encoder.encode(TEXTS), whole[:, :kept])
        assert encoder.width() == kept
        assert np.array_equal(encoder.encode(TEXTS, truncate_dim=9), whole[:, :9])
        assert np.array_equal(encoder.encode(TEXTS, truncate_dim=32), whole)


@pytest.mark.parametrize("wrong", [0, -1, 33, 7.0, "7", True])
def test_columns_that_there_are_not(wrong: Any, folder: Path) -> None:
    encoder = TextEncoder.from_folder(sentence_folder(folder, "Normalize"))
    with pytest.raises(ArgumentError, match="truncate_dim: got"):
        encoder.encode(TEXTS, truncate_dim=wrong)


# Similarity


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarity_is_the_folders(name: str, folder: Path) -> None:
    write(sentence_folder(folder) / "config_sentence_transformers.json", {"similarity_fn_name": name})
    encoder = TextEncoder.from_folder(folder)
    a, b = np.random.default_rng(0).normal(size=(2, 40, 32)).astype(np.float32)
    b[:20] = a[:20] + 1e-3  # near ones
    x, y = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    exact = {
        "cosine": F.normalize(x) @ F.normalize(y).T,
        "dot": x @ y.T,
        "euclidean": -(x[:, None] - y).square().sum(2).sqrt(),
        "manhattan": -(x[:, None] - y).abs().sum(2),
    }[name]
    got = encoder.similarity(a, b)
    assert got.dtype == np.float32 and got.shape == (40, 40)
    assert np.allclose(got, exact.numpy(), rtol=1e-5, atol=1e-5)
    assert np.allclose(encoder.similarity(a[0], b), got[:1], atol=1e-5)
    assert np.allclose(encoder.similarity(a[::2], b[::-1]), got[::2, ::-1], atol=1e-5)
    assert encoder.similarity(a[:0], b).shape == (0, 40)
    wrongs: list[tuple[Any, Any, str]] = [
        (a, b[:, :5], "b: got a width of 5; expected 32"),
        (a.tolist(), b, "a: got a list"),
        (a, b[None], "b: got float32 of shape"),
        (a, np.zeros((2, 32), dtype=int), "b: got int64 of shape"),
        (np.float32(3), b, "a: got a float32"),
    ]
    for one, other, message in wrongs:
        with pytest.raises(ArgumentError, match=message):
            encoder.similarity(one, other)


# Lengths


LONG = " ".join(["the film"] * 100)


def test_user_case_08_max_seq_length(folder: Path) -> None:
    sentence_folder(folder)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 8, "do_lower_case": False})
    [states] = hidden(folder, [LONG], 8)
    assert len(states) == 8
    with pytest.warns(UserWarning, match="1 text fills max_length=8 tokens; what is beyond was not read"):
        assert near(fastbert.encode([LONG, "a"], model=folder)[:1], [states.mean(0)])
    [states] = hidden(folder, [LONG], 16)
    with pytest.warns(UserWarning, match="1 text fills max_length=16"):
        assert near(fastbert.encode([LONG], model=folder, max_length=16), [states.mean(0)])


def test_the_settings_of_other_names_are_read(folder: Path) -> None:
    write(sentence_folder(folder) / "sentence_roberta_config.json", {"max_seq_length": 8})
    with pytest.warns(UserWarning, match="1 text fills max_length=8 tokens"):
        fastbert.encode([LONG], model=folder)


def test_user_case_08_cuts_are_counted_once_in_a_stream(folder: Path) -> None:
    encoder = TextEncoder.from_folder(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = list(encoder.encode_stream([LONG, "a"] * 5, texts_at_once=3, max_length=8))
    assert [len(part) for part in parts] == [3, 3, 3, 1]
    assert [str(one.message) for one in caught] == ["5 texts fill max_length=8 tokens; what is beyond was not read"]


def test_user_case_08_do_lower_case(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"do_lower_case": False})
    cased, lower = fastbert.encode(["The FILM", "the film"], model=sentence_folder(folder))
    assert not np.allclose(cased, lower, atol=1e-3)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": True})
    cased, lower = fastbert.encode(["The FILM", "the film"], model=folder)
    assert np.array_equal(cased, lower)


@pytest.mark.parametrize("sentence", [True, False])
def test_user_case_21_the_default_length_fits_the_model(sentence: bool, folder: Path) -> None:
    if sentence:
        write(sentence_folder(folder) / "sentence_bert_config.json", {"max_seq_length": 512})
    with pytest.warns(UserWarning, match="1 text fills max_length=48 tokens"):
        assert fastbert.encode([LONG, "the film"], model=folder).shape == (2, 32)
    with pytest.raises(ArgumentError, match="at most the model's 48 positions"):
        fastbert.encode(["the film"], model=folder, max_length=49)


@pytest.mark.parametrize("limit", [16, 10**30, 48, 49, None])
def test_the_tokenizers_length_is_the_default(limit: int | None, folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"model_max_length": limit})
    expected = min(limit or 48, 48)
    with pytest.warns(UserWarning, match=f"1 text fills max_length={expected} tokens"):
        fastbert.encode([LONG], model=folder)


def test_user_case_21_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text(f"the film\n{LONG}\n")
    command = [sys.executable, "-m", "fastbert", "encode", str(tmp_path / "texts"), "--model", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) == 2
    assert run.stderr.count("1 text fills max_length=48 tokens") == 1


# Layouts and prompts


def test_user_case_45_the_transformer_in_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    expected = fastbert.encode(TEXTS, model=folder)
    root = tmp_path / "root"
    root.mkdir()
    for name in ("0_Transformer", "0_BERT"):
        (root / name).symlink_to(folder)
        sentence_folder(root, "Normalize", transformer=name)
        if name == "0_BERT":
            modules = json.loads((root / "modules.json").read_text())
            modules[0]["type"] = "sentence_transformers.models.BERT"
            write(root / "modules.json", modules)
        assert np.array_equal(fastbert.encode(TEXTS, model=root), expected)
    write(root / "0_BERT/sentence_bert_config.json", {"max_seq_length": 8})
    with pytest.warns(UserWarning, match="1 text fills max_length=8 tokens"):
        fastbert.encode([LONG], model=root)


def test_user_case_45_prompts(folder: Path) -> None:
    plain = TextEncoder.from_folder(folder)
    sentence_folder(folder, "Normalize")
    prompts = {"query": "the film ", "passage": "", "odd": None}
    write(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "query"})
    encoder = TextEncoder.from_folder(folder)
    film, bare, story = plain.encode(["the film was"]), plain.encode(["was"]), plain.encode(["story was"])
    assert np.array_equal(encoder.encode(["was"]), film)
    assert np.array_equal(next(iter(encoder.encode_stream(["was"]))), film)
    assert np.array_equal(encoder.encode(["was"], prompt_name="passage"), bare)
    assert np.array_equal(encoder.encode(["was"], prompt_name="odd"), bare)
    assert np.array_equal(encoder.encode(["was"], prompt=""), bare)
    assert np.array_equal(encoder.encode(["was"], prompt="story "), story)
    assert np.array_equal(encoder.encode([("was", "fine")]), plain.encode([("the film was", "fine")]))
    for wrong in ({"prompt_name": "question"}, {"prompt_name": "query", "prompt": "x"}):
        with pytest.raises(ArgumentError, match="prompt_name"):
            encoder.encode(["was"], **wrong)
    with pytest.raises(ArgumentError, match=r"texts\[1\]"):
        encoder.encode(["was", 3])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="a single string"):
        encoder.encode("was")


def test_queries_and_documents(folder: Path) -> None:
    plain = TextEncoder.from_folder(folder)
    film, bare, story = (plain.encode([text]) for text in ("the film was", "was", "story was"))
    sentence_folder(folder, "Normalize")
    path = folder / "config_sentence_transformers.json"
    write(path, {"prompts": {"query": "the film ", "document": "story "}, "default_prompt_name": "document"})
    encoder = TextEncoder.from_folder(folder)
    assert np.array_equal(encoder.encode_query(["was"]), film)
    assert np.array_equal(encoder.encode_document(["was"]), story)
    for one in (encoder.encode_query, encoder.encode_document):
        assert np.array_equal(one(["was"], prompt="story "), story)
        assert np.array_equal(one(["was"], prompt=""), bare)
        assert np.array_equal(one(["was"], prompt_name="query"), film)
        assert one(["was"], truncate_dim=5, normalize=False, pooling=None, max_length=9).shape == (1, 5)
        with pytest.raises(ArgumentError, match="prompt_name"):
            one(["was"], prompt_name="nope")
    # A folder without them: nothing, and not the default prompt.
    write(path, {"prompts": {"odd": "the film "}, "default_prompt_name": "odd"})
    encoder = TextEncoder.from_folder(folder)
    assert np.array_equal(encoder.encode(["was"]), film)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for own in (encoder, plain):
            assert np.array_equal(own.encode_query(["was"]), bare)
            assert np.array_equal(own.encode_document(["was"]), bare)


@pytest.mark.parametrize("name", ["passage", "corpus"])
def test_documents_by_another_name(name: str, folder: Path) -> None:
    """sentence-transformers 6.2 means to take them, and does not; who has such a folder is told."""
    path = sentence_folder(folder, "Normalize") / "config_sentence_transformers.json"
    write(path, {"prompts": {"query": "the film ", name: "story "}})
    encoder = TextEncoder.from_folder(folder)
    with pytest.warns(UserWarning, match=f"It has '{name}': say prompt_name='{name}' for that one"):
        assert np.array_equal(encoder.encode_document(["was"]), encoder.encode(["was"], prompt=""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        story = encoder.encode(["story was"])
        assert np.array_equal(encoder.encode_document(["was"], prompt_name=name), story)
        write(path, {"prompts": {"document": "", name: "story "}})
        TextEncoder.from_folder(folder).encode_document(["was"])


def test_the_command_line_has_the_folders_defaults(folder: Path, tmp_path: Path) -> None:
    sentence_folder(folder, "Dense", pooling={"pooling_mode": "weightedmean"})
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "the film "}})
    (tmp_path / "texts").write_text("was\n")
    out = tmp_path / "out.npy"
    command = [sys.executable, "-m", "fastbert", "encode", str(tmp_path / "texts"), "--model", str(folder)]
    for arguments, named in (
        ([], {}),
        (
            ["--prompt-name", "query", "--pooling", "weightedmean", "--normalize"],
            {"prompt_name": "query", "pooling": "weightedmean", "normalize": True},
        ),
        (
            ["--prompt", "a ", "--no-normalize", "--truncate-dim", "5"],
            {"prompt": "a ", "normalize": False, "truncate_dim": 5},
        ),
    ):
        subprocess.run([*command, *arguments, "--output", str(out)], check=True, timeout=120)
        assert np.allclose(np.load(out), fastbert.encode(["was"], model=folder, **named), atol=1e-6)
    (tmp_path / "texts").write_text("")
    subprocess.run([*command, "--truncate-dim", "9", "--output", str(out)], check=True, timeout=120)
    assert np.load(out).shape == (0, 9)


def test_save_gives_the_sentence_files_back(folder: Path, tmp_path: Path) -> None:
    sentence_folder(folder, "Dense", "Normalize", pooling={"pooling_mode": "cls"})
    write(folder / "sentence_bert_config.json", {"max_seq_length": 8})
    write(folder / "config_sentence_transformers.json", {"prompts": {"q": "a "}, "default_prompt_name": "q"})
    expected = fastbert.encode(TEXTS[:2], model=folder)
    fastbert.save(fastbert.load(folder), tmp_path / "saved")
    assert np.array_equal(fastbert.encode(TEXTS[:2], model=tmp_path / "saved"), expected)
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert names == {path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "modules", [{}, [3], [{"path": "../model"}], [{"path": "/etc"}], [{"path": ".."}], [{"path": "x"}]]
)
def test_save_takes_nothing_from_elsewhere(modules: Any, folder: Path, tmp_path: Path) -> None:
    write(folder / "modules.json", modules)
    fastbert.save(fastbert.load(folder), tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").rglob("*")}
    assert names == {"config.json", "model.safetensors", "modules.json", "vocab.txt"}


# What is not served


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("modules.json", [], "0 modules; expected a Transformer and a Pooling"),
        ("modules.json", {}, "a list of modules"),
        ("modules.json", [3], "a list of modules"),
        (
            "modules.json",
            [{"type": OLD + "Transformer", "path": "../model"}],
            "path: got .*; expected a folder in this",
        ),
        ("modules.json", [{"type": OLD + "Transformer", "path": "/tmp"}], "path: got .*; expected a folder in this"),
        ("modules.json", [{"type": OLD + "Transformer", "path": 3}], "path: got 3; expected a string"),
        ("modules.json", [{"type": OLD + "Transformer", "path": ""}], "1 modules"),
        ("modules.json", [{"type": OLD + "WordEmbeddings"}], r"module 0: got sentence_transformers\.models\.WordEmb"),
        ("modules.json", [{"type": "custom_st.Transformer"}], r"module 0: got custom_st\.Transformer"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling_mode: got 'median'; expected one or several of"),
        ("1_Pooling/config.json", {"pooling_mode": []}, "pooling_mode"),
        ("1_Pooling/config.json", {"pooling_mode": [3]}, "pooling_mode"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": "yes"}, "pooling_mode_cls_token: got 'yes'"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt: got False"),
        ("2_Dense/config.json", {}, "tensors"),
        ("2_Dense/config.json", {"in_features": 31, "out_features": 16}, "tensors .* expected"),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 16, "bias": False}, "tensors"),
        ("2_Dense/config.json", {"in_features": "32"}, "in_features: got '32'"),
        ("2_Dense/config.json", {"activation_function": "my.Tanh"}, "activation_function: got 'my.Tanh'"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Softmax"}, "activation_function"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
        ("2_Dense/config.json", {"use_residual": True}, "use_residual"),
        ("3_LayerNorm/config.json", {"dimension": 31}, "tensors .* expected"),
        ("3_LayerNorm/config.json", {}, "tensors"),
        ("4_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length: got 0"),
        ("sentence_bert_config.json", {"max_seq_length": "8"}, "max_seq_length: got '8'"),
        ("sentence_bert_config.json", {"do_lower_case": "no"}, "do_lower_case: got 'no'"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task: got 'fill-mask'"),
        ("sentence_bert_config.json", {"module_output_name": "sentence_embedding"}, "module_output_name"),
        ("config_sentence_transformers.json", {"prompts": []}, "prompts"),
        ("config_sentence_transformers.json", {"prompts": {"a": 3}}, "prompts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "default_prompt_name: got 'query'"),
        ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim: got 0"),
        ("config_sentence_transformers.json", {"truncate_dim": "9"}, "truncate_dim: got '9'"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, "similarity_fn_name: got 'maxsim'"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type: got 'SparseEncoder'"),
    ],
)
def test_what_is_not_served_is_named(file: str, value: Any, message: str, folder: Path) -> None:
    sentence_folder(folder, "Dense", "LayerNorm", "Normalize")
    write(folder / file, value)
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.from_folder(folder)


@pytest.mark.parametrize(
    "name", ["CNN", "LSTM", "WeightedLayerPooling", "Router", "Asym", "BoW", "WordEmbeddings", "CLIPModel", "Pooling"]
)
def test_other_modules_are_named(name: str, folder: Path) -> None:
    sentence_folder(folder, name)
    with pytest.raises(
        CheckpointError, match=rf"module 2: got sentence_transformers\.models\.{name}; expected Dense or"
    ):
        TextEncoder.from_folder(folder)


@pytest.mark.parametrize("name", ["Router", "Asym", "WordEmbeddings", "CLIPModel", "StaticEmbedding", "BoW"])
def test_other_first_modules_are_named(name: str, folder: Path) -> None:
    write(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": OLD + name}])
    mend = "save the modules of one route as a folder of their own" if name in ("Router", "Asym") else "fastbert serves"
    with pytest.raises(CheckpointError, match=rf"module 0: got sentence_transformers\.models\.{name}; .*{mend}"):
        TextEncoder.from_folder(folder)


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"])
def test_a_module_that_is_missing(name: str, folder: Path) -> None:
    sentence_folder(folder, "Dense")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=str(Path(name).parent)):
        TextEncoder.from_folder(folder)


def test_settings_that_are_not_read_are_named(folder: Path) -> None:
    settings = {"max_seq_length": 16, "model_args": {"attn_implementation": "sdpa"}, "tokenizer_args": {}, "new": 3}
    write(sentence_folder(folder) / "sentence_bert_config.json", settings)
    with pytest.warns(UserWarning, match="is not read by fastbert") as caught:
        TextEncoder.from_folder(folder)
    assert sorted(str(one.message).split(": ")[1].split()[0] for one in caught) == ["model_args", "new"]


@pytest.mark.parametrize(
    "file",
    ["1_Pooling/config.json", "2_Dense/config.json", "3_LayerNorm/config.json", "config_sentence_transformers.json"],
)
def test_settings_of_modules_that_are_not_read_are_named(file: str, folder: Path) -> None:
    sentence_folder(folder, "Dense", "LayerNorm", dense={"out_features": 32})
    path = folder / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextEncoder.from_folder(folder)
    write(path, settings | {"gated": True})
    with pytest.warns(UserWarning, match="gated is not read by fastbert: True"):
        TextEncoder.from_folder(folder)


# Against sentence-transformers itself


@pytest.fixture
def theirs() -> Any:
    return pytest.importorskip("sentence_transformers", reason="compares with sentence-transformers")


RECIPES: list[dict[str, Any]] = [
    {},
    {"modules": ["Normalize"]},
    {"pooling": {"pooling_mode_cls_token": True}, "modules": ["Normalize"]},
    {"pooling": dict.fromkeys(MODES, True)},
    {"modules": ["Dense", "Normalize"]},
    {"modules": ["Dense"], "dense": {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}},
    {"modules": ["Dense"], "dense": {"activation_function": "torch.nn.modules.activation.GELU"}},
    {"modules": ["Normalize", "Dense"]},
    {"modules": ["LayerNorm"]},
    {"modules": ["LayerNorm", "Dense", "Normalize"], "pooling": {"pooling_mode_cls_token": True}},
    {"defaults": {"truncate_dim": 7}, "modules": ["Normalize"]},
    {"settings": {"max_seq_length": 8, "do_lower_case": False}, "modules": ["Normalize"]},
    {"settings": {"max_seq_length": 16, "do_lower_case": True}, "cased": True},
    {"defaults": {"prompts": {"query": "the film "}, "default_prompt_name": "query"}},
    {"defaults": {"prompts": {"query": "the film ", "passage": "story "}, "default_prompt_name": "passage"}},
    {"defaults": {"prompts": {"document": "story "}, "similarity_fn_name": "euclidean"}},
    {"transformer": "0_Transformer", "pooling": {"pooling_mode_weightedmean_tokens": True}},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: ", ".join(recipe) or "plain")
def test_embeddings_are_those_of_sentence_transformers(recipe: dict[str, Any], tmp_path: Path, theirs: Any) -> None:
    root = tmp_path / "root"
    body = tiny_bert.make(root / recipe.get("transformer", ""))
    if recipe.get("cased"):
        write(body / "tokenizer_config.json", {"do_lower_case": False, "tokenizer_class": "BertTokenizer"})
    names = {key: recipe[key] for key in ("pooling", "dense", "transformer") if key in recipe}
    sentence_folder(root, *recipe.get("modules", []), **names)
    if "settings" in recipe:
        write(body / "sentence_bert_config.json", recipe["settings"])
    if "defaults" in recipe:
        write(root / "config_sentence_transformers.json", recipe["defaults"])
    texts = [*TEXTS[:2], "The FILM was Fine", TEXTS[3]]  # theirs pads, and an empty text is one like any other
    model, encoder = theirs.SentenceTransformer(str(root), device="cpu"), TextEncoder.from_folder(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cuts, and of documents by another name
        for method in ("encode", "encode_query", "encode_document"):
            for ours, its in (({}, {}), ({"normalize": True, "truncate_dim": 5}, {"normalize_embeddings": True})):
                options = {"truncate_dim": 5} if its else {}
                expected = getattr(model, method)(texts, **its, **options)
                got = getattr(encoder, method)(texts, **ours)
                assert got.shape == expected.shape
                assert np.abs(got - expected).max() < 2e-5
        got = encoder.encode(texts, truncate_dim=5)
        assert np.abs(got - model.encode(texts, truncate_dim=5)).max() < 2e-5
    assert np.abs(encoder.similarity(got[:2], got) - model.similarity(got[:2], got).numpy()).max() < 2e-3


def test_real_weights_as_in_sentence_transformers(minilm: Path, theirs: Any) -> None:
    model, encoder = theirs.SentenceTransformer(str(minilm), device="cpu"), TextEncoder.from_folder(minilm)
    texts = ["A man is eating food.", "", "Naïve café owners — 東京 — pay $3.50!", "word " * 300]
    queries = ["who eats?", "Where is Tokyo?"]
    with pytest.warns(UserWarning, match="1 text fills max_length=256 tokens"):
        ours = encoder.encode_document(texts)
    assert np.abs(ours - model.encode_document(texts)).max() < 1e-5
    asked = encoder.encode_query(queries, truncate_dim=100, normalize=True)
    expected = model.encode_query(queries, truncate_dim=100, normalize_embeddings=True)
    assert np.abs(asked - expected).max() < 1e-5
    asked = encoder.encode_query(queries)
    assert np.abs(encoder.similarity(asked, ours) - model.similarity(asked, ours).numpy()).max() < 1e-5


def test_a_folder_that_sentence_transformers_saved(folder: Path, tmp_path: Path, theirs: Any) -> None:
    from sentence_transformers.base.modules import Dense as TheirDense
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    modules = [
        Transformer(str(folder)),
        Pooling(32, pooling_mode=("cls", "weightedmean")),
        TheirDense(64, 16),
        LayerNorm(16),
        Normalize(),
    ]
    model = theirs.SentenceTransformer(
        modules=modules,
        device="cpu",
        prompts={"query": "the film "},
        truncate_dim=11,
        similarity_fn_name="manhattan",
    )
    with torch.no_grad():
        for parameter in model[3].parameters():
            parameter.uniform_(0.5, 2)
    model.max_seq_length = 9
    model.save(str(tmp_path / "saved"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of settings that are not read
        encoder = TextEncoder.from_folder(tmp_path / "saved")
    with pytest.warns(UserWarning, match="1 text fills max_length=9"):
        ours = encoder.encode(TEXTS)
    assert ours.shape == (4, 11)
    assert np.abs(ours - model.encode(TEXTS)).max() < 2e-5
    assert np.abs(encoder.similarity(ours, ours) - model.similarity(ours, ours).numpy()).max() < 1e-5
    with pytest.warns(UserWarning, match="1 text fills"):
        ours = encoder.encode(TEXTS, prompt_name="query")
    assert np.abs(ours - model.encode(TEXTS, prompt_name="query")).max() < 2e-5


def test_dense_by_hand() -> None:
    layer = Dense(torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]), "ReLU")
    assert layer(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).tolist() == [[3.5], [0.0]]
