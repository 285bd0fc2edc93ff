"""Launch choices as data, (op, shape, dtype, target) -> a frozen dataclass: what they hold, and which comes first.

`tuned.json` holds choices that were measured on a real GPU and comes first. What is chosen where nothing was measured
is in `..._choices.py`, by op. All of it is pure; nothing here touches a device.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, cast, get_args

import torch

from fastbert.kernels.target import Target

P = ParamSpec("P")
Choice = TypeVar("Choice")

# cuBLAS and `bias_gelu`; `linear_gelu_forward`; or cuBLASLt's own epilogue, which knows GELU by tanh only.
Form = Literal["fused pass", "epilogue", "cublaslt"]


@dataclass(frozen=True)
class Rows:
    """ROWS rows a program, each held whole in `row_block` columns."""

    ROWS: int
    num_warps: int


@dataclass(frozen=True)
class StridedRows:
    """As Rows, in at most PROGRAMS programs that stride over the rows; `maxnreg` as in AttentionTile."""

    ROWS: int
    PROGRAMS: int
    num_warps: int
    maxnreg: int = 0


@dataclass(frozen=True)
class Block:
    """ROWS rows of BLOCK columns at once."""

    ROWS: int
    BLOCK: int
    num_warps: int


@dataclass(frozen=True)
class StridedBlock:
    """As Block, in at most PROGRAMS programs that stride over the rows, for each block of columns."""

    ROWS: int
    BLOCK: int
    PROGRAMS: int
    num_warps: int


@dataclass(frozen=True)
class AttentionTile:
    """BLOCK_M query rows a program, BLOCK_N keys a step.

    SPLIT_TAIL runs full key blocks unmasked, then a masked tail. `maxnreg` lets NVIDIA's assembler use that many
    registers where left alone it would rather spill; 0 leaves it alone.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SPLIT_TAIL: bool = True
    maxnreg: int = 0


@dataclass(frozen=True)
class AttentionKeyTile:
    """BLOCK_N keys a program, BLOCK_M query rows a step; ONE_PASS where BLOCK_N holds every key of a sequence.

    SPLIT_TAIL (of the rows) and `maxnreg` as in AttentionTile.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SPLIT_TAIL: bool = True
    ONE_PASS: bool = False
    maxnreg: int = 0


@dataclass(frozen=True)
class AttentionBiasTile:
    """A tile of BLOCK_M rows and BLOCK_N columns of the bias a program; `maxnreg` as in AttentionTile."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int = 0


@dataclass(frozen=True)
class LinearGeluForm:
    """Which form runs."""

    form: Form


@dataclass(frozen=True)
class LinearGeluTile:
    """Tiles of BLOCK_M rows and BLOCK_N columns, BLOCK_K of the depth a step, in PROGRAMS programs a multiprocessor.

    Programs go through GROUP_M rows of tiles together; `maxnreg` as in AttentionTile.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    PROGRAMS: int = 1
    GROUP_M: int = 8
    maxnreg: int = 0


MEASURABLE: dict[str, Any] = {
    "attention_forward": AttentionTile,
    "attention_backward_query": AttentionTile,
    "attention_backward_key": AttentionKeyTile,
    "attention_backward_bias": AttentionBiasTile,
    "layer_norm_forward": Rows,
    "layer_norm_backward": StridedRows,
    "bias_gelu_forward": Block,
    "bias_gelu_backward": StridedBlock,
    "linear_gelu": LinearGeluForm,
    "linear_gelu_forward": LinearGeluTile,
    "embedding_forward": Rows,
    "embedding_backward": StridedRows,
    "embedding_backward_table": Block,
    "pool_forward": Block,
    "pool_backward": Block,
}


def read_tuned(path: Path) -> dict[tuple[str, str, str], Any]:
    """Measured choices by (arch, op, shape).

    The file holds `{"sm_90": {"bias_gelu_forward": {"width=768,dtype=float16": {...}}}}`, innermost the fields of the
    op's dataclass.

    Raises:
        ValueError: the file is no such JSON; it says where.
    """
    try:
        by_arch = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); write it with benchmarks/tune.py, or put {{}} there") from error
    choices = {}
    for arch, by_op in _entries(path, "the file", by_arch):
        for op, by_shape in _entries(path, arch, by_op):
            if op not in MEASURABLE:
                raise ValueError(f"{path}: {arch}: no op {op!r}; expected one of {sorted(MEASURABLE)}")
            wanted = {field.name for field in fields(MEASURABLE[op])}
            known = get_args(Form) if op == "linear_gelu" else ()
            for shape, values in _entries(path, f"{arch}, {op}", by_shape):
                named = dict(_entries(path, f"{arch}, {op}, {shape}", values))
                fits = all(value in known if known else isinstance(value, int) for value in named.values())
                if set(named) != wanted or not fits:
                    where = f"{path}: {arch}, {op}, {shape}"
                    expected = f"one of {known}" if known else "whole numbers"
                    raise ValueError(f"{where}: got {named}; expected {expected} for {sorted(wanted)}")
                choices[arch, op, shape] = MEASURABLE[op](**named)
    return choices


def _entries(path: Path, where: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {where}: got {value!r}; expected an object")
    return value.items()


TUNED = read_tuned(Path(__file__).with_name("tuned.json"))


def tuned(op: str, target: Target, default: Choice, shape: str) -> Choice:
    """The measured choice for this target, op and shape, or `default` where nothing was measured."""
    return TUNED.get((target.arch, op, shape), default)


# The choice where nothing was measured, its target, and the words by which a measured one is known.
Described: TypeAlias = tuple[Choice, Target, str]


def measured_first(describe: Callable[P, Described[Choice]]) -> Callable[P, Choice]:
    """A function that chooses for the op of its name: what was measured, or else what `describe` says once and for all.

    Few different arguments may come, because all that `describe` said is kept.
    """
    op = describe.__name__.removeprefix("_")
    described = cast("Callable[P, Described[Choice]]", functools.cache(describe))

    @functools.wraps(describe)
    def choose(*args: P.args, **options: P.kwargs) -> Choice:
        choice, target, shape = described(*args, **options)
        return tuned(op, target, choice, shape)

    return choose


def arguments(choice: Any) -> dict[str, Any]:
    """A choice as keyword arguments of a launch, without PROGRAMS, which is the grid's, and a `maxnreg` of 0."""
    given = vars(choice).copy()  # `asdict` copies deep, which takes as long as a launch
    given.pop("PROGRAMS", None)
    if given.get("maxnreg") == 0:
        del given["maxnreg"]
    return given


def number_kind(number: int) -> Hashable:
    """What a kernel's code depends on of a whole number: whether it is 0, 1, a multiple of 16, or beyond 32 bits."""
    return number if number < 2 else (number % 16 == 0, number >> 31)


# As `tuned.json` writes them.
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

# Those of a kind share a table of tiles.
DTYPE_KINDS = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "single"}


def dtype_unserved(dtype: torch.dtype) -> str | None:
    """Why no kernel can serve this dtype, or None when they can."""
    return None if dtype in DTYPE_KINDS else f"{dtype} is not float16, bfloat16 or float32"


def family(target: Target) -> str:
    """Targets that share a table of tiles; sm_120, which has no tcgen05, is not of "blackwell"."""
    if target.backend == "hip":
        return "cdna" if target.warp_size == 64 else "rdna"
    return {"sm_90": "hopper", "sm_100": "blackwell"}.get(target.kin, "ampere")


@functools.cache
def row_block(width: int) -> int:
    """Columns of the tile that holds a row whole: the next power of two, at least the 8 of one dropout draw."""
    return max(8, 1 << (width - 1).bit_length())
