"""What only a GPU can show: real sizes, CUDA graphs, a second device, no waiting of the host. `make gpu` runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from problems import SPACES, problems
from torch import Tensor

from fastbert import backend, reference
from fastbert.config import EncoderConfig
from fastbert.kernels.precision import fp8_sums_fast, fp8_unserved
from fastbert.kernels.target import of
from fastbert.model.body import BertModel
from fastbert.model.encoder import Encoder
from fastbert.model.graphs import graphed
from fastbert.ops.attention import attention
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.embedding import embedding
from fastbert.ops.layer_norm import layer_norm
from fastbert.ops.quantize_rows import linear_quantized, quantize_rows
from fastbert.packing import Packing
from fastbert.testing import assert_close

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SEED = 2**40 + 12345
LENGTHS = [70, 1, 129, 33]
DROPOUT = 0.1


@pytest.fixture(autouse=True)
def kernels_or_nothing() -> Iterator[None]:
    """A kernel that can't run is an error here."""
    with backend.use_backend("triton"):
        yield


@pytest.mark.parametrize("op", SPACES)
def test_calls_of_real_size_are_right_in_float16_and_bfloat16(op: str, device: torch.device) -> None:
    """Each launch choice that BERT models reach, forward and backward, against float64."""
    found = [problem for problem in problems(of(device)) if problem.op == op]
    for problem in found:
        work = problem.prepare(device)
        for got, plain, exact in zip(work.run(), *work.expected(), strict=True):
            assert_close(got, plain, exact, what=f"{op} {problem.shape}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_drops_what_the_reference_drops(dtype: torch.dtype, device: torch.device) -> None:
    """With equal scores, and the unit vectors as values, the result is the mask."""
    batch, heads, seqlen = 3, 12, 64
    packing = Packing.from_lengths([seqlen] * batch, device=device)
    qkv = torch.zeros(batch * seqlen, 3, heads, seqlen, dtype=dtype, device=device)
    qkv[:, 2] = torch.eye(seqlen, dtype=dtype, device=device).repeat(batch, 1)[:, None]
    out = attention(qkv, packing, dropout=0.3, seed=torch.tensor([SEED], device=device))
    kept = (out != 0).view(batch, seqlen, heads, seqlen).transpose(1, 2)
    wanted = reference.attention_keep_mask(torch.tensor([SEED]), batch, heads, seqlen, 0.3)
    assert torch.equal(kept.cpu(), wanted)


@pytest.mark.parametrize("hidden", [384, 768, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_hidden_states_drop_what_the_reference_drops(dtype: torch.dtype, hidden: int, device: torch.device) -> None:
    """Of equal elements those that are kept come out of LayerNorm positive."""
    rows = 1001
    one, zero = torch.ones(hidden, dtype=dtype, device=device), torch.zeros(hidden, dtype=dtype, device=device)
    seed = torch.tensor([SEED], device=device)
    out = layer_norm(one.expand(rows, -1), one, zero, dropout=0.3, seed=seed, eps=1e-12)
    wanted = reference.hidden_keep_mask(torch.tensor([SEED]), rows, hidden, 0.3)
    assert torch.equal((out > 0).cpu(), wanted)

    ids = torch.zeros(rows, dtype=torch.int64, device=device)
    word = torch.randn(1, hidden, device=device).to(dtype)
    tables = (word, word, word, zero, one)  # LayerNorm gives its bias, 1
    out = embedding(ids, ids, None, *tables, dropout=0.3, seed=seed, eps=1e-12)
    assert torch.equal((out != 0).cpu(), wanted)


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of a call, and where its replays leave their result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled, and tables of tiles made, before the capture
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def test_a_graph_replays_with_other_seeds_and_inputs(device: torch.device) -> None:
    packing = Packing.from_lengths(LENGTHS, device=device)
    tokens, heads, head_dim = packing.tokens, 4, 64
    hidden = heads * head_dim
    qkv = torch.randn(tokens, 3, heads, head_dim, dtype=torch.bfloat16, device=device)
    weight, bias = torch.randn(2, hidden, dtype=torch.bfloat16, device=device)
    seed = torch.tensor([1], device=device)

    def run() -> Tensor:
        context = attention(qkv, packing, dropout=DROPOUT, seed=seed).flatten(1)
        x = bias_gelu(context, bias)
        return layer_norm(x, weight, bias, residual=context, dropout=DROPOUT, seed=seed, eps=1e-12)

    graph, out = captured(run)
    results = []
    for number in (2, 3):
        seed.fill_(number)
        qkv.copy_(torch.randn(qkv.shape, device=device))
        graph.replay()
        results.append(out.clone())
        assert torch.equal(out, run()), "a replay and a call differ"
    assert not torch.equal(*results)


def test_a_graph_replays_a_training_step_s_gradients(device: torch.device) -> None:
    packing = Packing.from_lengths(LENGTHS, device=device)
    qkv = torch.randn(packing.tokens, 3, 4, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    dout = torch.randn(packing.tokens, 4, 64, dtype=torch.bfloat16, device=device)
    seed = torch.tensor([1], device=device)

    def run() -> Tensor:
        (gradient,) = torch.autograd.grad(attention(qkv, packing, dropout=DROPOUT, seed=seed), qkv, dout)
        return gradient

    graph, gradient = captured(run)
    seed.fill_(2)
    dout.normal_()
    graph.replay()
    assert torch.equal(gradient, run())


def encoder(device: torch.device) -> Encoder:
    config = EncoderConfig(hidden_size=256, num_heads=4, num_layers=2, intermediate_size=512)
    return Encoder(config).to(device, torch.bfloat16).eval()


def test_an_encoder_runs_as_a_graph(device: torch.device) -> None:
    model, packing = encoder(device), Packing.from_lengths(LENGTHS, device=device)
    x = torch.randn(packing.tokens, 256, dtype=torch.bfloat16, device=device)
    with torch.inference_mode():
        graph, out = captured(lambda: model(x, packing=packing)[0])
        x.normal_()
        graph.replay()
        assert torch.equal(out, model(x, packing=packing)[0])


def test_a_prepared_layer_is_right_under_changing_lengths(device: torch.device) -> None:
    """The first batch prepares it; those that are of its kind and those that are not go the same long way."""
    layer = encoder(device).layer[0]
    for lengths in ([70, 1, 129, 33], [3, 200, 31], [64, 128], [5], [1], [300, 212], [70, 1, 129, 33], [2, 600]):
        packing = Packing.from_lengths(lengths, device=device)
        x = torch.randn(packing.tokens + 7, 256, dtype=torch.bfloat16, device=device)
        rows = torch.arange(packing.tokens, device=device)
        with torch.inference_mode():
            got, wanted = layer(x, packing)[: packing.tokens], layer(x, packing, read=rows)
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7)


def test_a_graphed_model_is_right_under_changing_lengths(device: torch.device) -> None:
    config = EncoderConfig(hidden_size=256, num_heads=4, num_layers=2, intermediate_size=512)
    model = BertModel(config).to(device, torch.bfloat16).eval()
    graphed(model, most=2)
    for lengths in ([70, 1, 129, 33], [60, 0, 110, 30], [300, 5], [9], [70, 1, 129, 33]):
        packing = Packing.from_lengths(lengths, device=device)
        ids = torch.randint(5, config.vocab_size, (packing.tokens,), device=device)
        with torch.inference_mode():
            got = model(ids, packing=packing)
            graphs, model.graphs = model.graphs, None
            with backend.use_backend("torch"):
                plain = model(ids, packing=packing)
                exact = copy.deepcopy(model).double()(ids, packing=packing)
            model.graphs = graphs
        assert_close(got[0], plain[0], exact[0], factor=3.0)
        assert_close(got[1], plain[1], exact[1], factor=3.0)


def test_the_host_never_waits_for_the_device(device: torch.device) -> None:
    model, packing = encoder(device).train(), Packing.from_lengths(LENGTHS, device=device)
    x = torch.randn(packing.tokens, 256, dtype=torch.bfloat16, device=device)
    dout = torch.randn_like(x)
    model(x, packing=packing)[0].backward(dout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, packing=packing)[0].backward(dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_two
def test_a_model_on_the_second_device_while_the_first_is_current() -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    torch.cuda.set_device(first)
    model = encoder(first)
    x = torch.randn(sum(LENGTHS), 256, dtype=torch.bfloat16, device=first)
    dout = torch.randn_like(x)
    results = []
    for device in (first, second):
        packing = Packing.from_lengths(LENGTHS, device=device)
        states = x.detach().to(device).requires_grad_()
        out = model.to(device)(states, packing=packing)[0]
        out.backward(dout.to(device))
        torch.cuda.synchronize(device)
        results.append((out.cpu(), states.grad.cpu()))
        assert torch.cuda.current_device() == 0
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here)


@pytest.mark.parametrize("depth", [384, 768, 1024])
def test_products_in_fp8_that_sum_fast_are_as_right_as_others(depth: int, device: torch.device) -> None:
    """With one term that is a thousand times the others in a tenth of the rows, as BERT's outliers are."""
    if fp8_unserved(torch.bfloat16, of(device)):
        pytest.skip(f"{of(device).arch} has no fp8")
    x = torch.randn(1001, depth, device=device)
    x[::10, 5] = 1000.0
    rows, weight = quantize_rows(x), quantize_rows(torch.randn(400, depth, device=device) * 0.05)
    bias = torch.randn(400, device=device).bfloat16()
    scales = rows.scale[:, None], weight.scale[None, :]
    got = linear_quantized(rows, weight, bias, torch.bfloat16)
    plain = torch._scaled_mm(rows.values, weight.values.t(), *scales, bias=bias, out_dtype=torch.bfloat16)
    wide = [each.values.double() * each.scale.double()[:, None] for each in (rows, weight)]
    assert fp8_sums_fast(depth), "the case tests nothing"
    assert_close(got, plain, wide[0] @ wide[1].t() + bias.double())
