"""The public API under arguments and states of torch that nobody thought of: a right answer, or an error of ours.

`make fuzz MINUTES=20` draws for so long, anew each time, with every buffer of a kernel guarded (FASTBERT_CHECK=1).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch
from ambient import AMBIENTS, LYING, SPOILT, Ambient, spoilt
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastbert
from fastbert.backend import use_backend
from fastbert.ops.attention import attention
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.cross_entropy import linear_cross_entropy
from fastbert.ops.embedding import embedding
from fastbert.ops.layer_norm import layer_norm, linear_layer_norm
from fastbert.ops.linear import linear
from fastbert.ops.linear_gelu import linear_gelu
from fastbert.ops.pooling import pool
from fastbert.packing import Packing

EXAMPLES = int(os.environ.get("FASTBERT_FUZZ_EXAMPLES", 60))
drawn = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FASTBERT_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    phases=(Phase.generate,) if "FASTBERT_FUZZ_EXAMPLES" in os.environ else tuple(Phase),
    suppress_health_check=list(HealthCheck),
)

# Of the largest value: the error of a bfloat16 model, and that of float32.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.02}

Arguments = dict[str, Any]


def answer(call: Callable[[], Any]) -> Any:
    """What a call gives, or the error of ours that it raises; any other error is the test's failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except fastbert.FastbertError as error:
            found = error
    assert found.argument, found
    assert found.expected, found
    return found


def assert_alike(got: Any, expected: Any, tolerance: float) -> None:
    """The same numbers, whatever their dtype."""
    with torch.no_grad():
        if isinstance(got, Tensor) and got.is_sparse:
            got, expected = got.to_dense(), expected.to_dense()
        assert got.shape == expected.shape
        if got.device.type == "meta":
            return
        got, expected = got.detach().double(), expected.detach().double()
        known = expected[expected.isfinite()]
        largest = known.abs().max().item() if known.numel() else 0.0
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(largest, 1e-3), equal_nan=True)


