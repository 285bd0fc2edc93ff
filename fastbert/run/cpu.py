"""Steps as one program of a CPU's kernels, for inference: weights are laid out for them once, and nothing is asked in
between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import Activation, Disentangled
from fastbert.cpu.int8 import Int8Matrix, Int8Rows
from fastbert.cpu.layout import in_blocks, in_blocks_together
from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import room
from fastbert.ops.attention_torch import WIDEST_HEAD
from fastbert.ops.common import multiplies_bare, native_machine
from fastbert.ops.disentangled import rows_by_distance, rows_of_distances
from fastbert.ops.fastest import fastest
from fastbert.ops.layer_norm import in_float32
from fastbert.ops.linear import Buffers
from fastbert.ops.relative import bucket_numbers
from fastbert.ops.rotary import angles_of_places
from fastbert.packing import Packing
from fastbert.run.eager import formats, made_dtype, of_positions
from fastbert.run.eight_bits import Int8Linear
from fastbert.run.frozen import FrozenLinear
from fastbert.run.parts import eight_bits, in_eight_bits, is_frozen, is_plain, linears_of, matrix, weights
from fastbert.run.steps import PROJECTIONS, Attend, Convolve, Layers, Parts, Product, Steps

if TYPE_CHECKING:
    from fastbert.cpu.program import Call, Program

# Tokens up to which a run is worth being kept: there Python would take a twentieth of its time or more.
SHORT = 256
# Tables of biases by distance are made for multiples of so many places.
PLACES_AT_ONCE = 64
# So many sizes are; each holds its input and its result.
KEPT_RUNS = 32


def unserved(layers: Layers, x: Tensor) -> str | None:
    """Why the kernels don't serve these layers for inputs as `x`; None where they do."""
    if torch.is_grad_enabled() or not multiplies_bare(x):  # first, for torch.compile, which can't read what follows
        return "a gradient, autocast, what looks on, or another device"
    machine = native_machine(x)
    if machine is None:
        return f"no kernels for {x.dtype} here"
    if len(x) == 0 or not layers:
        return "nothing to do"
    for steps, parts in layers:
        reason = _layer_unserved(machine, steps, parts, x)
        if reason is not None:
            return reason
    return None


def _layer_unserved(machine: Machine, steps: Steps, parts: Parts, x: Tensor) -> str | None:
    widths = dict.fromkeys(steps.carried, x.shape[1])
    for step in steps.of:
        if isinstance(step, Attend):
            if widths[step.x] > 3 * step.heads * WIDEST_HEAD:
                return f"heads wider than {WIDEST_HEAD}"
            if step.rotary is not None and widths[step.x] // (3 * step.heads) % 2:
                return "rotary positions of heads of odd width"
            if step.disentangled is not None:
                reason = _positions_unserved(step.disentangled, parts, x)
                if reason is not None:
                    return reason
            if step.window is not None and step.window < 0:
                return "a window of less than 0 places"
            if step.relative is not None and type(parts[step.relative]) is not nn.Embedding:
                return f"{step.relative} that is not an nn.Embedding"
            widths[step.into] = widths[step.x] // 3
            continue
        if isinstance(step, Convolve):
            return "a convolution"
        part = parts[step.part]
        if step.norm is not None and not is_plain(parts[step.norm]):
            return f"{step.norm} that is not an nn.LayerNorm on which nothing looks"
        if _in_int8(part):
            if not machine.int8:
                return f"no products of int8 on {machine.cpu}"
            linears = cast("list[Int8Linear]", linears_of(part))
            if linears[0].in_features % 4:
                return f"{step.part} of depth {linears[0].in_features}, which is no multiple of 4"
            width = sum(linear.out_features for linear in linears)
        elif not is_plain(part) and not is_frozen(part):
            return f"{step.part} that is not an nn.Linear on which nothing looks"
        elif not is_frozen(part) and fastest(x.dtype, len(x), "laid out") != "own":
            return "products that another path makes faster"
        else:
            width, depth, dtype = _shape(part)
            if (depth, dtype) != (widths[step.x], x.dtype):
                return f"{step.part} of depth {depth} in {dtype}, which is not that of its rows"
            if depth * x.itemsize % 4:
                return f"{step.part} of depth {depth}, which fills no words of 4 bytes"
        if step.gated and width % 2:
            return f"{step.part} of {width} outputs, half of which would be gates"
        widths[step.into] = width // 2 if step.gated else width
    return None


