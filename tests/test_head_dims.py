"""Heads of any width, not only of multiples of 8: the op on each path, and whole models."""

import copy
from contextlib import nullcontext

import pytest
import torch
from test_attention import DTYPES, PATHS, check, check_gradients, random_qkv
from test_encoder import hf_bert, inputs, with_our_encoder
from tiny_bert import VOCABULARY

import fastbert
from fastbert import backend, quantize
from fastbert.config import EncoderConfig
from fastbert.cpu.machine import Machine, host
from fastbert.errors import ArgumentError
from fastbert.ops.attention import attention
from fastbert.packing import Packing
from fastbert.run import cpu
from fastbert.testing import assert_close

ODD = [1, 2, 3, 5, 13, 20, 26, 30, 36, 52, 100]
# TinyBERT_General_4L_312D, rubert-tiny2: 312 / 12 = 26.
TINYBERT = {"hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 600}
# Of tiny test models: 20 / 5 = 4. And 15 / 5 = 3, 13 / 1.
SHAPES = [
    TINYBERT,
    {"hidden_size": 20, "num_attention_heads": 5},
    {"hidden_size": 15, "num_attention_heads": 5},
    {"hidden_size": 13, "num_attention_heads": 1},
    {"hidden_size": 280, "num_attention_heads": 1},
]


def hidden(model, batch):
    """Hidden states of the tokens that are no padding."""
    return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", ODD)
def test_user_case_05_head_dims(head_dim, dtype, path, generator):
    packing = Packing.from_lengths([5, 0, 33, 17])
    check(path, random_qkv(packing.tokens + 2, 2, head_dim, dtype, generator), packing)


@pytest.mark.parametrize("path", [*PATHS, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", ODD)
def test_a_head_reads_nothing_of_the_next(head_dim, dtype, path, generator):
    """Which is NaN. Without a path it is the CPU's own kernel, where there is one."""
    packing = Packing.from_lengths([5, 0, 33, 17])
    qkv = random_qkv(packing.tokens, 3, head_dim, dtype, generator)
    with nullcontext() if path is None else backend.use_backend(path):
        whole = attention(qkv, packing)
        qkv[:, :, 1] = torch.nan
        assert torch.equal(attention(qkv, packing)[:, ::2], whole[:, ::2])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", ODD)
def test_user_case_05_gradients_of_head_dims(head_dim, dtype, path, generator):
    packing = Packing.from_lengths([5, 0, 20, 13])
    check_gradients(path, random_qkv(packing.tokens + 2, 2, head_dim, dtype, generator), packing, generator)


@pytest.mark.parametrize("path", PATHS)
def test_options_beside_an_odd_head_dim(path, generator):
    packing = Packing.from_lengths([5, 20, 13])
    qkv = random_qkv(packing.tokens, 2, 26, torch.float32, generator)
    bias = torch.randn(3, 2, 20, 20, generator=generator)
    options = {"bias": bias, "alibi_slopes": torch.tensor([0.1, 0.5]), "window": 7, "scale": 0.3}
    check(path, qkv, packing, **options)
    check(path, qkv, packing, dropout=0.2, seed=torch.tensor([3]))


def test_heads_wider_than_the_kernels_run_in_torch(generator):
    packing = Packing.from_lengths([5, 20, 13])
    check("torch", random_qkv(packing.tokens, 2, 300, torch.float32, generator), packing)


def test_a_head_has_a_column():
    with pytest.raises(ArgumentError, match="at least one column"):
        attention(torch.zeros(4, 3, 2, 0), Packing.from_lengths([4]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_user_case_05_head_dim_26(sizes, dtype, generator):
    """Whole encoders beside transformers': as a drop-in."""
    plain, batch = hf_bert(**sizes).to(dtype), inputs(generator)
    with torch.no_grad():
        exact = hidden(copy.deepcopy(plain).double(), batch)
        assert_close(hidden(with_our_encoder(plain), batch), hidden(plain, batch), exact, factor=3.0, what=str(sizes))


@pytest.mark.parametrize("sizes", SHAPES[:3], ids=str)
def test_user_case_05_gradients_of_a_model(sizes, generator):
    plain, batch = hf_bert(**sizes), inputs(generator)
    with torch.no_grad():
        dout = torch.randn(hidden(plain, batch).shape, generator=generator)

    def gradient(model):
        states = hidden(model, batch)
        states.backward(dout.to(states.dtype))
        return model.embeddings.word_embeddings.weight.grad

    ours, exact = with_our_encoder(plain), copy.deepcopy(plain).double()
    assert_close(gradient(ours), gradient(plain), gradient(exact), factor=3.0)


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8"])
def test_user_case_05_texts(name, tmp_path, generator):
    """`encode` of a folder, which the kernels of the CPU run whole where they run other models so."""
    if name != "fp32" and not (isinstance(host(), Machine) and host().bfloat16 and host().int8):
        pytest.skip("needs a CPU with products of bfloat16 and int8, such as Zen 4")
    hf_bert(**TINYBERT, vocab_size=len(VOCABULARY)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    texts = ["the film was fine", "a plot", "ada hopper met grace turing in paris , and the music was lovely ."] * 9
    encoder = fastbert.TextEncoder.from_folder(tmp_path, dtype=name)
    got = torch.from_numpy(encoder.encode(texts, max_length=32))
    with backend.use_backend("torch"):
        wanted = torch.from_numpy(fastbert.TextEncoder.from_folder(tmp_path).encode(texts, max_length=32))
    least = {"fp32": 1 - 1e-5, "bf16": 0.999, "int8": 0.99}[name]
    assert torch.nn.functional.cosine_similarity(got, wanted).min() > least


@pytest.mark.parametrize("int8", [False, True])
def test_odd_heads_are_laid_out_as_others_are(int8, generator):
    if not isinstance(host(), Machine) or (int8 and not host().int8):
        pytest.skip("needs a CPU with kernels, for int8 with products of it")
    sizes = {"hidden_size": 312, "num_layers": 1, "intermediate_size": 64}
    served = {}
    for heads in (12, 39, 1):
        encoder = fastbert.Encoder(EncoderConfig(**sizes, num_heads=heads)).eval()
        encoder = quantize(encoder, dtype="int8") if int8 else encoder
        with torch.no_grad():
            served[heads] = cpu.unserved(encoder.layers(), torch.zeros(4, 312)) is None
    assert served == {12: True, 39: True, 1: False}  # a head of 312 runs in torch
