"""embedding: both paths against float64, by the error rule."""

import pytest
import torch
import torch.nn.functional as F
from gradients import check_gradients, gradients, limit_programs

from fastbert import backend, reference
from fastbert.errors import ArgumentError
from fastbert.kernels import embedding as kernel
from fastbert.kernels import row_wise_choices
from fastbert.kernels.dropout import drop_scale
from fastbert.ops.embedding import embedding, embedding_backward, embedding_forward
from fastbert.testing import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = ["triton", "torch"]
WORDS, POSITIONS, TYPES = 31, 17, 2


def tables(hidden, dtype, generator, device, parameters=None):
    """word, position, token_type, weight, bias."""
    word, position, token_type = (
        torch.randn(entries, hidden, generator=generator).to(device, dtype) for entries in (WORDS, POSITIONS, TYPES)
    )
    weight, bias = torch.randn(2, hidden, generator=generator).to(device, parameters or dtype)
    return word, position, token_type, weight, bias


def ids(tokens, generator, device):
    """input_ids, position_ids, token_type_ids, with the first and the last entry of each table."""
    made = []
    for entries in (WORDS, POSITIONS, TYPES):
        row = torch.randint(entries, (tokens,), generator=generator)
        row[0], row[-1] = 0, entries - 1
        made.append(row.to(device))
    return made


def cast(tensors, dtype):
    return [tensor.to(dtype) for tensor in tensors]