def _positions_unserved(asked: Disentangled, parts: Parts, x: Tensor) -> str | None:
    if type(parts["relative"]) is not nn.Embedding or parts["relative"].weight.dtype != x.dtype:
        return f"a table of positions that is not an nn.Embedding of {x.dtype}"
    if asked.normalised and not is_plain(parts["relative_norm"]):
        return "relative_norm that is not an nn.LayerNorm on which nothing looks"
    for term in asked.terms:
        part = parts[PROJECTIONS[term]]
        if not is_plain(part) and type(part) is not FrozenLinear and not in_eight_bits(part):
            return f"{PROJECTIONS[term]} that is not an nn.Linear on which nothing looks"
    return None


@dataclass(frozen=True, eq=False)
class _Run:
    """A `Program` and the memory it is tied to.

    Attributes:
        registers, cu_seqlens: what it reads, to be filled before it runs.
        out: what it writes.
    """

    registers: dict[str, Tensor]
    cu_seqlens: Tensor
    out: Tensor
    program: Program


class _Runs(threading.local):
    """The runs of little text that were used last, by their sizes; each thread has its own."""

    def __init__(self) -> None:
        self._of_sizes: dict[tuple[int, ...], _Run] = {}

    def get(self, sizes: tuple[int, ...], make: Callable[[], _Run]) -> _Run:
        run = self._of_sizes.pop(sizes, None) or make()
        self._of_sizes[sizes] = run  # as the last one
        if len(self._of_sizes) > KEPT_RUNS:
            del self._of_sizes[next(iter(self._of_sizes))]
        return run


def _in_int8(part: nn.Module) -> bool:
    """Whether `part` is in int8, and nothing looks on it."""
    return isinstance(linears_of(part)[0], Int8Linear) and in_eight_bits(part)


def _shape(part: nn.Module) -> tuple[int, int, torch.dtype]:
    """Outputs, inputs and dtype of a plain or frozen part, without joining it."""
    linears = linears_of(part)
    shapes = [one.shape if type(one) is FrozenLinear else cast("Tensor", one.weight).shape for one in linears]
    held = linears[0].blocks if type(linears[0]) is FrozenLinear else cast("Tensor", linears[0].weight)
    return sum(shape[0] for shape in shapes), shapes[0][1], held.dtype


class _Weights(NamedTuple):
    """What the kernels take of a product: its matrix, in floats `layout.in_blocks`, and bias; its norm."""

    matrix: Tensor | Int8Matrix
    bias: Tensor
    norm: tuple[Tensor, Tensor, float] | None


class _After(TypedDict):
    """What follows a product, as its kernel takes it or the one for its halves."""

    activation: Activation | None
    residual: Tensor | None


class _Rows(NamedTuple):
    """What a register holds: floats, int8, or both."""

    floats: Tensor | None
    int8: Int8Rows | None


