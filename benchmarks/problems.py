"""What `tune.py` searches: each launch choice that BERT models reach, its candidates, a call and the right answer.

A problem is one entry of `kernels/tuned.json`. Its key is not spelled here: it is what `choices.tuned` is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import backend, reference
from fastbert.kernels import attention_choices, bias_gelu_choices, choices, linear_gelu_choices, row_wise_choices
from fastbert.kernels.attention import attention_forward
from fastbert.kernels.attention_backward import attention_backward
from fastbert.kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from fastbert.kernels.dropout import drop_scale
from fastbert.kernels.embedding import embedding_backward, embedding_forward
from fastbert.kernels.layer_norm import layer_norm_backward, layer_norm_forward
from fastbert.kernels.linear_gelu import linear_gelu_forward
from fastbert.kernels.pooling import pool_backward, pool_forward
from fastbert.kernels.target import Target
from fastbert.ops.linear_gelu import linear_gelu
from fastbert.ops.tile_table import tile_table
from fastbert.packing import Packing

DTYPES = (torch.float16, torch.bfloat16)  # what models run in on a GPU
HEAD_DIMS = (64, 32)  # of BERT-base and BERT-large, and of MiniLM
HIDDEN = (768, 1024, 384)
INTERMEDIATE = (3072, 4096, 1536)
DROPOUT = 0.1
EPS = 1e-12


@dataclass(frozen=True)
class Sizes:
    """How large the calls are.

    Attributes:
        lengths: of the sequences, by regime of attention.
        rows, words: tokens of the row-wise ops; entries of the word table.
        product_rows: tokens of linear_gelu, for each of `linear_gelu_choices.ROW_BOUNDS`.
        heads: as large as BERT-base's.
    """

    lengths: Mapping[str, tuple[int, ...]]
    rows: int
    product_rows: tuple[int, ...]
    words: int
    heads: int


def _evenly(batch: int, shortest: int, longest: int) -> tuple[int, ...]:
    return tuple(shortest + i * (longest - shortest) // (batch - 1) for i in range(batch))


# As serving and training see them. No ragged total is a multiple of 16, on which Triton would specialise.
FULL = Sizes(
    {
        "default": (*_evenly(15, 64, 512), 33),
        "short": (*_evenly(127, 8, 64), 35),
        "aligned": (512,) * 16,
        "extras": (*_evenly(15, 64, 512), 33),
        "one_pass": (*_evenly(63, 16, 128), 35),
    },
    rows=8191,
    product_rows=(511, 2047, 8191),
    words=30522,
    heads=12,
)
# The same specialisations, for compiling and for Triton's interpreter.
SMALL = Sizes(
    {"default": (130, 5), "short": (64, 3), "aligned": (128, 128), "extras": (130, 5), "one_pass": (128, 5)},
    rows=73,  # more than embedding.CHUNK, for the second launch of a table's gradient
    product_rows=(73, 521, 2057),
    words=50,
    heads=2,
)

# op -> field -> values. What a space does not name stays as it is in the choice now in force.
SPACES: dict[str, dict[str, tuple[Any, ...]]] = {
    "attention_forward": {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
        "SPLIT_TAIL": (True, False),
    },
    "attention_backward_query": {
        "BLOCK_M": (32, 64, 128),
        "BLOCK_N": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
    },
    "attention_backward_key": {
        "BLOCK_M": (32, 64),
        "BLOCK_N": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
    },
    "attention_backward_bias": {
        "BLOCK_M": (32, 64, 128),
        "BLOCK_N": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
    },
    "layer_norm_forward": {"ROWS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8)},
    "layer_norm_backward": {"ROWS": (1, 2, 4), "num_warps": (1, 2, 4), "PROGRAMS": (256, 512, 1024, 2048)},
    "bias_gelu_forward": {"ROWS": (1, 2, 4, 8), "BLOCK": (256, 512, 1024), "num_warps": (1, 2, 4, 8)},
    "bias_gelu_backward": {
        "ROWS": (4, 8),
        "BLOCK": (256, 512, 1024),
        "num_warps": (1, 2, 4),
        "PROGRAMS": (256, 512, 1024),
    },
    "linear_gelu": {"form": get_args(choices.Form)},
    "linear_gelu_forward": {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "PROGRAMS": (1, 2),
    },
    "embedding_forward": {"ROWS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8)},
    "embedding_backward": {"ROWS": (1, 2, 4), "num_warps": (1, 2, 4), "PROGRAMS": (256, 512, 1024, 2048)},
    "embedding_backward_table": {"ROWS": (2, 4, 8), "BLOCK": (128, 256, 512), "num_warps": (1, 2, 4)},
    "pool_forward": {"ROWS": (1, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8, 16)},
    "pool_backward": {"ROWS": (16, 32, 64), "num_warps": (2, 4, 8)},
}


@dataclass(frozen=True)
class Work:
    """A call on real data.

    Attributes:
        run: makes its launches with the choices in force and gives its results.
        expected: what plain torch gives in the same dtype, and what float64 does.
    """

    run: Callable[[], list[Tensor]]
    expected: Callable[[], tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Problem:
    """One entry of `tuned.json` to be found.

    Attributes:
        op, shape: its key there, under the target's name.
        current: the choice in force.
        candidates: others.
        matrix: whether its arithmetic belongs on the matrix units.
        compiled: whether candidates differ in machine code; else there is nothing to inspect before they are timed.
        prepare: device -> the call, on random data there.
    """

    op: str
    shape: str
    current: Any
    candidates: tuple[Any, ...]
    matrix: bool
    prepare: Callable[[torch.device], Work]
    compiled: bool = True


def candidates(op: str, current: Any, target: Target) -> tuple[Any, ...]:
    """Every choice of the op's space that could be sensible, without `current`."""
    space = SPACES[op]
    if getattr(current, "ONE_PASS", False):
        space = space | {"BLOCK_N": (current.BLOCK_N,)}  # it must hold every key of a sequence
    if target.backend == "hip" and "num_stages" in space:
        space = space | {"num_stages": (1, 2)}  # AMD's pipeline has no use for a third
    made = [replace(current, **dict(zip(space, values, strict=True))) for values in itertools.product(*space.values())]
    return tuple(choice for choice in made if choice != current and _sensible(choice, target))


