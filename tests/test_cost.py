"""cost: bytes against the tensors themselves, FLOPs against sums done by hand."""

import pytest
import torch

from fastbert.kernels import cost


def nbytes(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("parameters", [torch.float16, torch.float32])
def test_layer_norm_bytes_are_those_of_its_tensors(parameters):
    state = torch.empty(5, 48, dtype=torch.float16)
    vector, statistic = torch.empty(48, dtype=parameters), torch.empty(5)
    seed = torch.empty(1, dtype=torch.int64)
    plain = cost.layer_norm(5, 48, torch.float16, parameters=parameters)
    assert plain.min_bytes == nbytes(state, state, vector, vector)
    options = {"residual": True, "x_bias": True, "dropout": True, "parameters": parameters}
    full = cost.layer_norm(5, 48, torch.float16, **options)
    assert full.min_bytes == nbytes(state, state, state, vector, vector, vector, seed)
    trained = cost.layer_norm(5, 48, torch.float16, statistics=True, **options)
    assert trained.min_bytes == full.min_bytes + nbytes(state, statistic, statistic)
    alone = cost.layer_norm(5, 48, torch.float16, statistics=True, parameters=parameters)
    assert alone.min_bytes == plain.min_bytes + nbytes(statistic, statistic)  # nothing is added, so x is the sum


def test_layer_norm_parameters_have_the_dtype_of_the_state_by_default():
    assert cost.layer_norm(0, 10, torch.float16).min_bytes == 2 * 10 * 2


def test_layer_norm_flops():
    assert cost.layer_norm(3, 10, torch.float32).flops == 3 * (10 * 7 + 5)
    assert cost.layer_norm(3, 10, torch.float32, residual=True, x_bias=True, dropout=True).flops == 3 * (10 * 10 + 5)


def test_unpacking_reads_a_row_number_a_token():
    rows = torch.empty(5, dtype=torch.int64)
    for op in (cost.layer_norm, cost.layer_norm_backward):
        plain, unpacked = op(5, 48, torch.float16), op(5, 48, torch.float16, unpack=True)
        assert (unpacked.min_bytes, unpacked.flops) == (plain.min_bytes + nbytes(rows), plain.flops)


def test_pool():
    x, first = torch.empty(7, 48, dtype=torch.float16), torch.empty(2, 48, dtype=torch.float16)
    out, norm, cu_seqlens = torch.empty(3, 48), torch.empty(3), torch.empty(4, dtype=torch.int32)
    lengths = (5, 0, 2)
    mean = cost.pool(lengths, 48, torch.float16, how="mean")
    assert mean == cost.Cost(7 * 48 + 3 * 48, nbytes(x, out, cu_seqlens))
    assert cost.pool(lengths, 48, torch.float16, how="max") == cost.Cost(7 * 48, nbytes(x, out, cu_seqlens))
    assert cost.pool(lengths, 48, torch.float16, how="cls") == cost.Cost(0, nbytes(first, out, cu_seqlens))
    normal = cost.pool(lengths, 48, torch.float16, how="mean", normalise=True, norm=True)
    assert normal == cost.Cost(mean.flops + 3 * (3 * 48 + 1), mean.min_bytes + nbytes(norm))


def test_pool_backward():
    x, out, norm = torch.empty(7, 48, dtype=torch.float16), torch.empty(3, 48), torch.empty(3)
    cu_seqlens, lengths = torch.empty(4, dtype=torch.int32), (5, 0, 2)
    cls = cost.pool_backward(lengths, 48, torch.float16, how="cls")
    assert cls == cost.Cost(0, nbytes(x, out, cu_seqlens))
    assert cost.pool_backward(lengths, 48, torch.float16, how="mean").min_bytes == cls.min_bytes
    largest = cost.pool_backward(lengths, 48, torch.float16, how="max", normalise=True)
    assert largest == cost.Cost(7 * 48 * 4 + 3 * 48 * 6, nbytes(x, x, out, out, norm, cu_seqlens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bias_gelu(dtype):
    x, bias = torch.empty(5, 48, dtype=dtype), torch.empty(48, dtype=dtype)
    assert cost.bias_gelu(5, 48, dtype).min_bytes == nbytes(x, x, bias)
    assert cost.bias_gelu(5, 48, dtype, bias=False).min_bytes == nbytes(x, x)
    assert cost.bias_gelu(5, 48, dtype).flops == 5 * 48 * 6
    assert cost.bias_gelu(5, 48, dtype, bias=False, approximate="tanh").flops == 5 * 48 * 8


def test_gated_bias_gelu():
    x, out, bias = (torch.empty(shape, dtype=torch.float16) for shape in ((5, 96), (5, 48), (96,)))
    options = {"gated": True, "bias": False}
    assert cost.bias_gelu(5, 48, torch.float16, gated=True).min_bytes == nbytes(x, out, bias)
    assert cost.bias_gelu(5, 48, torch.float16, **options).min_bytes == nbytes(x, out)
    assert cost.bias_gelu(5, 48, torch.float16, gated=True).flops == 5 * 48 * 8
    assert cost.bias_gelu_backward(5, 48, torch.float16, gated=True).min_bytes == nbytes(x, x, out, bias, bias)
    assert cost.bias_gelu_backward(5, 48, torch.float16, **options).min_bytes == nbytes(x, x, out)
    assert cost.bias_gelu_backward(5, 48, torch.float16, gated=True).flops == 5 * 48 * 18


def test_embedding():
    out, used = torch.empty(7, 48, dtype=torch.bfloat16), torch.empty(4 + 3 + 2, 48, dtype=torch.bfloat16)
    vector, ids = torch.empty(48, dtype=torch.bfloat16), torch.empty(7, dtype=torch.int64)
    full = cost.embedding(7, 48, torch.bfloat16, entries=9)
    assert full.min_bytes == nbytes(out, used, vector, vector, ids, ids, ids)
    assert full.flops == 7 * (48 * 9 + 5)
    dropped = cost.embedding(7, 48, torch.bfloat16, entries=9, token_types=False, dropout=True)
    assert dropped.min_bytes == nbytes(out, used, vector, vector, ids, ids) + 8
    assert dropped.flops == 7 * (48 * 10 + 5)


@pytest.mark.parametrize("parameters", [torch.float16, torch.float32])
def test_layer_norm_backward(parameters):
    state, statistic = torch.empty(5, 48, dtype=torch.float16), torch.empty(5)
    vector, seed = torch.empty(48, dtype=parameters), torch.empty(1, dtype=torch.int64)
    plain = cost.layer_norm_backward(5, 48, torch.float16, parameters=parameters)
    assert plain.min_bytes == nbytes(state, state, state, statistic, statistic, vector, vector, vector)
    assert plain.flops == 5 * (48 * 13 + 2)
    added = cost.layer_norm_backward(5, 48, torch.float16, residual=True, parameters=parameters)
    assert added.min_bytes == plain.min_bytes
    full = cost.layer_norm_backward(
        5, 48, torch.float16, residual=True, x_bias=True, dropout=True, parameters=parameters
    )
    assert full.min_bytes == added.min_bytes + nbytes(state, vector, seed)
    assert full.flops == 5 * (48 * 15 + 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bias_gelu_backward(dtype):
    x, bias = torch.empty(5, 48, dtype=dtype), torch.empty(48, dtype=dtype)
    assert cost.bias_gelu_backward(5, 48, dtype).min_bytes == nbytes(x, x, x, bias, bias)
    assert cost.bias_gelu_backward(5, 48, dtype, bias=False).min_bytes == nbytes(x, x, x)
    assert cost.bias_gelu_backward(5, 48, dtype).flops == 5 * 48 * 12
    assert cost.bias_gelu_backward(5, 48, dtype, bias=False, approximate="tanh").flops == 5 * 48 * 14


def test_embedding_backward():
    dout, used = torch.empty(7, 48, dtype=torch.bfloat16), torch.empty(4 + 3 + 2, 48, dtype=torch.bfloat16)
    dtables = torch.empty(31 + 17 + 2, 48, dtype=torch.bfloat16)
    vector, ids = torch.empty(48, dtype=torch.bfloat16), torch.empty(7, dtype=torch.int64)
    full = cost.embedding_backward(7, 48, torch.bfloat16, entries=9, table_entries=50)
    assert full.min_bytes == nbytes(dout, used, dtables, vector, vector, vector, ids, ids, ids)
    assert full.flops == 7 * (48 * 21 + 5)
    dropped = cost.embedding_backward(
        7, 48, torch.bfloat16, entries=9, table_entries=50, token_types=False, dropout=True
    )
    assert dropped.min_bytes == full.min_bytes - nbytes(ids) + 8
    assert dropped.flops == 7 * (48 * 22 + 5)


def test_nothing_costs_nothing():
    assert cost.bias_gelu(0, 48, torch.float32, bias=False) == cost.Cost(0, 0)


def test_attention_bytes_are_those_of_its_tensors():
    qkv, out = torch.empty(8, 3, 2, 16, dtype=torch.float16), torch.empty(8, 2, 16, dtype=torch.float16)
    cu_seqlens, lse = torch.empty(3, dtype=torch.int32), torch.empty(2, 8)
    bias, seed = torch.empty(1, 2, 5, 5, dtype=torch.float16), torch.empty(1, dtype=torch.int64)
    assert cost.attention([5, 3], 2, 16, torch.float16).min_bytes == nbytes(qkv, out, cu_seqlens)
    full = cost.attention([5, 3], 2, 16, torch.float16, bias_elements=bias.numel(), dropout=True, lse=True)
    assert full.min_bytes == nbytes(qkv, out, cu_seqlens, lse, bias, seed)


def test_attention_flops_grow_with_the_square_of_each_length():
    assert cost.attention([5, 3], 2, 16, torch.float16).flops == 2 * (25 + 9) * (4 * 16 + 5) + 8 * 2 * 17
    assert cost.attention([], 2, 16, torch.float16).flops == 0


def test_attention_backward():
    qkv, out = torch.empty(8, 3, 2, 16, dtype=torch.float16), torch.empty(8, 2, 16, dtype=torch.float16)
    cu_seqlens, lse, seed = torch.empty(3, dtype=torch.int32), torch.empty(2, 8), torch.empty(1, dtype=torch.int64)
    plain = cost.attention_backward([5, 3], 2, 16, torch.float16)
    assert plain.min_bytes == nbytes(qkv, qkv, out, out, cu_seqlens, lse)
    assert plain.flops == 2 * (25 + 9) * (10 * 16 + 6) + 8 * 2 * 2 * 16
    assert (
        cost.attention_backward([5, 3], 2, 16, torch.float16, dropout=True).min_bytes == plain.min_bytes + seed.nbytes
    )


def test_attention_backward_of_a_bias():
    table, gradient = torch.empty(2, 9, dtype=torch.float16), torch.empty(2, 9)
    plain = cost.attention_backward([5, 3], 2, 16, torch.float16)
    biased = cost.attention_backward([5, 3], 2, 16, torch.float16, bias_elements=table.numel())
    assert biased.min_bytes == plain.min_bytes + nbytes(table, gradient)
    assert biased.flops == plain.flops + 2 * (25 + 9) * 2


def test_rotary():
    qkv, angles = torch.empty(8, 3, 2, 16, dtype=torch.float16), torch.empty(2, 8, 8)
    assert cost.rotary(8, 2, 16, torch.float16) == cost.Cost(8 * 2 * 2 * 16 * 3, nbytes(qkv, qkv, angles))


def test_linear_gelu():
    x, weight, out = torch.empty(5, 48), torch.empty(16, 48), torch.empty(5, 16)
    bias = torch.empty(16)
    whole = cost.linear_gelu(5, 48, 16, torch.float32)
    assert whole == cost.Cost(5 * 16 * (2 * 48 + 6), nbytes(x, weight, bias, out))
    kept = cost.linear_gelu(5, 48, 16, torch.float32, bias=False, product=True)
    assert kept == cost.Cost(5 * 16 * (2 * 48 + 5), nbytes(x, weight, out, out))


def test_linear():
    x, weight, out = torch.empty(5, 48), torch.empty(16, 48), torch.empty(5, 16)
    assert cost.linear(5, 48, 16, torch.float32) == cost.Cost(2 * 5 * 48 * 16, nbytes(x, weight, out))
    both = cost.linear_backward(5, 48, 16, torch.float32)
    assert both == cost.Cost(4 * 5 * 48 * 16, nbytes(x, x, weight, weight, out))
