"""embedding: both paths against float64, by the error rule."""

import pytest
import torch
import torch.nn.functional as F

from fastbert import backend, reference
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import embedding as kernel
from fastbert.kernels import launch
from fastbert.ops.embedding import embedding, embedding_forward
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
        plain = plain * keep * launch.drop_scale(dropout)
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


def test_triton_refuses_gradients(device, generator):
    word, *others = tables(8, torch.float32, generator, device)
    some_ids = ids(2, generator, device)
    with backend.use_backend("triton"):
        with pytest.raises(BackendError, match="require a gradient"):
            embedding(*some_ids, word.requires_grad_(), *others, eps=1e-5)
        with torch.no_grad():
            embedding(*some_ids, word, *others, eps=1e-5)


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


def test_opcheck(device, generator):
    input_ids, position_ids, token_type_ids = ids(3, generator, device)
    some_tables = tables(24, torch.float32, generator, device)
    seed = torch.tensor([8], device=device)
    torch.library.opcheck(embedding_forward, (input_ids, position_ids, token_type_ids, *some_tables, 0.1, seed, 1e-5))
    torch.library.opcheck(embedding_forward, (input_ids, position_ids, None, *some_tables, 0.0, None, 1e-5))


def test_the_launcher_without_checks_takes_no_tokens(device, generator):
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert kernel.embedding_forward(none, none, None, *tables(8, torch.float32, generator, device), eps=1e-5).shape == (
        0,
        8,
    )