def _sensible(choice: Any, target: Target) -> bool:
    """Not so many lanes that most idle, nor so few that they must spill."""
    match choice:
        case choices.AttentionKeyTile():
            return 16 * choice.num_warps <= choice.BLOCK_N  # a matrix product gives each warp 16 rows or more
        case choices.AttentionTile() | choices.AttentionBiasTile():
            return 16 * choice.num_warps <= choice.BLOCK_M
        case choices.Block() | choices.StridedBlock():
            return 8 <= choice.ROWS * choice.BLOCK // (choice.num_warps * target.warp_size) <= 64
        case choices.LinearGeluTile():
            return 32 <= choice.BLOCK_M * choice.BLOCK_N // (choice.num_warps * target.warp_size) <= 128
        case choices.LinearGeluForm():
            return True
    return choice.ROWS * choice.num_warps <= 8


@contextmanager
def in_force(target: Target, problem: Problem, choice: Any) -> Iterator[None]:
    """Inside a `with` block `choice` is what `choices.tuned` finds for the problem."""
    with patch.dict(choices.TUNED, {(target.arch, problem.op, problem.shape): choice}):
        yield


def problems(target: Target, sizes: Sizes = FULL) -> list[Problem]:
    """All of them, the most important first."""
    made: dict[tuple[str, str], Problem] = {}

    def add(
        choose: Callable[[], Any],
        prepare: Callable[[torch.device], Work],
        *,
        matrix: bool = False,
        compiled: bool = True,
        without: Any = None,
    ) -> None:
        with patch.object(choices, "tuned", wraps=choices.tuned) as tuned:
            current = choose()
        op, _, _, shape = tuned.call_args.args
        others = tuple(choice for choice in candidates(op, current, target) if choice != without)
        found = Problem(op, shape, current, others, matrix, prepare, compiled)
        made.setdefault((op, shape), found)  # where a family has no choice for a regime, that is asked for "default"

    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            if attention_choices.attention_unserved(head_dim, dtype, target, gradient=False) is None:
                for regime in ("default", "aligned", "short", "extras"):
                    call = AttentionCall(
                        sizes.lengths[regime], sizes.heads, head_dim, dtype, dropout=regime == "extras"
                    )
                    add(partial(call.forward_choice, target), partial(call.forward, target=target), matrix=True)
    for hidden, width in zip(HIDDEN, INTERMEDIATE, strict=True):
        for dtype in DTYPES:
            rows = partial(_layer_norm, sizes.rows, hidden, dtype)
            add(partial(row_wise_choices.layer_norm_forward, hidden, dtype, target), rows)
            gelu = partial(_bias_gelu, sizes.rows, width, dtype)
            add(partial(bias_gelu_choices.bias_gelu_forward, width, dtype, target), gelu)
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            if attention_choices.attention_unserved(head_dim, dtype, target, gradient=True) is None:
                # With dropout first: where a key covers calls with it and without, its choice must have room for it.
                for regime in ("extras", "default", "one_pass"):
                    dropout = regime == "extras"
                    call = AttentionCall(sizes.lengths[regime], sizes.heads, head_dim, dtype, dropout=dropout)
                    backward = partial(call.backward, target=target)
                    add(partial(call.key_choice, target), backward, matrix=True)
                    add(partial(call.query_choice, target), backward, matrix=True)
    for hidden, width in zip(HIDDEN, INTERMEDIATE, strict=True):
        for dtype in DTYPES:
            rows = partial(_layer_norm_gradient, sizes.rows, hidden, dtype)
            add(partial(row_wise_choices.layer_norm_backward, hidden, dtype, target), rows)
            gelu = partial(_bias_gelu_gradient, sizes.rows, width, dtype)
            add(partial(bias_gelu_choices.bias_gelu_backward, width, dtype, target), gelu)
            forward = partial(_embedding, sizes.rows, sizes.words, hidden, dtype)
            add(partial(row_wise_choices.embedding_forward, hidden, dtype, target), forward)
            backward = partial(_embedding_gradient, sizes.rows, sizes.words, hidden, dtype)
            add(partial(row_wise_choices.embedding_backward, hidden, dtype, target), backward)
            add(partial(row_wise_choices.embedding_backward_table, hidden, dtype, target), backward)
            for how, normalise in (("mean", False), ("mean", True), ("cls", True)):
                pooled = partial(_pool, sizes.lengths["default"], hidden, dtype, how, normalise)
                choose = partial(row_wise_choices.pool_forward, hidden, dtype, target, how=how, normalise=normalise)
                add(choose, pooled)
            rows = partial(_pool_gradient, sizes.lengths["default"], hidden, dtype)
            add(partial(row_wise_choices.pool_backward, hidden, dtype, target), rows)
    for hidden, width in zip(HIDDEN, INTERMEDIATE, strict=True):
        for dtype in DTYPES:
            for bound, rows in zip(linear_gelu_choices.ROW_BOUNDS, sizes.product_rows, strict=True):
                product = (rows, width, hidden, dtype)
                tiles = partial(linear_gelu_choices.linear_gelu_forward, bound, *product[1:], target)
                add(tiles, partial(_linear_gelu_epilogue, *product), matrix=True)
                # After its tiles, with which the epilogue competes.
                for approximate, gradient in (("none", False), ("tanh", False), ("none", True)):
                    served = approximate == "tanh" and target.backend == "cuda"
                    form = partial(
                        linear_gelu_choices.linear_gelu, bound, *product[1:],
                        approximate=approximate, gradient=gradient, target=target,
                    )  # fmt: skip
                    call = partial(_linear_gelu, *product, approximate, gradient)
                    add(form, call, compiled=False, without=None if served else choices.LinearGeluForm("cublaslt"))
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            if attention_choices.attention_unserved(head_dim, dtype, target, gradient=True) is None:
                call = AttentionCall(sizes.lengths["default"], sizes.heads, head_dim, dtype, bias=True)
                backward = partial(call.backward, target=target)
                add(partial(attention_choices.attention_backward_bias, head_dim, dtype, target), backward, matrix=True)
    return list(made.values())