class CpuProgram:
    """Layers whose weights lie as the kernels take them. It does not see them change."""

    name = "cpu"

    def __init__(self, machine: Machine, layers: Layers) -> None:
        self.machine, self.layers = machine, layers
        self.buffers, self.runs = Buffers(), _Runs()
        self.weights = _kernel_weights(machine, layers)
        self.tables: dict[tuple[int, int], Tensor] = {}
        self.positions: dict[int, tuple[int, dict[str, Tensor]]] = {}
        self.added = [{step: _added(step) for step in steps.of if isinstance(step, Attend)} for steps, _ in layers]

    def run(self, registers: Mapping[str, Tensor], packing: Packing, read: Tensor | None = None) -> Tensor:
        """What "x" holds after all layers, of these registers before the first; those rows of it that are `read`."""
        from fastbert.cpu.program import Program

        x = registers["x"]
        packing.check_rows("x", x)
        packing.check_ends()
        if read is None and len(x) == packing.tokens <= SHORT:
            return self._run_again(registers, packing)
        run = _Recorded(self, registers, packing.cu_seqlens, packing.max_seqlen, packing.tokens)
        if read is not None:
            run.record(until_last_look=True)
            Program(run.calls).run()
            run.take(read)
        out = room((len(x) if read is None else len(read), x.shape[1]), x.dtype)
        run.record(out=out)
        Program(run.calls).run()
        return out

    def table(self, part: nn.Module, max_seqlen: int) -> Tensor:
        """float32 `[heads, 2 * places - 1]`, places >= max_seqlen: a part's biases by distance (`ops.relative`)."""
        places = -(-max_seqlen // PLACES_AT_ONCE) * PLACES_AT_ONCE
        made = self.tables.get((id(part), places))
        if made is None:
            weight = cast("Tensor", part.weight).detach()
            numbers = bucket_numbers(places, len(weight), weight.device)
            made = self.tables[id(part), places] = weight.index_select(0, numbers).t().float().contiguous()
        return made

    def of_positions(self, layer: int, step: Attend, qkv: Tensor, max_seqlen: int) -> dict[str, Any]:
        """What `Attend.disentangled` multiplies a layer's queries and keys by, as attention's kernel takes it.

        Args:
            qkv: `[rows, 3, heads, head_dim]`.
        """
        asked = step.disentangled
        if asked is None:
            return {}
        places, made = self.positions.get(layer, (0, {}))
        if places < max_seqlen:
            places = -(-max_seqlen // PLACES_AT_ONCE) * PLACES_AT_ONCE
            first, last = rows_of_distances(places, asked)
            distance = torch.arange(1 - places, places, dtype=torch.int64, device="cpu")
            # the kernel has those of queries by column - row, and those of keys by row - column
            numbers = {"c2p": rows_by_distance(-distance, asked), "p2c": rows_by_distance(distance, asked)}
            made = {}
            for term, rows in of_positions(asked, self.layers[layer][1], first, last).items():
                by_distance = rows.detach().to(qkv.dtype).index_select(0, numbers[term] - first)
                by_head = by_distance.unflatten(1, qkv.shape[2:]).transpose(0, 1)  # [heads, 2 * places - 1, head_dim]
                columns = F.pad(by_head, (0, 0, 0, 1)).flatten(0, 1)
                made[PROJECTIONS[term]] = in_blocks(columns, 2 * self.machine.vectors.lanes)
            self.positions[layer] = places, made
        return made

    def _run_again(self, registers: Mapping[str, Tensor], packing: Packing) -> Tensor:
        """`run` of little text: what was prepared for the same sizes is a single call."""
        sizes = packing.tokens, packing.batch, packing.max_seqlen, torch.get_num_threads()
        run = self.runs.get(sizes, lambda: self._prepared(registers, packing))
        for name, own in run.registers.items():
            own.copy_(registers[name])
        run.cu_seqlens.copy_(packing.cu_seqlens)
        run.program.run()
        return run.out.clone()

    def _prepared(self, registers: Mapping[str, Tensor], packing: Packing) -> _Run:
        from fastbert.cpu.program import Program

        x = registers["x"]
        with torch.inference_mode(False):  # what is made inside could not be written to outside
            own = {name: room(rows.shape, rows.dtype) for name, rows in registers.items()}
            out, cu_seqlens = room(x.shape, x.dtype), room(packing.cu_seqlens.shape, torch.int32)
        run = _Recorded(self, own, cu_seqlens, packing.max_seqlen, len(x))
        run.record(out=out)
        return _Run(own, cu_seqlens, out, Program(run.calls))


class _Recorded:
    """The calls of a run, recorded step by step, and what its registers hold."""

    def __init__(
        self,
        program: CpuProgram,
        registers: Mapping[str, Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        tokens: int,
    ) -> None:
        self.program, self.machine = program, program.machine
        self.cu_seqlens, self.max_seqlen, self.tokens = cu_seqlens, max_seqlen, tokens
        self.x, self.rows = registers["x"], len(registers["x"])
        self.registers = {name: _Rows(rows, None) for name, rows in registers.items()}
        self.calls: list[Call] = []
        self.todo = [(layer, i) for layer, (steps, _) in enumerate(program.layers) for i in range(len(steps.of))]

    def record(self, *, until_last_look: bool = False, out: Tensor | None = None) -> None:
        """The steps that are left; those up to the last that looks at other rows, or all, the last writing `out`."""
        layers = self.program.layers
        last = len(layers) - 1, layers[-1][0].last_look
        while self.todo:
            layer, i = self.todo.pop(0)
            steps, parts = layers[layer]
            step = steps.of[i]
            if isinstance(step, Attend):
                self._attend(layer, step, parts)
            else:
                self._product(steps, i, parts, self.program.weights[layer][step.part], None if self.todo else out)
            if until_last_look and (layer, i) == last:
                return

    def take(self, read: Tensor) -> None:
        """Go on with these rows, from what the calls so far have left."""
        steps, _ = self.program.layers[-1]
        for name in steps.late:
            floats = self.registers[name].floats
            assert floats is not None
            self.registers[name] = _Rows(floats.index_select(0, read), None)
        self.rows, self.calls = len(read), []

    def _attend(self, layer: int, step: Attend, parts: Parts) -> None:
        from fastbert.cpu.attention import attention_forward

        qkv = self.registers[step.x].floats
        assert qkv is not None
        heads, longest = step.split(qkv), self.max_seqlen
        context = self._room(step.into, qkv.shape[1] // 3, qkv.dtype, qkv)
        context[self.tokens :] = 0
        head_dim = heads.shape[-1]
        angles = None if step.rotary is None else angles_of_places(longest, head_dim, step.rotary, step.rotary_scale)
        relative = None if step.relative is None else self.program.table(parts[step.relative], longest)
        call = attention_forward(
            self.machine, heads, self.cu_seqlens, longest, step.scale(head_dim),
            context.view(self.rows, *heads.shape[2:]),
            window=step.window, angles=angles, relative=relative, **self.program.added[layer][step],
            **self.program.of_positions(layer, step, heads, longest),
        )  # fmt: skip
        self.calls.append(call)
        self.registers[step.into] = _Rows(context, None)

    def _product(self, steps: Steps, i: int, parts: Parts, given: _Weights, out: Tensor | None) -> None:
        step = cast("Product", steps.of[i])
        residual = None if step.add is None else self.registers[step.add].floats
        if isinstance(given.matrix, Int8Matrix):
            made = self._int8_product(steps, i, parts, given, given.matrix, residual, out)
        else:
            made = self._float_product(step, given, given.matrix, residual, out)
        self.registers[step.into] = made

    def _float_product(
        self, step: Product, given: _Weights, matrix: Tensor, residual: Tensor | None, out: Tensor | None
    ) -> _Rows:
        from fastbert.cpu.linear import linear
        from fastbert.cpu.row_wise import row_wise

        x, machine = self.registers[step.x].floats, self.machine
        assert x is not None
        name, width = step.into if step.sum is None else step.sum, len(given.bias) // (2 if step.gated else 1)
        total = self._room(name, width, self.x.dtype, x, residual) if out is None or step.sum is not None else out
        after: _After = {"activation": step.activation, "residual": residual}
        if step.gated:
            halves = self._room(f"halves of {step.into}", 2 * width, self.x.dtype)
            self.calls.append(linear(machine, x, matrix, given.bias, halves))
            self.calls.append(row_wise(machine, halves, gated=True, out=total, **after))
        else:
            self.calls.append(linear(machine, x, matrix, given.bias, total, **after))
        if step.sum is not None:
            self.registers[step.sum] = _Rows(total, None)
        if given.norm is None:
            return _Rows(total, None)
        made = total
        if step.sum is not None:
            made = self._room(step.into, width, self.x.dtype) if out is None else out
        self.calls.append(row_wise(machine, total, norm=given.norm, out=made))
        return _Rows(made, None)

    def _int8_product(
        self,
        steps: Steps,
        i: int,
        parts: Parts,
        given: _Weights,
        matrix: Int8Matrix,
        residual: Tensor | None,
        out: Tensor | None,
    ) -> _Rows:
        from fastbert.cpu.linear_int8 import linear_int8
        from fastbert.cpu.row_wise import row_wise

        step, machine = cast("Product", steps.of[i]), self.machine
        x, x_int8 = self.registers[step.x]
        if x_int8 is None:
            assert x is not None
            x_int8 = self._int8_room(step.x, x.shape[1])
            self.calls.append(row_wise(machine, x, out_int8=x_int8))
            self.registers[step.x] = _Rows(x, x_int8)
        wants_floats, wants_int8 = formats(steps, i, parts)
        dtype = made_dtype(steps, i, self.x, int8=True)
        width, keeps = len(given.bias) // (2 if step.gated else 1), step.sum is not None
        floats, int8 = out, self._int8_room(step.into, width, x_int8) if wants_int8 and out is None else None
        if floats is None and wants_floats:
            floats = self._room(step.into, width, dtype, residual)
        total = self._room(step.sum, width, dtype, residual) if step.sum is not None else floats
        after: _After = {"activation": step.activation, "residual": residual}
        norm, total_int8 = (None, None) if keeps else (given.norm, int8)
        if step.gated:
            halves = self._room(f"halves of {step.into}", 2 * width, dtype)
            self.calls += linear_int8(machine, x_int8, matrix, given.bias, out=halves)
            self.calls.append(row_wise(machine, halves, gated=True, norm=norm, out=total, out_int8=total_int8, **after))
        else:
            self.calls += linear_int8(
                machine, x_int8, matrix, given.bias, norm=norm, out=total, out_int8=total_int8, **after
            )
        if step.sum is not None:
            assert total is not None
            self.registers[step.sum] = _Rows(total, None)
            self.calls.append(row_wise(machine, total, norm=given.norm, out=floats, out_int8=int8))
        return _Rows(floats, int8)

    def _room(self, name: str, width: int, dtype: torch.dtype, *beside: Tensor | None) -> Tensor:
        """Memory for a register, other than that of `beside`, which it may have held so far."""
        held = {x.data_ptr() for x in beside if x is not None and x.numel()}  # what is empty has no memory to share
        while (made := self.program.buffers.room(name, self.rows, width, dtype)).data_ptr() in held:
            name = f"{name}, again"
        return made

    def _int8_room(self, name: str, width: int, beside: Int8Rows | None = None) -> Int8Rows:
        values, scale, zero = (
            self._room(f"{name} in int8: {part}", columns, dtype, None if beside is None else getattr(beside, part))
            for part, columns, dtype in (
                ("values", width, torch.uint8),
                ("scale", 1, torch.float32),
                ("zero", 1, torch.float32),
            )
        )
        return Int8Rows(values, scale.view(-1), zero.view(-1))


def _kernel_weights(machine: Machine, layers: Layers) -> list[dict[str, _Weights]]:
    """Of each layer what the kernels take of its parts; matrices in floats follow one another in memory.

    Layers that share a part share its matrix.
    """
    in_int8 = {id(part): eight_bits(part) for _, parts in layers for part in parts.values() if _in_int8(part)}
    products = [(parts, step) for steps, parts in layers for step in steps.of if isinstance(step, Product)]
    plain = {id(parts[step.part]): parts[step.part] for parts, step in products if is_plain(parts[step.part])}
    held = [weights(part)[0] for part in plain.values()]
    blocks = dict(zip(plain, in_blocks_together(held, machine.vectors.columns) if held else [], strict=True))
    made: list[dict[str, _Weights]] = []
    for steps, parts in layers:
        made.append({})
        for step in steps.of:
            if isinstance(step, Product):
                part = parts[step.part]
                norm = None if step.norm is None else in_float32(cast("nn.LayerNorm", parts[step.norm]))
                if id(part) in in_int8:
                    one = cast("Int8Linear", in_int8[id(part)])
                    made[-1][step.part] = _Weights(one.matrix, one.bias_in_float32, norm)
                else:
                    whole, bias = matrix(part) if is_frozen(part) else (blocks[id(part)], weights(part)[1])
                    bias = whole.new_zeros(_shape(part)[0]) if bias is None else bias.detach().contiguous()
                    made[-1][step.part] = _Weights(whole, bias, norm)
    return made


def _added(step: Attend) -> dict[str, Any]:
    """What is added to the scores of a step, by the kernel's names for it."""
    slopes = step.slopes(torch.device("cpu"))
    return {} if slopes is None else {"alibi_slopes": slopes}


def lay_out(layers: Layers, x: Tensor) -> CpuProgram | None:
    """`layers` for inputs as `x`, which are not `unserved`; None where a parameter is no plain tensor."""
    parameters = [parameter for _, parts in layers for part in parts.values() for parameter in part.parameters()]
    machine = native_machine(x, *parameters)
    return None if machine is None else CpuProgram(machine, layers)
