"""linear_cross_entropy: against torch's loss of whole logits, in float64 and in its own dtype."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbert.errors import ArgumentError
from fastbert.ops import cross_entropy as module
from fastbert.ops.cross_entropy import IGNORED, cross_entropy, linear_cross_entropy
from fastbert.testing import assert_close

ROWS, HIDDEN, VOCAB = 37, 24, 101


def inputs(generator, dtype=torch.float32, rows=ROWS, vocab=VOCAB, bias=True):
    x = torch.randn(rows, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, HIDDEN, generator=generator).to(dtype).requires_grad_()
    b = torch.randn(vocab, generator=generator).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = IGNORED
    return x, weight, b, labels


def plain(x, weight, bias, labels):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), labels)


def run(loss, given, upstream, dtype=None):
    """The loss and the gradients of x, weight and bias."""
    *tensors, labels = given
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    value = loss(*leaves, labels)
    value.backward(torch.tensor(upstream, dtype=value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
def test_loss_and_gradients(chunk, bias, dtype, generator, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk * VOCAB)
    given = inputs(generator, dtype, bias=bias)
    ours, theirs = run(linear_cross_entropy, given, 1.7), run(plain, given, 1.7)
    exact = run(plain, given, 1.7, torch.float64)
    assert ours[0].dtype == torch.float32 and ours[0].shape == ()
    for what, *values in zip(("loss", "x", "weight", "bias"), ours, theirs, exact, strict=False):
        assert values[0].dtype == (torch.float32 if what == "loss" else dtype)
        assert_close(*values, what=what)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_chunks_are_summed_in_float32(dtype, monkeypatch):
    """Rows that all pull the same way: a sum in bfloat16 would stand still after 256 of them."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 16)
    given = torch.ones(1500, 8).to(dtype), torch.zeros(16, 8).to(dtype), torch.zeros(16).to(dtype)
    labels = torch.zeros(1500, dtype=torch.int64)
    ours, theirs, exact = (
        run(loss, (*given, labels), 64.0, made_in)
        for loss, made_in in ((linear_cross_entropy, None), (plain, None), (plain, torch.float64))
    )
    for what, *values in zip(("loss", "x", "weight", "bias"), ours, theirs, exact, strict=True):
        assert_close(*values, what=what)


def test_gradcheck(generator, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * 11)
    *tensors, labels = inputs(generator, torch.float64, rows=7, vocab=11)
    assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels), tensors)


def test_ignored_rows_are_not_read(generator):
    x, weight, bias, labels = inputs(generator)
    kept = labels != IGNORED
    poisoned = x.detach().masked_fill(~kept[:, None], torch.nan)
    ours = run(linear_cross_entropy, (poisoned, weight, bias, labels), -0.3)
    few = run(linear_cross_entropy, (x[kept], weight, bias, labels[kept]), -0.3)
    assert (ours[1][~kept] == 0).all()
    ours[1] = ours[1][kept]
    for got, expected in zip(ours, few, strict=True):
        torch.testing.assert_close(got, expected)


def test_another_label_can_be_the_ignored_one(generator):
    x, weight, bias, labels = inputs(generator)
    renamed = labels.masked_fill(labels == IGNORED, 7)
    got = linear_cross_entropy(x, weight, bias, renamed, ignore_index=7)
    torch.testing.assert_close(got, F.cross_entropy(F.linear(x, weight, bias), renamed, ignore_index=7))


@pytest.mark.parametrize("rows", [0, 4])
def test_no_label_that_counts_gives_zero(rows, generator):
    x, weight, bias, _ = inputs(generator, rows=rows)
    labels = torch.full((rows,), IGNORED)
    for value in run(linear_cross_entropy, (x, weight, bias, labels), 1.0):
        assert (value == 0).all()
    assert cross_entropy(F.linear(x, weight, bias), labels) == 0


def test_large_logits_stay_finite(generator):
    x, weight, bias, labels = inputs(generator)
    given = (x.detach() * 1e3, weight.detach() * 1e3, bias, labels)
    for ours, theirs in zip(run(linear_cross_entropy, given, 1.0), run(plain, given, 1.0), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_factor_of_a_grad_scaler_comes_before_rounding(generator):
    """A float16 gradient of the logits is p / count: below the smallest float16 here, were it rounded unscaled."""
    x, weight, bias, labels = inputs(generator, torch.float16, rows=300, vocab=3000)
    given = (x.detach() * 0.02, weight.detach() * 0.02, bias.detach() * 0.02, labels)
    ours, exact = (run(f, given, 2.0**16, d) for f, d in ((linear_cross_entropy, None), (plain, torch.float64)))
    lost = (ours[2] == 0) & (exact[2].abs() > 1e-3 * exact[2].abs().max())
    assert not lost.any()
    assert_close(ours[2], run(plain, given, 2.0**16)[2], exact[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, generator):
    given = inputs(generator)
    halves = [t.detach().to(dtype).float() for t in given[:3]]
    with torch.autocast("cpu", dtype=dtype):
        ours = run(linear_cross_entropy, given, 1.3)
    expected = run(linear_cross_entropy, (*(t.to(dtype) for t in halves), given[3]), 1.3)
    for got, want in zip(ours, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.float())


class LargestAllocation(TorchDispatchMode):
    """The elements of the largest tensor that any op made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def test_memory_is_bounded_by_the_chunk(generator, monkeypatch):
    """Nothing forward or backward is larger than a chunk of logits or than the weight."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 40 * VOCAB)
    x, weight, bias, labels = inputs(generator, rows=700)
    with LargestAllocation() as ours:
        linear_cross_entropy(x, weight, bias, labels).backward()
    with LargestAllocation() as whole:
        plain(x, weight, bias, labels).backward()
    assert whole.elements == 700 * VOCAB  # the counter counts
    assert ours.elements <= max(40 * VOCAB, weight.numel(), x.numel())


def test_little_lives_between_forward_and_backward(generator):
    x, weight, bias, labels = inputs(generator, rows=700)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(x, weight, bias, labels)
    given = {t.data_ptr() for t in (x, weight, bias, labels)}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in given) <= 700 * (4 + 1) + 8  # lse, kept; their number


def test_compiles_without_graph_breaks(generator):
    given = inputs(generator)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, given, 1.1), run(linear_cross_entropy, given, 1.1), strict=True):
        torch.testing.assert_close(got, want)


X, W, B, LABELS = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("x", (X[0], W, B, LABELS)),
        ("weight", (X, W[:, :3], B, LABELS)),
        ("weight", (X, W.double(), B, LABELS)),
        ("bias", (X, W, B[:4], LABELS)),
        ("labels", (X, W, B, LABELS[:2])),
        ("labels", (X, W, B, LABELS.int())),
        ("labels", (X, W, B, LABELS + 5)),
        ("labels", (X, W, B, LABELS - 1)),
    ],
)
def test_bad_input_names_the_argument(argument, given):
    with pytest.raises(ArgumentError) as error:
        linear_cross_entropy(*given)
    assert error.value.argument == argument