def check(path, some_ids, some_tables, *, eps=1e-12, dropout=0.0, seed=None):
    """Run one path and hold it to the error rule; returns the output."""
    input_ids, position_ids, token_type_ids = some_ids
    with backend.use_backend(path):
        out = embedding(*some_ids, *some_tables, dropout=dropout, seed=seed, eps=eps)
    keep = None
    if seed is not None:
        keep = reference.hidden_keep_mask(seed, len(input_ids), some_tables[0].shape[1], dropout)
    word, position, token_type, weight, bias = cast(some_tables, some_tables[0].dtype)
    types = token_type[0] if token_type_ids is None else token_type[token_type_ids]
    plain = F.layer_norm(word[input_ids] + types + position[position_ids], weight.shape, weight, bias, eps)
    if keep is not None:
        plain = plain * keep * drop_scale(dropout)
    exact = reference.embedding(*some_ids, *cast(some_tables, torch.float64), keep=keep, dropout=dropout, eps=eps)
    assert_close(out, plain, exact, what=path)
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 8, 48, 128, 384, 768, 769, 1024, 1536, 8192])
def test_widths_case_14(hidden, dtype, path, device, generator, nan_empty):
    check(path, ids(3, generator, device), tables(hidden, dtype, generator, device), eps=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("has_types", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
def test_each_branch(tokens, has_types, dropout, dtype, path, device, generator, nan_empty):
    """Hidden 48 puts several rows in a program, and 5 tokens leave the last one part empty."""
    input_ids, position_ids, token_type_ids = ids(tokens, generator, device)
    check(
        path,
        (input_ids, position_ids, token_type_ids if has_types else None),
        tables(48, dtype, generator, device),
        dropout=dropout,
        seed=torch.tensor([6], device=device) if dropout else None,
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_parameters_beside_half_tables(dtype, path, device, generator):
    check(path, ids(4, generator, device), tables(96, dtype, generator, device, parameters=torch.float32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_equal_entries_give_the_bias_case_9(eps, path, device, generator):
    word, position, token_type, weight, bias = tables(384, torch.float16, generator, device)
    constant = (word.fill_(1.0), position.fill_(0.5), token_type.fill_(0.0), weight, bias)
    out = check(path, ids(2, generator, device), constant, eps=eps)
    assert torch.equal(out, bias.expand(2, -1))


@pytest.mark.parametrize("path", PATHS)
def test_variance_does_not_cancel_case_10(path, device, generator):
    word, *others = tables(768, torch.float32, generator, device)
    check(path, ids(3, generator, device), (word + 1e4, *others))


@pytest.mark.parametrize("path", PATHS)
def test_outliers_stay_finite_case_8(path, device, generator):
    word, position, token_type, weight, bias = tables(96, torch.float16, generator, device)
    word[:, 3], position[:, 3] = 6e4, 6e4
    with backend.use_backend(path):
        some_ids = ids(3, generator, device)
        out = embedding(*some_ids, word, position, token_type, weight, bias, eps=1e-12)
    exact = reference.embedding(*some_ids, *cast((word, position, token_type, weight, bias), torch.float64), eps=1e-12)
    assert_close(out, exact.half(), exact)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["slice", "transposed", "odd base"])
def test_layouts_case_29(layout, path, device, generator):
    word, position, token_type, weight, bias = tables(48, torch.float16, generator, device)
    if layout == "slice":
        word, weight = torch.cat([word, word], 1)[:, 48:], torch.stack([weight, bias], 1)[:, 0]
    elif layout == "transposed":
        word, position = word.T.contiguous().T, position.T.contiguous().T
    else:
        word = F.pad(word.flatten(), (1, 0))[1:].view(WORDS, 48)
    some_ids = [torch.stack([row, row], 1)[:, 0] for row in ids(5, generator, device)]
    check(path, some_ids, (word, position, token_type, weight, bias))


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens_case_15(path, device, generator):
    none = torch.empty(0, dtype=torch.int64, device=device)
    with backend.use_backend(path):
        out = embedding(none, none, None, *tables(48, torch.float32, generator, device), eps=1e-5)
    assert out.shape == (0, 48)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [-1, 31, 2**40, -(2**63)])
def test_an_id_outside_its_table_gives_nan_and_no_wild_read(bad, which, dropout, device, generator):
    some_ids = ids(5, generator, device)
    some_ids[which][2] = bad
    some_tables = tables(48, torch.float32, generator, device)
    seed = torch.tensor([6], device=device)
    with backend.use_backend("triton"):
        out = embedding(*some_ids, *some_tables, dropout=dropout, seed=seed, eps=1e-5)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4]].isfinite().all()
    with backend.use_backend("torch"), pytest.raises(ArgumentError, match="ids from 0 to") as raised:
        embedding(*[row.cpu() for row in some_ids], *[table.cpu() for table in some_tables], eps=1e-5)
    assert raised.value.argument == ("input_ids", "position_ids", "token_type_ids")[which]


def test_an_entry_is_read_only_inside_its_table(device, generator):
    """Tables that are slices of one storage: what lies around them, NaN, stays out."""
    store = torch.full((WORDS + 2, 48), torch.nan, device=device)
    word, *others = tables(48, torch.float32, generator, device)
    store[1:-1] = word
    check("triton", ids(5, generator, device), (store[1:-1], *others))


def test_gradients_of_the_torch_path(generator):
    some_ids = ids(4, generator, "cpu")
    leaves = [table.requires_grad_() for table in tables(6, torch.float64, generator, "cpu")]
    seed = torch.tensor([3])

    def run(*some_tables):
        return embedding(*some_ids, *some_tables, dropout=0.3, seed=seed, eps=1e-5)

    assert torch.autograd.gradcheck(run, leaves)


def check_backward(some_ids, some_tables, dout, *, dropout=0.0, seed=None, eps=1e-5, padding_idx=None):
    """Hold the five gradients of the Triton path to the error rule; gives them by name."""
    input_ids, position_ids, token_type_ids = some_ids
    keep = reference.hidden_keep_mask(seed, *dout.shape, dropout) if dropout else None

    def unpadded(word):
        """`word`, its padding entry without gradient."""
        padding = torch.arange(len(word), device=word.device) == (-1 if padding_idx is None else padding_idx)
        return torch.where(padding[:, None], word.detach(), word)

    def plain(word, position, token_type, weight, bias):
        types = token_type[0] if token_type_ids is None else token_type[token_type_ids]
        total = unpadded(word)[input_ids] + types + position[position_ids]
        out = F.layer_norm(total, weight.shape, weight, bias, eps)
        return out if keep is None else out * keep * drop_scale(dropout)

    def exact(word, *others):
        return reference.embedding(*some_ids, unpadded(word), *others, keep=keep, dropout=dropout, eps=eps)

    def run(*leaves):
        return embedding(*some_ids, *leaves, dropout=dropout, seed=seed, eps=eps, padding_idx=padding_idx)

    names = ("word", "position", "token_type", "weight", "bias")
    return check_gradients("triton", run, plain, exact, dict(zip(names, some_tables, strict=True)), dout)


def upstream(tokens, hidden, dtype, generator, device):
    return torch.randn(tokens, hidden, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 48, 384, 769, 8192])
