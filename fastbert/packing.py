"""Packing: the layout of a batch without padding.

A batch of sequences is stored as one `[tokens, ...]` tensor, sequence after sequence. `Packing` says where each
sequence begins (`cu_seqlens`) and where each token sits in the padded `[batch, seqlen]` grid (`indices`). It is made
once per batch and travels through the whole model as one object.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from fastbert.errors import ArgumentError
from fastbert.transfer import send

# Of a head's scores, how many at padding take as long as the calls of one more block, measured on a 2-core CPU.
BLOCK_PADDING = 8192
# And how many of them a block may have at most, so that a dozen heads' fit the caches.
BLOCK_AREA = 2**16
# The narrowest block: 16 floats are the widest vector there is, and torch's softmax on a CPU takes ten times as long
# for a row that fills none.
NARROWEST = 16


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the sequences of a packed batch begin and where their tokens come from.

    Attributes:
        cu_seqlens: contiguous int32 `[batch + 1]`, on the device of the data, from 0 to the number of tokens; sequence
            `i` begins at row `cu_seqlens[i]`.
        max_seqlen: length of the longest sequence, a host int; 0 for an empty batch.
        indices: contiguous int64 `[tokens]`, rising; row `t` is element `indices[t]` of the flattened padded grid, in
            the line of its sequence.
        padded_shape: `(batch, seqlen)` of the padded grid.

    Zero-length sequences and empty batches are legal. A packed tensor may have more rows than `cu_seqlens[-1]`
    (slack, for bucketed shapes): nothing reads or writes them.

    One that is made by hand copies its tensors and is looked at once, when it is made; on a GPU that waits for the
    device. The `from_...` below are right by the way they are made.

    Raises:
        ArgumentError: a field is not as described.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor
    padded_shape: tuple[int, int]
    _made: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False)
    _right: InitVar[bool] = False

    def __post_init__(self, _right: bool) -> None:
        if not _right:
            _check_kinds(self)
            if not torch.compiler.is_compiling() and not any(map(_has_no_values, (self.cu_seqlens, self.indices))):
                # what is looked at is ours: the caller may write the next batch where his lie
                object.__setattr__(self, "cu_seqlens", self.cu_seqlens.clone())
                object.__setattr__(self, "indices", self.indices.clone())
                _check_values(self)

    @classmethod
    def made_right(cls, cu_seqlens: Tensor, max_seqlen: int, indices: Tensor, padded_shape: tuple[int, int]) -> Packing:
        """One that is not looked at. For our own use: kernels read and write where a wrong one points."""
        return cls(cu_seqlens, max_seqlen, indices, padded_shape, _right=True)

    @classmethod
    def from_mask(cls, mask: Tensor) -> Packing:
        """Packing of the kept positions of a `[batch, seqlen]` mask of any pattern (right, left, holes).

        Args:
            mask: bool, integer or floating; a position is kept where it is not zero. One host sync on a GPU.

        Raises:
            ArgumentError: `mask` is not 2-D, or holds a value other than 0 and 1.
        """
        return cls.from_mask_and(mask)[0]

    @classmethod
    def from_mask_and(cls, mask: Tensor, *facts: Callable[[Tensor], Tensor]) -> tuple[Packing, list[bool]]:
        """`from_mask`, and bool scalars made of where it keeps, bool `[batch, seqlen]`, in the same one host sync."""
        check_dense("mask", mask)
        check_has_values("mask", mask)
        if mask.dim() != 2:
            raise ArgumentError("mask", f"shape {tuple(mask.shape)}", "a 2-D [batch, seqlen] tensor")
        kept = mask != 0
        packing, (binary, *found) = cls.from_kept(kept, (~kept | (mask == 1)).all(), *(fact(kept) for fact in facts))
        if not binary:
            raise ArgumentError(
                "mask",
                f"values other than 0 and 1 in a {mask.dtype} tensor",
                "1 for a token, 0 for padding",
                "An additive mask (0 and -inf) is 4-D; pass (mask == 0) to turn it around.",
            )
        return packing, found

    @classmethod
    def from_kept(cls, kept: Tensor, *flags: Tensor) -> tuple[Packing, list[bool]]:
        """Packing of a bool `[batch, seqlen]`, and the values of further bool scalars, in the same one host sync."""
        lengths = kept.sum(dim=1, dtype=torch.int32)
        facts = torch.cat([lengths, *(flag.view(1).to(torch.int32) for flag in flags)]).tolist()
        on_host = facts[: kept.shape[0]]
        indices = torch.nonzero_static(kept.flatten(), size=sum(on_host)).flatten()
        shape = kept.shape[0], kept.shape[1]
        packing = cls.made_right(_cumulate(lengths), max(on_host, default=0), indices, shape)
        return packing, [bool(fact) for fact in facts[kept.shape[0] :]]

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | Tensor, *, seqlen: int | None = None, device: torch.device | str | None = None
    ) -> Packing:
        """Packing of right-padded sequences with these lengths.

        Args:
            lengths: one non-negative int per sequence; a list, or an integer tensor `[batch]`.
            seqlen: width of the padded grid; the longest length by default.
            device: where the index tensors live; the device of `lengths` if it is a tensor, else the default one.

        Raises:
            ArgumentError: a length is negative or longer than `seqlen`, or `lengths` is not a row of ints.
        """
        if isinstance(lengths, Tensor):
            if lengths.dim() != 1 or lengths.is_floating_point():
                raise ArgumentError(
                    "lengths", f"{lengths.dtype} of shape {tuple(lengths.shape)}", "an integer tensor of shape [batch]"
                )
            check_has_values("lengths", lengths)
            device = lengths.device if device is None else device
            lengths = lengths.tolist()
        lengths = list(lengths)
        max_seqlen = max(lengths, default=0)
        width = max_seqlen if seqlen is None else seqlen
        for i, length in enumerate(lengths):
            if not 0 <= length <= width:
                raise ArgumentError(f"lengths[{i}]", length, f"an int between 0 and seqlen={width}")
        if device is None:
            device = torch.get_default_device()
        # numpy: a tenth of the time of torch's for the few numbers there are
        ends = np.cumsum([0, *lengths], dtype=np.int64)
        gaps = np.arange(len(lengths)) * width - ends[:-1]
        indices = torch.from_numpy(np.arange(ends[-1]) + np.repeat(gaps, lengths))
        cu_seqlens = torch.from_numpy(ends.astype(np.int32))
        cu_seqlens, indices = send([cu_seqlens, indices], torch.device(device))
        return cls.made_right(cu_seqlens, max_seqlen, indices, (len(lengths), width))

    @classmethod
    def from_ragged(cls, sequences: Sequence[Tensor]) -> tuple[Tensor, Packing]:
        """Concatenate `[length_i, ...]` tensors: `(packed [tokens, ...], packing)`.

        Raises:
            ArgumentError: there is no sequence (nothing says what shape a row has), or their trailing shapes differ.
        """
        if not sequences:
            raise ArgumentError("sequences", "an empty list", "at least one tensor", "Use from_lengths([]).")
        trailing = sequences[0].shape[1:]
        for i, sequence in enumerate(sequences):
            if sequence.dim() == 0 or sequence.shape[1:] != trailing:
                raise ArgumentError(
                    f"sequences[{i}]",
                    f"shape {tuple(sequence.shape)}",
                    f"[length, *{tuple(trailing)}], as sequences[0]",
                )
        lengths = [len(sequence) for sequence in sequences]
        return torch.cat(list(sequences)), cls.from_lengths(lengths, device=sequences[0].device)

    def sent(self, device: torch.device, **tensors: Tensor | None) -> tuple[Packing, dict[str, Tensor | None]]:
        """One on the CPU, and tensors there beside it, on `device`: all by one copy; see `transfer.send`."""
        given = {name: x for name, x in tensors.items() if x is not None}
        cu_seqlens, indices, *there = send([self.cu_seqlens, self.indices, *given.values()], device)
        moved = cu_seqlens is not self.cu_seqlens
        packing = Packing.made_right(cu_seqlens, self.max_seqlen, indices, self.padded_shape) if moved else self
        return packing, tensors | dict(zip(given, there, strict=True))

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.cu_seqlens.numel() - 1

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences together."""
        return self.indices.numel()

    @property
    def lengths(self) -> Tensor:
        """int32 `[batch]`: the length of each sequence."""
        return self.cu_seqlens.diff()

    @property
    def columns(self) -> Tensor:
        """int64 `[tokens]`: the column of each token in the padded grid, which is its BERT position id."""
        return self.indices % max(self.padded_shape[1], 1)

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """`(count, length)` of each run of neighbours of one non-zero length, in order; a host sync on a GPU."""
        lengths = [length for length in self.lengths.tolist() if length]
        return [(len(list(run)), length) for length, run in groupby(lengths)]

    @cached_property
    def blocks(self) -> list[Block]:
        """The sequences in blocks of neighbours, those without tokens left out; a host sync on a GPU."""
        blocks: list[Block] = []
        lengths = self.lengths.tolist()
        first = begin = 0
        while first < len(lengths):
            last, longest, needed = first, 0, 0
            while last < len(lengths) and lengths[last]:
                longest, needed = max(longest, lengths[last]), needed + lengths[last] ** 2
                area = (last + 1 - first) * longest**2
                if last > first and (area > BLOCK_AREA or area - needed > BLOCK_PADDING):
                    break
                last += 1
            if last > first:
                blocks.append(Block.of(first, begin, lengths[first:last], self.cu_seqlens.device))
                begin += sum(lengths[first:last])
            first = max(last, first + 1)
        return blocks

    @property
    def grid(self) -> Tensor:
        """int64 `[tokens]`: where each token sits in the flattened compact `[batch, max_seqlen]` grid."""

        def make() -> Tensor:
            row = torch.arange(self.tokens, device=self.cu_seqlens.device)
            sequence = torch.searchsorted(self.cu_seqlens, row.to(torch.int32), right=True) - 1
            return row + sequence * self.max_seqlen - self.cu_seqlens.index_select(0, sequence)

        return self.kept("grid", make)

    def kept(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` made of this packing the first time it was asked for by this name, in an earlier layer say."""
        found = self._made.get(name)
        if found is None:
            inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if inference else nullcontext():  # a gradient may be wanted later
                found = make()
            if type(found) is Tensor:  # none of a mode that looks on, which would outlive it
                self._made[name] = found
        return found

    def pack(self, padded: Tensor, rows: int | None = None) -> Tensor:
        """`[batch, seqlen, ...]` -> `[tokens, ...]`; differentiable. `rows` more than the tokens: slack, of 0, follows.

        Raises:
            ArgumentError: the leading shape is not `padded_shape`.
        """
        check_dense("padded", padded)
        if tuple(padded.shape[:2]) != self.padded_shape:
            raise ArgumentError("padded", f"shape {tuple(padded.shape)}", f"leading dimensions {self.padded_shape}")
        if padded.device != self.indices.device:
            raise ArgumentError("packing", f"on {self.indices.device}", f"on {padded.device}, the device of padded")
        packed = padded.flatten(0, 1).index_select(0, self.indices)
        if rows is None or rows == self.tokens:
            return packed
        return F.pad(packed, (0, 0) * (packed.dim() - 1) + (0, rows - self.tokens))

    def check_rows(self, name: str, packed: Tensor) -> None:
        """Raise ArgumentError unless `packed` has a row for each token, on this device."""
        check_dense(name, packed)
        if packed.dim() == 0 or packed.shape[0] < self.tokens:
            raise ArgumentError(name, f"shape {tuple(packed.shape)}", f"a row for each of {self.tokens} tokens")
        if packed.device != self.cu_seqlens.device:
            raise ArgumentError("packing", f"on {self.cu_seqlens.device}", f"on {packed.device}, the device of {name}")

    def check_ends(self) -> None:
        """Raise ArgumentError where somebody wrote into `cu_seqlens`, on a CPU: a kernel would follow it out of memory.

        On a GPU it costs a wait for the device, and nothing looks.
        """
        ends = self.cu_seqlens.numpy()
        lengths = ends[1:] - ends[:-1]
        inside = not len(lengths) or 0 <= lengths.min() <= lengths.max() <= self.max_seqlen
        if ends[0] == 0 and ends[-1] == self.tokens and inside:
            return
        expected = f"what it was: rising from 0 to {self.tokens}, by at most {self.max_seqlen}"
        raise ArgumentError(
            "cu_seqlens", "other numbers than when the packing was made", expected, "Make a new Packing."
        )

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """`[tokens, ...]` -> `[batch, seqlen, ...]`, padding set to `fill`; differentiable, the inverse of `pack`.

        Raises:
            ArgumentError: `packed` has fewer rows than there are tokens.
        """
        self.check_rows("packed", packed)
        batch, seqlen = self.padded_shape
        padded = packed.new_full((batch * seqlen, *packed.shape[1:]), fill)
        padded = padded.index_copy(0, self.indices, packed[: self.tokens])
        return padded.unflatten(0, (batch, seqlen))


@dataclass(frozen=True, eq=False)
class Block:
    """Neighbouring sequences in a padded grid of their own, as wide as the longest of them, `NARROWEST` at least.

    For what is made of matrix products, of which a few large ones are faster than many small ones.

    Attributes:
        first: index of the first sequence.
        batch, seqlen: the shape of the grid.
        shortest: length of the shortest sequence.
        begin: the first row in the packed tensor.
        rows: int64 `[batch, seqlen]`: the packed row of each place; at padding a row of the same sequence.
        places: int64 `[tokens]`: the place in the flattened grid of each row.
        is_token: bool `[batch, seqlen]`.
    """

    first: int
    batch: int
    seqlen: int
    shortest: int
    begin: int
    rows: Tensor
    places: Tensor
    is_token: Tensor
    _made: dict[tuple[str, int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, first: int, begin: int, lengths: list[int], device: torch.device) -> Block:
        """The block of sequences of these lengths, none of them 0, at this place of a packing."""
        size = torch.tensor(lengths, dtype=torch.int64, device="cpu")[:, None]
        seqlen = max(*lengths, NARROWEST)
        column = torch.arange(seqlen, device="cpu")
        rows = begin + size.cumsum(0) - size + torch.minimum(column, size - 1)
        is_token = column < size
        places = is_token.flatten().nonzero().flatten()
        return cls(
            first, len(lengths), seqlen, min(lengths), begin, rows.to(device), places.to(device), is_token.to(device)
        )

    def to_grid(self, parts: int, heads: int) -> Tensor:
        """int64 `[parts * batch * heads * seqlen]`: where each place's head is in packed `[rows, parts, heads]`, flat.

        Kept for the next layer.
        """
        key = ("to", parts, heads)
        if key not in self._made:
            part = torch.arange(parts, device=self.rows.device)[:, None, None, None]
            head = torch.arange(heads, device=self.rows.device)[:, None]
            self._made[key] = ((self.rows[:, None] * parts + part) * heads + head).flatten()
        return self._made[key]

    def from_grid(self, parts: int, heads: int) -> Tensor:
        """int64 `[tokens * parts * heads]`: where each token's head is in `[parts, batch, heads, seqlen]`, flat."""
        key = ("from", parts, heads)
        if key not in self._made:
            part = torch.arange(parts, device=self.rows.device)[:, None]
            head = torch.arange(heads, device=self.rows.device)
            sequence, column = self.places[:, None, None] // self.seqlen, self.places[:, None, None] % self.seqlen
            index = ((part * self.batch + sequence) * heads + head) * self.seqlen + column
            self._made[key] = index.flatten()
        return self._made[key]

    def lines(self, heads: int) -> Tensor:
        """int64 `[3, batch * heads * seqlen]`: the row, the head and the sequence of each line of the scores."""
        key = ("lines", 1, heads)
        if key not in self._made:
            sequence, head, row = torch.meshgrid(
                torch.arange(self.first, self.first + self.batch, device=self.rows.device),
                torch.arange(heads, device=self.rows.device),
                torch.arange(self.seqlen, device=self.rows.device),
                indexing="ij",
            )
            self._made[key] = torch.stack((row, head, sequence)).flatten(1)
        return self._made[key]


def check_dense(name: str, x: Tensor) -> None:
    """Raise ArgumentError for what is no tensor, and for one that is sparse, nested, opaque or quantized."""
    if not isinstance(x, Tensor):
        raise ArgumentError(name, f"a {type(x).__name__}", "a tensor")
    if x.layout is not torch.strided or x.is_nested or x.is_quantized:
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else x.layout
        raise ArgumentError(
            name, f"a tensor of {x.dtype}, {kind}", "a dense tensor", "Make it one by to_dense() or dequantize()."
        )


def check_has_values(name: str, x: Tensor) -> None:
    """Raise ArgumentError for a tensor on the meta device: how much there is to do depends on its values."""
    if x.is_meta:
        raise ArgumentError(name, "on the meta device", "a tensor with values")


def _has_no_values(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def _check_kinds(packing: Packing) -> None:
    """Raise ArgumentError for what can be told of the fields without reading a tensor."""
    cu_seqlens, indices, shape = packing.cu_seqlens, packing.indices, packing.padded_shape
    for name, x, dtype, least in (("cu_seqlens", cu_seqlens, torch.int32, 1), ("indices", indices, torch.int64, 0)):
        expected = f"a contiguous {dtype} tensor of one dimension" + (", of one element or more" if least else "")
        if not isinstance(x, Tensor):
            raise ArgumentError(name, type(x).__name__, expected)
        if x.layout is not torch.strided or x.is_nested or x.dtype != dtype or x.dim() != 1:
            raise ArgumentError(name, f"{x.dtype}, {x.layout}, of {x.dim()} dimensions", expected)
        if x.numel() < least or not x.is_contiguous():
            raise ArgumentError(name, f"{x.numel()} elements, strides {x.stride()}", expected)
    if indices.device != cu_seqlens.device:
        raise ArgumentError("indices", f"on {indices.device}", f"on {cu_seqlens.device}, the device of cu_seqlens")
    if not _is_size(packing.max_seqlen):
        raise ArgumentError("max_seqlen", repr(packing.max_seqlen), "an int, the length of the longest sequence")
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(map(_is_size, shape)) or shape[0] != packing.batch:
        raise ArgumentError("padded_shape", repr(shape), f"({packing.batch}, width of the padded grid), two ints")


def _is_size(number: object) -> bool:
    return isinstance(number, int | torch.SymInt) and not isinstance(number, bool) and number >= 0


def _check_values(packing: Packing) -> None:
    """Raise ArgumentError unless the tensors say what the docstring of `Packing` says; one host sync on a GPU."""
    cu_seqlens, indices, (batch, seqlen) = packing.cu_seqlens, packing.indices, packing.padded_shape
    ends, tokens = cu_seqlens.long(), packing.tokens
    lengths = F.pad(ends.diff(), (0, 1))  # an empty batch has a shortest and a longest one then, too
    row = torch.arange(tokens, device=cu_seqlens.device)
    line = torch.searchsorted(ends, row, right=True) - 1
    in_line = (indices // max(seqlen, 1) == line).all()
    facts = ends[0], ends[-1], lengths.amin(), lengths.amax(), in_line, (indices.diff() > 0).all()
    first, end, shortest, longest, lies_in_line, rises = torch.stack([fact.long() for fact in facts]).tolist()
    if first != 0:
        raise ArgumentError("cu_seqlens", f"{first} at its beginning", "0, the row of the first token")
    if shortest < 0:
        raise ArgumentError("cu_seqlens", f"a sequence of length {shortest}", "ends that do not fall")
    if end != tokens:
        raise ArgumentError("cu_seqlens", f"{end} at its end", f"{tokens}, as many tokens as there are indices")
    if longest != packing.max_seqlen:
        raise ArgumentError("max_seqlen", packing.max_seqlen, f"{longest}, the length of the longest sequence")
    if not lies_in_line or not rises or batch * seqlen < tokens:
        raise ArgumentError(
            "indices",
            "places outside of their sequences' lines in the padded grid, or that do not rise",
            f"rising places, those of sequence i from i * {seqlen} to (i + 1) * {seqlen} - 1",
        )


def _cumulate(lengths: Tensor) -> Tensor:
    """int32 `[batch]` -> int32 `[batch + 1]` running total that begins at 0."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