def _randn(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def _seed(device: torch.device) -> Tensor:
    return torch.tensor([2018], device=device)


def _gradients(run: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of `run(*leaves)`, all in `dtype`."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    return list(torch.autograd.grad(run(*leaves), leaves, dout.to(dtype)))


@dataclass(frozen=True)
class AttentionCall:
    """Attention of sequences of these lengths, with a bias or dropout or neither."""

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype
    bias: bool = False
    dropout: bool = False

    @property
    def _extras(self) -> bool:
        return self.bias or self.dropout

    def forward_choice(self, target: Target) -> choices.AttentionTile:
        """The choice in force for its forward."""
        return attention_choices.attention_forward(
            self.head_dim,
            self.dtype,
            max(self.lengths),
            rows=sum(self.lengths),
            batch=len(self.lengths),
            extras=self._extras,
            bias=self.bias,
            target=target,
        )

    def query_choice(self, target: Target) -> choices.AttentionTile:
        """The choice in force for its gradient of queries."""
        return attention_choices.attention_backward_query(self.head_dim, self.dtype, extras=self._extras, target=target)

    def key_choice(self, target: Target) -> choices.AttentionKeyTile:
        """The choice in force for its gradients of keys and values."""
        return attention_choices.attention_backward_key(
            self.head_dim, self.dtype, max(self.lengths), dbias=self.bias, extras=self._extras, target=target
        )

    def _options(self, device: torch.device) -> dict[str, Any]:
        return {"dropout": DROPOUT, "seed": _seed(device)} if self.dropout else {}

    def _by_reference(self, device: torch.device) -> Callable[..., Tensor]:
        """(qkv, bias) -> out, with the mask of dropout that the kernel draws."""
        longest = max(self.lengths)
        packing = Packing.from_lengths(self.lengths, device=device)
        keep = None
        if self.dropout:
            keep = reference.attention_keep_mask(_seed(device), len(self.lengths), self.heads, longest, DROPOUT)

        def run(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
            dropout = DROPOUT if self.dropout else 0.0
            return reference.attention(qkv, packing, bias=bias, keep=keep, dropout=dropout)[0]

        return run

    def forward(self, device: torch.device, target: Target) -> Work:
        """Its forward."""
        packing = Packing.from_lengths(self.lengths, device=device)
        qkv = _randn(device, self.dtype, packing.tokens, 3, self.heads, self.head_dim)

        def run() -> list[Tensor]:
            tiles = tile_table(packing, self.forward_choice(target).BLOCK_M)
            out, _ = attention_forward(
                qkv,
                packing.cu_seqlens,
                tiles,
                packing.max_seqlen,
                scale=self.head_dim**-0.5,
                **self._options(device),
            )
            return [out]

        def expected() -> tuple[list[Tensor], list[Tensor]]:
            by_reference = self._by_reference(device)
            return [by_reference(qkv)], [by_reference(qkv.double())]

        return Work(run, expected)

    def backward(self, device: torch.device, target: Target) -> Work:
        """Its backward, whole: a candidate for one of its kernels is judged by what the call takes."""
        packing = Packing.from_lengths(self.lengths, device=device)
        longest = packing.max_seqlen
        qkv = _randn(device, self.dtype, packing.tokens, 3, self.heads, self.head_dim)
        dout = _randn(device, self.dtype, packing.tokens, self.heads, self.head_dim)
        bias = _randn(device, self.dtype, 1, self.heads, longest, longest) if self.bias else None
        out = self._by_reference(device)(qkv.float(), bias).to(self.dtype)
        _, lse = reference.attention(qkv.float(), packing, bias=bias)

        def run() -> list[Tensor]:
            dqkv, dbias, _ = attention_backward(
                dout,
                qkv,
                out,
                lse,
                packing.cu_seqlens,
                tile_table(packing, self.query_choice(target).BLOCK_M),
                tile_table(packing, self.key_choice(target).BLOCK_N),
                longest,
                tokens=packing.tokens,
                scale=self.head_dim**-0.5,
                bias=None if bias is None else bias.expand(packing.batch, -1, -1, -1),
                dbias_shape=None if bias is None else bias.shape,
                **self._options(device),
            )
            return [dqkv] if dbias is None else [dqkv, dbias.to(self.dtype)]

        def expected() -> tuple[list[Tensor], list[Tensor]]:
            leaves = [qkv] if bias is None else [qkv, bias]
            by_reference = self._by_reference(device)
            return (
                _gradients(by_reference, leaves, dout, self.dtype),
                _gradients(by_reference, leaves, dout, torch.float64),
            )

        return Work(run, expected)


def _layer_norm(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Work:
    """Bias, residual and LayerNorm, as at the end of each half of a layer: without dropout, then with it."""
    x, residual = _randn(device, dtype, 2, rows, hidden)
    weight, bias, x_bias = _randn(device, dtype, 3, hidden)
    options = {"residual": residual, "x_bias": x_bias, "eps": EPS}
    seed = _seed(device)

    def run() -> list[Tensor]:
        dry, *_ = layer_norm_forward(x, weight, bias, **options)
        dropped, *_ = layer_norm_forward(x, weight, bias, **options, dropout=DROPOUT, seed=seed)
        return [dry, dropped]

    def exactly(dtype: torch.dtype) -> list[Tensor]:
        keep = reference.hidden_keep_mask(seed, rows, hidden, DROPOUT)
        total = x.to(dtype) + x_bias.to(dtype)
        totals = (total, total * keep * drop_scale(DROPOUT))
        parameters = ((hidden,), weight.to(dtype), bias.to(dtype), EPS)
        return [F.layer_norm(total + residual.to(dtype), *parameters) for total in totals]

    return Work(run, lambda: (exactly(dtype), exactly(torch.float64)))


def _layer_norm_gradient(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Work:
    """The same with dropout, as in training."""
    x, residual, dout = _randn(device, dtype, 3, rows, hidden)
    weight, bias, x_bias = _randn(device, dtype, 3, hidden)
    seed = _seed(device)
    keep = reference.hidden_keep_mask(seed, rows, hidden, DROPOUT)

    def exactly(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        total = residual + (x + x_bias) * keep * drop_scale(DROPOUT)
        return F.layer_norm(total, (hidden,), weight, bias, EPS)

    total = residual.float() + (x.float() + x_bias.float()) * keep * drop_scale(DROPOUT)
    mean, rstd = total.mean(-1), (total.var(-1, correction=0) + EPS).rsqrt()

    def run() -> list[Tensor]:
        dx, dresidual, parameters = layer_norm_backward(
            dout, total.to(dtype), weight, mean, rstd, residual=True, x_bias=True, dropout=DROPOUT, seed=seed
        )
        return [dx, dresidual, *parameters.to(dtype)]

    leaves = [x, residual, weight, bias, x_bias]
    return Work(
        run,
        lambda: (_gradients(exactly, leaves, dout, dtype), _gradients(exactly, leaves, dout, torch.float64)),
    )


def _bias_gelu(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Work:
    x, bias = _randn(device, dtype, rows, width), _randn(device, dtype, width)
    return Work(
        lambda: [bias_gelu_forward(x, bias)],
        lambda: ([F.gelu(x + bias)], [F.gelu(x.double() + bias.double())]),
    )


def _bias_gelu_gradient(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Work:
    x, dout = _randn(device, dtype, 2, rows, width)
    bias = _randn(device, dtype, width)

    def run() -> list[Tensor]:
        dx, dbias = bias_gelu_backward(dout, x, bias)
        return [dx, dbias.to(dtype)]

    def exactly(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    return Work(
        run,
        lambda: (_gradients(exactly, [x, bias], dout, dtype), _gradients(exactly, [x, bias], dout, torch.float64)),
    )


def _linear_gelu_operands(
    rows: int, width: int, depth: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; the product's elements are about as large as the bias's."""
    weight = _randn(device, torch.float32, width, depth) * depth**-0.5
    return _randn(device, dtype, rows, depth), weight.to(dtype), _randn(device, dtype, width)


def _linear_gelu_epilogue(rows: int, width: int, depth: int, dtype: torch.dtype, device: torch.device) -> Work:
    """The kernel by itself."""
    operands = _linear_gelu_operands(rows, width, depth, dtype, device)

    def exactly(dtype: torch.dtype) -> list[Tensor]:
        return [F.gelu(F.linear(*(operand.to(dtype) for operand in operands)))]

    return Work(lambda: [linear_gelu_forward(*operands)[0]], lambda: (exactly(dtype), exactly(torch.float64)))


def _linear_gelu(
    rows: int,
    width: int,
    depth: int,
    dtype: torch.dtype,
    approximate: reference.Approximate,
    gradient: bool,
    device: torch.device,
) -> Work:
    """The op, whose form is on trial; with its backward where that is asked for."""
    operands = _linear_gelu_operands(rows, width, depth, dtype, device)
    dout = _randn(device, dtype, rows, width)

    def run() -> list[Tensor]:
        with backend.use_backend("triton"):
            if gradient:
                return _gradients(linear_gelu, operands, dout, dtype)
            return [linear_gelu(*operands, approximate=approximate)]

    def plainly(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate=approximate)

    def exactly(dtype: torch.dtype) -> list[Tensor]:
        if gradient:
            return _gradients(plainly, operands, dout, dtype)
        return [plainly(*(operand.to(dtype) for operand in operands))]

    return Work(run, lambda: (exactly(dtype), exactly(torch.float64)))


def _tables(
    rows: int, words: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """ids `[rows]` for words, positions and types; their tables, and LayerNorm's weight and bias."""
    generator = torch.Generator().manual_seed(rows)
    entries = (words, 512, 2)
    ids = [torch.randint(count, (rows,), generator=generator).to(device) for count in entries]
    tables = [_randn(device, dtype, count, hidden) for count in entries]
    return ids, [*tables, *_randn(device, dtype, 2, hidden)]


def _embedding(rows: int, words: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Work:
    """Without dropout, then with it."""
    ids, tables = _tables(rows, words, hidden, dtype, device)
    seed = _seed(device)

    def run() -> list[Tensor]:
        dropped = embedding_forward(*ids, *tables, dropout=DROPOUT, seed=seed, eps=EPS)
        return [embedding_forward(*ids, *tables, eps=EPS), dropped]

    def exactly(dtype: torch.dtype) -> list[Tensor]:
        keep = reference.hidden_keep_mask(seed, rows, hidden, DROPOUT)
        out = reference.embedding(*ids, *(table.to(dtype) for table in tables), eps=EPS)
        return [out, out * keep * drop_scale(DROPOUT)]

    return Work(run, lambda: (exactly(dtype), exactly(torch.float64)))


def _embedding_gradient(rows: int, words: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Work:
    """With dropout, as in training."""
    ids, tables = _tables(rows, words, hidden, dtype, device)
    dout, seed = _randn(device, dtype, rows, hidden), _seed(device)
    keep = reference.hidden_keep_mask(seed, rows, hidden, DROPOUT)

    def run() -> list[Tensor]:
        *dtables, parameters = embedding_backward(dout, *ids, *tables[:4], dropout=DROPOUT, seed=seed, eps=EPS)
        return [*dtables, *parameters.to(dtype)]

    def exactly(*tables: Tensor) -> Tensor:
        return reference.embedding(*ids, *tables, keep=keep, dropout=DROPOUT, eps=EPS)

    return Work(
        run,
        lambda: (_gradients(exactly, tables, dout, dtype), _gradients(exactly, tables, dout, torch.float64)),
    )


def _pool(
    lengths: tuple[int, ...],
    hidden: int,
    dtype: torch.dtype,
    how: reference.Pooling,
    normalise: bool,
    device: torch.device,
) -> Work:
    packing = Packing.from_lengths(lengths, device=device)
    x = _randn(device, dtype, packing.tokens, hidden)

    def exactly(dtype: torch.dtype) -> list[Tensor]:
        return [reference.pool(x.to(dtype), packing, how, normalise=normalise)]

    return Work(
        lambda: [pool_forward(x, packing.cu_seqlens, how=how, normalise=normalise)[0]],
        lambda: (exactly(torch.float32), exactly(torch.float64)),
    )


def _pool_gradient(lengths: tuple[int, ...], hidden: int, dtype: torch.dtype, device: torch.device) -> Work:
    """Of the normalised mean, as sentence embeddings are trained."""
    packing = Packing.from_lengths(lengths, device=device)
    x = _randn(device, dtype, packing.tokens, hidden)
    dout = _randn(device, torch.float32, packing.batch, hidden)
    options: dict[str, Any] = {"how": "mean", "normalise": True}

    def run() -> list[Tensor]:
        out, norm = pool_forward(x, packing.cu_seqlens, store_norm=True, **options)
        return [pool_backward(dout, out, norm, None, packing.cu_seqlens, rows=len(x), dtype=dtype, **options)]

    def exactly(x: Tensor) -> Tensor:
        return reference.pool(x, packing, **options)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        return _gradients(exactly, [x], dout, dtype)

    return Work(run, lambda: ([plain(torch.float32)[0].to(dtype)], plain(torch.float64)))