def test_gradients_of_widths_case_14(hidden, dtype, device, generator, nan_empty):
    some_tables = tables(hidden, dtype, generator, device)
    check_backward(ids(5, generator, device), some_tables, upstream(5, hidden, dtype, generator, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("has_types", [True, False])
@pytest.mark.parametrize("tokens", [1, 19])
def test_gradients_of_each_branch(tokens, has_types, dropout, dtype, device, generator, nan_empty, monkeypatch):
    """Four rows of 48 halves a step: two programs share 19 tokens as 4 + 4 + 3 and 4 + 4."""
    limit_programs(monkeypatch, row_wise_choices, "embedding_backward", 2)
    input_ids, position_ids, token_type_ids = ids(tokens, generator, device)
    check_backward(
        (input_ids, position_ids, token_type_ids if has_types else None),
        tables(48, dtype, generator, device),
        upstream(tokens, 48, dtype, generator, device),
        dropout=dropout,
        seed=torch.tensor([6], device=device) if dropout else None,
        padding_idx=0,
    )


@pytest.mark.parametrize("counts", [[64], [65], [63, 65], [1, 64, 128], [129, 3, 130], [40, 70, 70, 500], [1] * 31])
def test_gradient_of_a_table_adds_long_and_short_runs(counts, device, generator, nan_empty):
    """Runs of equal ids that fill one chunk of 64, just miss it, or take several and several partial sums a window."""
    run_ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    run_ids = run_ids[torch.randperm(len(run_ids), generator=generator)].to(device)
    dtotal = upstream(len(run_ids), 40, torch.float32, generator, device)
    table = torch.empty(len(counts) + 2, 40, device=device)
    ours = kernel.table_gradient(dtotal, run_ids, table)
    exact = torch.zeros(table.shape, dtype=torch.float64, device=device).index_add(0, run_ids, dtotal.double())
    plain = torch.zeros_like(table).index_add(0, run_ids, dtotal)
    assert_close(ours, plain, exact, what="table")
    assert not ours[len(counts) :].any()


@pytest.mark.parametrize("long", [False, True])
def test_gradient_of_a_table_leaves_out_padding_and_ids_outside(long, device, generator, nan_empty):
    run_ids = torch.tensor([-1, 0, 2, 3, 7, 2**40, -(2**63), 3]).repeat(70 if long else 1).to(device)
    dtotal = upstream(len(run_ids), 16, torch.float32, generator, device)
    ours = kernel.table_gradient(dtotal, run_ids, torch.empty(5, 16, device=device), padding_idx=2)
    inside = (run_ids == 0) | (run_ids == 3)
    exact = torch.zeros(5, 16, dtype=torch.float64, device=device)
    exact = exact.index_add(0, run_ids[inside], dtotal[inside].double())
    plain = torch.zeros(5, 16, device=device).index_add(0, run_ids[inside], dtotal[inside])
    assert_close(ours, plain, exact, what="table")
    assert not ours[[1, 2, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_float32_parameters_beside_half_tables(dtype, device, generator):
    some_tables = tables(96, dtype, generator, device, parameters=torch.float32)
    check_backward(ids(4, generator, device), some_tables, upstream(4, 96, dtype, generator, device))


@pytest.mark.parametrize("path", PATHS)
def test_padding_gets_no_gradient(path, device, generator):
    some_tables = tables(48, torch.float32, generator, device)
    input_ids, position_ids, token_type_ids = ids(9, generator, device)
    input_ids[4:7] = 3

    def run(*leaves):
        return embedding(input_ids, position_ids, token_type_ids, *leaves, eps=1e-5, padding_idx=3)

    with backend.use_backend(path):
        dword, dposition, *_ = gradients(run, some_tables, upstream(9, 48, torch.float32, generator, device))
    assert not dword[3].any()
    assert dword[input_ids[0]].any() and dposition[position_ids[4]].any()


def test_gradients_of_layouts_case_29(device, generator):
    word, position, *others = tables(48, torch.float16, generator, device)
    word, position = torch.cat([word, word], 1)[:, 48:], position.T.contiguous().T
    some_ids = [torch.stack([row, row], 1)[:, 0] for row in ids(5, generator, device)]
    check_backward(some_ids, (word, position, *others), upstream(48, 5, torch.float16, generator, device).T)
    check_backward(some_ids, (word, position, *others), upstream(1, 48, torch.float16, generator, device).expand(5, -1))


@pytest.mark.parametrize("has_types", [True, False])
def test_gradients_of_no_tokens_case_15(has_types, device, generator):
    none = torch.empty(0, dtype=torch.int64, device=device)
    some_tables = tables(48, torch.float32, generator, device)
    with backend.use_backend("triton"):
        got = gradients(
            lambda *leaves: embedding(none, none, none if has_types else None, *leaves, eps=1e-5),
            some_tables,
            torch.empty(0, 48, device=device),
        )
    for gradient, table in zip(got, some_tables, strict=True):
        assert torch.equal(gradient, torch.zeros_like(table))


@pytest.mark.long
def test_ten_backward_runs_are_bit_equal_case_16(device, generator, monkeypatch):
    limit_programs(monkeypatch, row_wise_choices, "embedding_backward", 3)
    some_tables = tables(48, torch.float16, generator, device)
    some_ids = ids(150, generator, device)
    dout = upstream(150, 48, torch.float16, generator, device)

    def run(*leaves):
        return embedding(*some_ids, *leaves, eps=1e-5)

    with backend.use_backend("triton"):
        first, *others = (gradients(run, some_tables, dout) for _ in range(10))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_dropped_elements_get_no_gradient_case_17(device, generator):
    """The bias's gradient adds exactly the upstream gradients of what was kept."""
    some_tables = tables(104, torch.float32, generator, device)
    seed = torch.tensor([77], device=device)
    dout = upstream(1, 104, torch.float32, generator, device)
    got = check_backward(ids(1, generator, device), some_tables, dout, dropout=0.3, seed=seed)
    assert torch.equal(got["bias"] != 0, reference.hidden_keep_mask(seed, 1, 104, 0.3)[0])


def test_autocast_case_27(device, generator):
    """Tables are parameters, not states: autocast leaves them, and the result, in float32."""
    some_tables = tables(48, torch.float32, generator, device)
    some_ids = ids(5, generator, device)
    dout = upstream(5, 48, torch.float32, generator, device)

    def run(*leaves):
        return embedding(*some_ids, *leaves, eps=1e-5)

    with backend.use_backend("triton"):
        plain = gradients(run, some_tables, dout)
        with torch.autocast(device.type, torch.bfloat16):
            ours = gradients(run, some_tables, dout)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_gradients_of_the_reference(generator):
    some_ids = ids(4, generator, "cpu")
    leaves = [table.requires_grad_() for table in tables(6, torch.float64, generator, "cpu")]
    keep = reference.hidden_keep_mask(torch.tensor([3]), 4, 6, 0.3)

    def run(*some_tables):
        return reference.embedding(*some_ids, *some_tables, keep=keep, dropout=0.3, eps=1e-5)

    assert torch.autograd.gradcheck(run, leaves)


def test_a_step_compiles_to_one_graph(device, generator):
    some_tables = tables(24, torch.float32, generator, device)
    some_ids, seed = ids(3, generator, device), torch.tensor([8], device=device)
    dout = upstream(3, 24, torch.float32, generator, device)

    def run(*leaves):
        return embedding(*some_ids, *leaves, dropout=0.1, seed=seed, eps=1e-5, padding_idx=0)

    torch._dynamo.reset()
    with backend.use_backend("triton"):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        for ours, wanted in zip(gradients(compiled, some_tables, dout), gradients(run, some_tables, dout), strict=True):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("input_ids", {"input_ids": torch.zeros(3, dtype=torch.int32)}),
        ("input_ids", {"input_ids": torch.zeros(1, 3, dtype=torch.int64)}),
        ("position_ids", {"position_ids": torch.zeros(2, dtype=torch.int64)}),
        ("token_type_ids", {"token_type_ids": torch.zeros(3)}),
        ("word", {"word": torch.zeros(4)}),
        ("word", {"word": torch.zeros(0, 4)}),
        ("word", {"word": torch.zeros(5, 4, dtype=torch.int64)}),
        ("position", {"position": torch.zeros(5, 3)}),
        ("token_type", {"token_type": torch.zeros(0, 4)}),
        ("token_type", {"token_type": torch.zeros(2, 4, dtype=torch.float16)}),
        ("weight", {"weight": torch.zeros(3)}),
        ("bias", {"bias": torch.zeros(4, device="meta")}),
        ("eps", {"eps": -1.0}),
        ("dropout", {"dropout": -0.1}),
        ("seed", {"dropout": 0.1}),
        ("padding_idx", {"padding_idx": 5}),
        ("padding_idx", {"padding_idx": -1}),
    ],
)
def test_bad_input(argument, changes):
    good = {
        "input_ids": torch.zeros(3, dtype=torch.int64),
        "position_ids": torch.zeros(3, dtype=torch.int64),
        "token_type_ids": None,
        "word": torch.zeros(5, 4),
        "position": torch.zeros(5, 4),
        "token_type": torch.zeros(2, 4),
        "weight": torch.zeros(4),
        "bias": torch.zeros(4),
        "eps": 1e-5,
    }
    with pytest.raises(ArgumentError) as raised:
        embedding(**good | changes)
    assert raised.value.argument == argument


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_to_one_graph(compiler, path, device, generator):
    some_tables = tables(24, torch.float32, generator, device)
    seed = torch.tensor([8], device=device)

    def run(*some_ids):
        return embedding(*some_ids, *some_tables, dropout=0.1, seed=seed, eps=1e-5)

    torch._dynamo.reset()
    some_ids = ids(3, generator, device)
    with backend.use_backend(path), torch.no_grad():
        compiled = torch.compile(run, backend=compiler, fullgraph=True)
        torch.testing.assert_close(compiled(*some_ids), run(*some_ids))


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck(needs_gradient, device, generator):
    input_ids, position_ids, token_type_ids = ids(3, generator, device)
    some_tables = [table.requires_grad_(needs_gradient) for table in tables(24, torch.float32, generator, device)]
    seed = torch.tensor([8], device=device)
    all_ids, without_types = (input_ids, position_ids, token_type_ids), (input_ids, position_ids, None)
    torch.library.opcheck(embedding_forward, (*all_ids, *some_tables, 0.1, seed, 1e-5, 0))
    torch.library.opcheck(embedding_forward, (*without_types, *some_tables, 0.0, None, 1e-5, None))


def test_opcheck_of_the_backward(device, generator):
    input_ids, position_ids, token_type_ids = ids(3, generator, device)
    some_tables = tables(24, torch.float32, generator, device)[:4]
    dout, seed = upstream(3, 24, torch.float32, generator, device), torch.tensor([8], device=device)
    all_ids, without_types = (input_ids, position_ids, token_type_ids), (input_ids, position_ids, None)
    torch.library.opcheck(embedding_backward, (dout, *all_ids, *some_tables, 0.1, seed, 1e-5, 0))
    torch.library.opcheck(embedding_backward, (dout, *without_types, *some_tables, 0.0, None, 1e-5, None))


def test_the_launcher_without_checks_takes_no_tokens(device, generator):
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert kernel.embedding_forward(none, none, None, *tables(8, torch.float32, generator, device), eps=1e-5).shape == (
        0,
        8,
    )