def try_it(ambient: Ambient, call: Callable[[], Any], *, spoiled: bool, dtype: torch.dtype) -> None:
    """Hold what a call gives in a state of torch against what plain torch gives in a clean one."""
    if ambient.around == "autocast" and dtype not in (torch.float32, torch.bfloat16):
        ambient = Ambient()  # parameters in another half type than autocast's are refused with words
    with torch.no_grad(), use_backend("torch"):
        expected = answer(call)
    with ambient.entered():
        got = answer(call)
    if isinstance(expected, Exception) or isinstance(got, Exception):
        assert spoiled, (got, expected)
        return
    cast = ambient.around == "autocast"
    if not (spoiled and cast):  # of numbers in the millions, rounded to 8 bits, another may be the greatest
        assert_alike(got, expected, TOLERANCE[torch.bfloat16 if cast else dtype])


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def ints(high: int, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randint(high, shape, generator=generator, dtype=torch.int64, device="cpu")


def _attention(packing: Packing, dtype: torch.dtype, width: int) -> tuple[Callable[..., Any], Arguments]:
    return lambda qkv: attention(qkv, packing), {"qkv": normal(packing.tokens, 3, 2, width, dtype=dtype)}


def _layer_norm(packing: Packing, dtype: torch.dtype, width: int) -> tuple[Callable[..., Any], Arguments]:
    rows = normal(packing.tokens, width, dtype=dtype)
    return lambda **given: layer_norm(**given, eps=1e-12), {
        "x": rows, "weight": normal(width, dtype=dtype, seed=1), "bias": normal(width, dtype=dtype, seed=2),
        "residual": normal(packing.tokens, width, dtype=dtype, seed=3),
    }  # fmt: skip


def _linear(packing: Packing, dtype: torch.dtype, width: int) -> tuple[Callable[..., Any], Arguments]:
    return linear, {
        "x": normal(packing.tokens, width, dtype=dtype),
        "weight": normal(24, width, dtype=dtype),
        "bias": normal(24, dtype=dtype),
    }


def _linear_gelu(packing: Packing, dtype: torch.dtype, width: int) -> tuple[Callable[..., Any], Arguments]:
    return linear_gelu, _linear(packing, dtype, width)[1]


def _linear_layer_norm(packing: Packing, dtype: torch.dtype, width: int) -> tuple[Callable[..., Any], Arguments]:
    return lambda **given: linear_layer_norm(**given, eps=1e-12), {
        "x": normal(packing.tokens, width, dtype=dtype), "weight": normal(24, width, dtype=dtype),
        "x_bias": normal(24, dtype=dtype), "residual": normal(packing.tokens, 24, dtype=dtype),
        "norm_weight": normal(24, dtype=dtype, seed=1), "norm_bias": normal(24, dtype=dtype, seed=2),
    }  # fmt: skip


def _bias_gelu(packing: Packing, dtype: torch.dtype, width: int) -> tuple[Callable[..., Any], Arguments]:
    return bias_gelu, {"x": normal(packing.tokens, width, dtype=dtype), "bias": normal(width, dtype=dtype)}


def _pool(packing: Packing, dtype: torch.dtype, width: int) -> tuple[Callable[..., Any], Arguments]:
    return lambda x: pool(x, packing, "mean"), {"x": normal(packing.tokens, width, dtype=dtype)}


def _embedding(packing: Packing, dtype: torch.dtype, width: int) -> tuple[Callable[..., Any], Arguments]:
    return lambda **given: embedding(**given, eps=1e-12), {
        "input_ids": ints(30, packing.tokens), "position_ids": ints(50, packing.tokens),
        "token_type_ids": ints(2, packing.tokens), "word": normal(30, width, dtype=dtype),
        "position": normal(50, width, dtype=dtype), "token_type": normal(2, width, dtype=dtype),
        "weight": normal(width, dtype=dtype, seed=1), "bias": normal(width, dtype=dtype, seed=2),
    }  # fmt: skip


def _cross_entropy(packing: Packing, dtype: torch.dtype, width: int) -> tuple[Callable[..., Any], Arguments]:
    return linear_cross_entropy, {
        "x": normal(packing.tokens, width, dtype=dtype),
        "weight": normal(30, width, dtype=dtype),
        "bias": normal(30, dtype=dtype),
        "labels": ints(30, packing.tokens),
    }


OPS = {
    op.__name__[1:]: op
    for op in (
        _attention, _bias_gelu, _cross_entropy, _embedding, _layer_norm, _linear, _linear_gelu, _linear_layer_norm,
        _pool,
    )
}  # fmt: skip


@pytest.mark.parametrize("op", OPS)
@given(
    ambient=AMBIENTS,
    lengths=LENGTHS,
    dtype=DTYPES,
    width=st.sampled_from([1, 5, 8, 12, 16, 17, 26, 32, 40, 64]),
    lying=st.sampled_from(list(LYING)),
    spoil=st.sampled_from([None, None, *SPOILT]),
    which=st.integers(0, 7),
)
@drawn
def test_ops(
    op: str,
    ambient: Ambient,
    lengths: list[int],
    dtype: torch.dtype,
    width: int,
    lying: str,
    spoil: str | None,
    which: int,
) -> None:
    call, arguments = OPS[op](Packing.from_lengths(lengths), dtype, width)
    name = list(arguments)[which % len(arguments)]
    made: Any = LYING[lying](arguments[name])
    if spoil is not None:
        made = spoilt(made.detach(), spoil)
    arguments[name] = made
    try_it(ambient, lambda: call(**arguments), spoiled=spoil is not None, dtype=dtype)


@given(
    ambient=AMBIENTS,
    ends=st.lists(st.integers(-3, 20), max_size=6),
    ordered=st.booleans(),
    longest=st.one_of(st.none(), st.integers(-2, 30)),
    indices=st.one_of(st.none(), st.lists(st.integers(-2, 60), max_size=20)),
    kind=st.sampled_from([torch.int32, torch.int32, torch.int64, torch.float32]),
    lying=st.sampled_from(["as it is", "every other row", "off by one"]),
    seqlen=st.integers(0, 12),
)
@drawn
def test_packings_made_by_hand(
    ambient: Ambient, ends: list[int], ordered: bool, longest: int | None, indices: list[int] | None,
    kind: torch.dtype, lying: str, seqlen: int,
) -> None:  # fmt: skip
    if ordered:
        ends = [0, *sorted(abs(end) for end in ends)]
    cu_seqlens = LYING[lying](torch.tensor(ends, dtype=kind))
    lengths = [after - before for before, after in pairwise(ends)]
    tokens = ends[-1] if ends else 0
    longest = max(lengths, default=0) if longest is None else longest
    seqlen = max(seqlen, longest)
    if indices is None:
        indices = [i * seqlen + j for i, length in enumerate(lengths) for j in range(max(length, 0))]

    def call() -> Tensor | None:
        packing = Packing(
            cu_seqlens, longest, torch.tensor(indices, dtype=torch.int64, device="cpu"), (len(lengths), seqlen)
        )
        if packing.tokens == 0:
            return None
        qkv = normal(packing.tokens, 3, 2, 16)
        context = attention(qkv, packing).flatten(1)
        assert packing.unpack(context).isfinite().all()
        return torch.cat([context, pool(context, packing, "mean")])

    with torch.no_grad(), use_backend("torch"):
        expected = answer(call)
    with ambient.entered():
        got = answer(call)
    assert isinstance(got, Exception) == isinstance(expected, Exception), (got, expected)
    if isinstance(got, Tensor):
        assert tokens == len(indices)
        assert_alike(got, expected, TOLERANCE[torch.bfloat16 if ambient.around == "autocast" else torch.float32])


@cache
def models() -> dict[str, fastbert.BertModel]:
    """A model, and it in bfloat16 and int8."""
    generator = torch.Generator("cpu").manual_seed(1)
    model = tiny_bert.random_model(generator)
    plain = tiny_bert.random_model(torch.Generator("cpu").manual_seed(1))
    return {
        "fp32": model,
        "bf16": plain.to(torch.bfloat16),
        "int8": fastbert.quantize(tiny_bert.random_model(torch.Generator("cpu").manual_seed(1)), dtype="int8"),
    }


@given(
    ambient=AMBIENTS,
    precision=st.sampled_from(["fp32", "fp32", "bf16", "int8"]),
    lengths=LENGTHS,
    kind=st.sampled_from([torch.int64, torch.int32]),
    mask=st.sampled_from(["none", "int64", "bool", "float32", "float16", "additive"]),
    spoil=st.sampled_from([None, None, *SPOILT]),
    which=st.sampled_from(["input_ids", "attention_mask", "token_type_ids", "position_ids"]),
)
@drawn
def test_models(
    ambient: Ambient, precision: str, lengths: list[int], kind: torch.dtype, mask: str, spoil: str | None, which: str
) -> None:
    model, seqlen = models()[precision], max(lengths)
    kept = torch.arange(seqlen, device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
    arguments: Arguments = {
        "input_ids": ints(50, len(lengths), seqlen).to(kind),
        "token_type_ids": ints(2, len(lengths), seqlen).to(kind),
        "position_ids": torch.arange(seqlen, device="cpu").expand(len(lengths), -1).to(kind),
    }
    if mask == "additive":
        arguments["attention_mask"] = torch.zeros(kept.shape, device="cpu").masked_fill(~kept, -torch.inf)[
            :, None, None
        ]
    elif mask != "none":
        arguments["attention_mask"] = kept.to(getattr(torch, mask))
    if spoil is not None and which in arguments:
        arguments[which] = spoilt(arguments[which], spoil)
    dtype = torch.bfloat16 if precision != "fp32" else torch.float32
    call = lambda: model(**arguments).last_hidden_state  # noqa: E731
    if precision == "int8" and ambient.gradient == "grad":
        ambient = Ambient()
    try_it(ambient, call, spoiled=spoil is not None, dtype=dtype)


@cache
def folder() -> Path:
    return tiny_bert.make(Path(tempfile.mkdtemp()))


@cache
def encoder(precision: str) -> fastbert.TextEncoder:
    return fastbert.TextEncoder.from_folder(folder(), dtype=precision)  # type: ignore[arg-type]


TEXTS = st.lists(
    st.one_of(
        st.text(max_size=60), st.lists(st.sampled_from(tiny_bert.VOCABULARY), max_size=40).map(" ".join), st.none(),
        st.integers(), st.binary(max_size=4), st.tuples(st.text(max_size=5), st.text(max_size=5)),
    ),
    max_size=12,
)  # fmt: skip


@given(
    ambient=AMBIENTS,
    precision=st.sampled_from(["fp32", "bf16", "int8"]),
    texts=TEXTS,
    pooling=st.sampled_from(["mean", "cls", "max", "nothing", 3]),
    normalize=st.booleans(),
    max_length=st.one_of(st.integers(-1, 60), st.sampled_from([None, "8", 2.5])),
    batch_tokens=st.one_of(st.none(), st.integers(-1, 100), st.just("x")),
)
@drawn
def test_encode(
    ambient: Ambient,
    precision: str,
    texts: list[Any],
    pooling: Any,
    normalize: bool,
    max_length: Any,
    batch_tokens: Any,
) -> None:
    options = {"pooling": pooling, "normalize": normalize, "max_length": max_length, "batch_tokens": batch_tokens}
    call = lambda: torch.as_tensor(encoder(precision).encode(texts, **options), device="cpu")  # noqa: E731
    encoder(precision)
    with torch.no_grad(), use_backend("torch"):
        expected = answer(call)
    with ambient.entered():
        got = answer(call)
    assert isinstance(got, Exception) == isinstance(expected, Exception), (got, expected)
    if isinstance(got, Tensor):
        assert got.dtype == torch.float32
        assert_alike(got, expected, 0.1 if ambient.around == "autocast" or precision != "fp32" else 1e-3)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@given(field=st.integers(0, 60), value=JSON, remove=st.booleans())
@drawn
def test_folders_with_an_odd_field(field: int, value: Any, remove: bool) -> None:
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder(), copy, dirs_exist_ok=True)
        path = Path(copy) / "config.json"
        config = json.loads(path.read_text())
        name = sorted(config)[field % len(config)]
        config[name] = value
        if remove:
            del config[name]
        path.write_text(json.dumps(config))
        got = answer(lambda: fastbert.encode(["a film"], model=copy))
        assert isinstance(got, fastbert.FastbertError) or got.shape == (1, 32)


@given(
    name=st.sampled_from(["config.json", "model.safetensors", "vocab.txt"]),
    place=st.floats(0, 1),
    byte=st.integers(0, 255),
    cut=st.booleans(),
)
@drawn
def test_folders_with_an_odd_byte(name: str, place: float, byte: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder(), copy, dirs_exist_ok=True)
        path = Path(copy) / name
        content = bytearray(path.read_bytes())
        at = int(place * (len(content) - 1))
        content[at] = byte
        path.write_bytes(content[:at] if cut else content)
        got = answer(lambda: fastbert.encode(["a film"], model=copy))
        assert isinstance(got, fastbert.FastbertError) or got.shape == (1, 32)
