"""Rivals' Triton kernels beside ours: the same tool, the same calls, their own launch settings.

Theirs are compiled from where they are installed; docs/static.md says how. PyTorch's inductor writes its own while this
runs. Each row of the comparison has, for each contender, the instructions of a lane for a unit of work (a score of
attention, else an element of the result) and the bytes of a call, of different addresses, for each launch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.autotuner import Autotuner

sys.path.append(str(Path(__file__).resolve().parent))
import main_loop
import traffic
from launches import is_computed
from offline import Launch, offline
from recorder import recorded

from fastbert.kernels import cost
from fastbert.kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from fastbert.kernels.layer_norm import layer_norm_backward, layer_norm_forward
from fastbert.kernels.target import KNOWN, Target, pretend

ROOT = Path(__file__).resolve().parent.parent.parent

# What a call needs of each: "torch" for inductor, and the sdist of flash-attn unpacked under build/, because what pip
# would build of it needs CUDA.
PACKAGES = ("torch", "liger-kernel", "flash-linear-attention", "flash-attn")
FLASH_ATTN = "build/flash_attn-*/flash_attn"
INDUCTOR_TORCH = "2.13."  # the release whose insides inductor.py knows

DTYPE = torch.float16
ROWS, HIDDEN, WIDTH = 1001, 768, 3072
HEADS, HEAD_DIM = traffic.HEADS, traffic.HEAD_DIM
LENGTHS = {"ragged": (300, 101), "aligned": (256, 256)}  # short, because the interpreter runs them

Figures = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """One side of a row.

    Attributes:
        row, whose: its place in the comparison.
        run: the call, for `offline` or `recorded`.
        unit: units of work of a launch in a trip of its main loop.
        share: units of work that a launch does for each of the call: 1 but for what only prepares or adds up sums.
        bytes: those of a rival's call: of the tensors that each of its kernels reads and writes, once, because some do
            not run in Triton's interpreter. Ours are counted there.
    """

    row: str
    whose: str
    run: Callable[[], object]
    unit: Callable[[Launch], int]
    share: Callable[[Launch], float] = lambda launch: 1.0
    bytes: Callable[[], int] | None = None


# Why ours is not the lower of the two, by row and rival.
_SUMS = (
    "Each program writes sums for the parameters, which torch adds up, and of so few rows nearly each has a program of "
    "its own. Their number is bounded, so they do not grow with the batch."
)
_LEAST = "Both read and write each tensor once; there is no less."
_TABLES = "Both read and write each tensor once; of ours the lengths and the table of tiles are counted too."
_MOMENTS = (
    "Both read and write each tensor once. In training ours takes the moments twice: of the exact sum for the result, "
    "of the rounded one, which the backward reads, for that."
)
REASONS: dict[tuple[str, str], str] = {
    ("layer_norm 768", "liger-kernel"): _LEAST,
    ("bias_gelu 3072", "inductor"): _LEAST,
    ("attention ragged", "flash-linear-attention"): _TABLES,
    ("attention aligned", "flash-attn"): _TABLES,
    ("layer_norm backward 768", "liger-kernel"): _SUMS,
    ("layer_norm 768 +residual", "flash-attn"): _MOMENTS,
    ("layer_norm 768 +residual +bias", "inductor"): _MOMENTS,
    ("layer_norm backward 768 +residual +bias", "inductor"): _SUMS,
}


def minimums() -> dict[str, int]:
    """The least bytes that the call of each row can move."""
    found = {}
    for name, options in LAYER_NORMS.items():
        found[f"layer_norm 768{name}"] = cost.layer_norm(ROWS, HIDDEN, DTYPE, statistics=True, **options).min_bytes
        found[f"layer_norm backward 768{name}"] = cost.layer_norm_backward(ROWS, HIDDEN, DTYPE, **options).min_bytes
    found["bias_gelu 3072"] = cost.bias_gelu(ROWS, WIDTH, DTYPE).min_bytes
    found["bias_gelu backward 3072"] = cost.bias_gelu_backward(ROWS, WIDTH, DTYPE).min_bytes
    for name, lengths in LENGTHS.items():
        found[f"attention {name}"] = cost.attention(lengths, HEADS, HEAD_DIM, DTYPE, lse=True).min_bytes
        found[f"attention backward {name}"] = cost.attention_backward(lengths, HEADS, HEAD_DIM, DTYPE).min_bytes
    return found


# What each rival's LayerNorm can do beside LayerNorm: Liger nothing, flash-attn and inductor more.
LAYER_NORMS: dict[str, dict[str, bool]] = {
    "": {},
    " +residual": {"residual": True},
    " +residual +bias": {"residual": True, "x_bias": True},
}


def ours(target: Target, unit_of: Callable[[Launch], int]) -> Iterator[Contender]:
    """Our kernels, in every row."""
    for name, options in LAYER_NORMS.items():
        x, parameter, statistic = _states(ROWS, HIDDEN), _states(HIDDEN), torch.ones(ROWS)
        residual = _states(ROWS, HIDDEN) if options.get("residual") else None
        x_bias = parameter.clone() if options.get("x_bias") else None
        forward = partial(
            layer_norm_forward, x, parameter, parameter.clone(), residual=residual, x_bias=x_bias, eps=1e-12,
            store_stats=True,
        )  # fmt: skip
        backward = partial(
            layer_norm_backward, x.clone(), x, parameter, statistic, statistic.clone(),
            residual=residual is not None, x_bias=x_bias is not None,
        )  # fmt: skip
        yield Contender(f"layer_norm 768{name}", "fastbert", forward, unit_of)
        yield Contender(f"layer_norm backward 768{name}", "fastbert", backward, unit_of)
    x, bias = _states(ROWS, WIDTH), _states(WIDTH)
    yield Contender("bias_gelu 3072", "fastbert", partial(bias_gelu_forward, x, bias), unit_of)
    yield Contender("bias_gelu backward 3072", "fastbert", partial(bias_gelu_backward, x.clone(), x, bias), unit_of)
    for name, lengths in LENGTHS.items():
        for case in traffic.attention(name, lengths, slack=0):
            yield Contender(case.name, "fastbert", case.run, unit_of)


def liger() -> Iterator[Contender]:
    """Liger's LayerNorm: no residual, no bias before it."""
    from liger_kernel.ops.layer_norm import layer_norm_backward, layer_norm_forward

    # Its backward gives each program rows / multiprocessors rows, and sees one multiprocessor on a CPU tensor: 8 rows
    # are what a program gets of 1001 on an H100.
    x, parameter = _states(ROWS, HIDDEN), _states(HIDDEN)
    some = x[:8]
    statistic = torch.ones(len(some))
    forward = partial(layer_norm_forward, x, parameter, parameter.clone(), 1e-12)
    backward = partial(
        layer_norm_backward, some.clone(), some, parameter, parameter.clone(), statistic, statistic.clone()
    )
    yield Contender("layer_norm 768", "liger-kernel", forward, lambda _: HIDDEN, bytes=lambda: _norm_bytes(2, 2))
    yield Contender(
        "layer_norm backward 768", "liger-kernel", backward, lambda _: HIDDEN, bytes=lambda: _norm_bytes(3, 3, 132)
    )


def _norm_bytes(states: int, vectors: int, programs: int = 0) -> int:
    """Of so many [ROWS, HIDDEN] and [HIDDEN], mean and rstd, and two sums of each program, written and read."""
    return (states * ROWS + vectors) * HIDDEN * 2 + 2 * ROWS * 4 + 4 * programs * HIDDEN * 4


def flash_linear_attention(target: Target) -> Iterator[Contender]:
    """Its softmax attention of packed sequences, which is causal: the main loop is that below the diagonal."""
    from fla.ops.attn import parallel
    from fla.ops.utils import prepare_chunk_indices
    from fla.utils.hardware import Backend

    lengths = LENGTHS["ragged"]
    tokens, scores = sum(lengths), HEADS * sum(length**2 for length in lengths)
    states = [_states(1, tokens, HEADS, HEAD_DIM) for _ in range(5)]
    starts = torch.tensor((0, *lengths)).cumsum(0)

    def on_target(call: Callable[..., object], *args: object) -> object:
        """It chooses tiles by the shared memory of the device at hand."""

        def has_shared_memory(arch: str, *_: Any) -> bool:
            return target.shared_memory >= Backend.get_shared_memory(arch)

        with patch.object(parallel, "check_shared_mem", has_shared_memory):
            block = 128 if has_shared_memory("hopper") or has_shared_memory("ampere") else 64
            chunks = prepare_chunk_indices(starts, block)
            return call(*args, scale=HEAD_DIM**-0.5, cu_seqlens=starts, chunk_indices=chunks)

    def unit(launch: Launch) -> int:
        constexprs = launch.constexprs
        return constexprs["BT"] * constexprs["BS"] if "BS" in constexprs else constexprs["V"]  # else a row of delta

    def share(launch: Launch) -> float:
        return 1.0 if "BS" in launch.constexprs else tokens * HEADS * HEAD_DIM / scores

    query, key, value, out, dout = states
    forward = partial(on_target, parallel.parallel_attn_fwd, query, key, value, None, None)
    lse = torch.ones(1, tokens, HEADS)
    backward = partial(on_target, parallel.parallel_attn_bwd, query, key, value, out, None, lse, dout)
    state, statistic = tokens * HEADS * HEAD_DIM * 2, tokens * HEADS * 4
    # Backward: delta from 2 states; dq from 4; dk and dv from 4. lse twice; delta written, and read twice.
    moved = 4 * state + statistic, 13 * state + 5 * statistic
    yield Contender("attention ragged", "flash-linear-attention", forward, unit, share, lambda: moved[0])
    yield Contender("attention backward ragged", "flash-linear-attention", backward, unit, share, lambda: moved[1])


def flash_attn(target: Target) -> Iterator[Contender]:
    """Its Triton attention, of sequences of one length, and its LayerNorm with residual, with no bias before it."""
    attention, norm = _flash_attn_modules(target)
    batch, seqlen = len(LENGTHS["aligned"]), LENGTHS["aligned"][0]
    states = [_states(batch, seqlen, HEADS, HEAD_DIM) for _ in range(3)]

    def attend() -> None:
        with patch.object(Tensor, "is_cuda", True):
            attention._flash_attn_forward(*states)

    x, parameter, statistic = _states(ROWS, HIDDEN), _states(HIDDEN), torch.ones(ROWS)

    def forward() -> None:
        with _as_if_on(target):
            norm._layer_norm_fwd(x, parameter, parameter.clone(), 1e-12, residual=x.clone())

    def backward() -> None:
        with _as_if_on(target):
            norm._layer_norm_bwd(
                x.clone(), x, parameter, parameter.clone(), 1e-12, statistic, statistic.clone(), has_residual=True
            )

    def unit(launch: Launch) -> int:
        return launch.constexprs["BLOCK_M"] * launch.constexprs["BLOCK_N"]

    tokens = batch * seqlen * HEADS
    norm_moved = _norm_bytes(4, 2), _norm_bytes(3, 3, 8 * 132)
    yield Contender("attention aligned", "flash-attn", attend, unit, bytes=lambda: tokens * (4 * HEAD_DIM * 2 + 4))
    yield Contender("layer_norm 768 +residual", "flash-attn", forward, lambda _: HIDDEN, bytes=lambda: norm_moved[0])
    yield Contender(
        "layer_norm backward 768 +residual", "flash-attn", backward, lambda _: HIDDEN, bytes=lambda: norm_moved[1]
    )


def _as_if_on(target: Target) -> Any:
    """Its LayerNorm asks for the device, and would time its configurations there."""
    # Multiprocessors of an A100, H100, MI300X.
    count = {"sm_80": 108, "sm_90": 132, "gfx942": 304}[target.arch]
    properties = SimpleNamespace(multi_processor_count=count, warp_size=target.warp_size)
    return patch.multiple(
        torch.cuda,
        current_device=lambda: 0,
        get_device_properties=lambda device: properties,
        device=lambda index: nullcontext(),
    )


def _flash_attn_modules(target: Target) -> tuple[ModuleType, ModuleType]:
    """Its two modules that are nothing but Triton, without the package around them, which needs CUDA."""
    folder = _flash_attn_folder()
    assert folder is not None
    package, library = ModuleType("flash_attn"), ModuleType("flash_attn.utils.library")
    package.__path__ = [str(folder)]
    library.triton_op = lambda *_, **__: lambda function: function  # type: ignore[attr-defined]
    known = {"flash_attn": package, "flash_attn.utils.library": library}
    with patch.dict(sys.modules, known), _as_if_on(target), patch.object(torch.library, "wrap_triton", _same):
        norm = importlib.import_module("flash_attn.ops.triton.layer_norm")
    # Its attention was written for a Triton whose dot could transpose.
    source = (folder / "flash_attn_triton.py").read_text(encoding="utf-8")
    source = re.sub(r"tl\.dot\((.*), (\w+), trans_b=True\)", r"tl.dot(\1, tl.trans(\2))", source)
    path = Path(tempfile.mkdtemp(prefix="flash-attn-")) / "flash_attn_triton.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    attention = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(attention)
    return attention, norm


def _same(kernel: Any) -> Any:
    return kernel


def _flash_attn_folder() -> Path | None:
    return max(ROOT.glob(FLASH_ATTN), default=None)


def inductor(target: Target) -> Iterator[Contender]:
    """What torch.compile makes of the same functions."""
    from inductor import Compiled

    def normalised(x: Tensor, x_bias: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + x_bias + residual, (HIDDEN,), weight, bias, 1e-12)

    def activated(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    state, vector = (ROWS, HIDDEN), (HIDDEN,)
    calls: tuple[tuple[str, str, Any, list[tuple[int, ...]]], ...] = (
        ("layer_norm", "768 +residual +bias", normalised, [state, vector, state, vector, vector]),
        ("bias_gelu", "3072", activated, [(ROWS, WIDTH), (WIDTH,)]),
    )
    for op, shape, function, shapes in calls:
        compiled = Compiled(function, shapes, target)
        size = shapes[0][0] * shapes[0][1]

        def unit(launch: Launch, compiled: Compiled = compiled) -> int:
            _, columns = compiled.elements[launch.kernel]
            return launch.constexprs["XBLOCK"] * min(launch.constexprs.get("R0_BLOCK", columns), columns)

        def share(launch: Launch, compiled: Compiled = compiled, size: int = size) -> float:
            return compiled.elements[launch.kernel][0] / size

        def moved(compiled: Compiled = compiled) -> int:
            taken, compiled.bytes = compiled.bytes, 0
            return taken

        yield Contender(f"{op} {shape}", "inductor", compiled.forward, unit, share, moved)
        yield Contender(f"{op} backward {shape}", "inductor", compiled.backward, unit, share, moved)


def contenders(target: Target, unit_of: Callable[[Launch], int]) -> Iterator[Contender]:
    """Ours and those that are installed."""
    found = versions()
    yield from ours(target, unit_of)
    if "liger-kernel" in found:
        yield from liger()
    if "flash-linear-attention" in found:
        yield from flash_linear_attention(target)
    if "flash-attn" in found:
        yield from flash_attn(target)
    if "torch" in found and target.backend == "cuda":
        yield from inductor(target)


def compare(arch: str, unit_of: Callable[[Launch], int]) -> dict[str, Any]:
    """Figures of each kernel by "whose: row: kernel", and of each row by row and whose.

    Where a rival would choose among configurations by timing them, each is compiled, and that with the fewest
    instructions of those with the fewest spills counts.
    """
    target = KNOWN[arch]
    everyone = list(contenders(target, unit_of))  # packages look for a device when they are imported
    kernels: dict[str, Figures] = {}
    rows: dict[str, dict[str, Figures]] = {}
    with offline(target) as launches, patch.object(Autotuner, "run", _run_all):
        for each in everyone:
            each.run()
            times = Counter(launch.key for launch in launches)
            instructions = 0.0
            for name in sorted({launch.kernel for launch in launches}):
                choices = {launch.key: launch for launch in launches if launch.kernel == name}.values()
                counted = [(main_loop.of_launch(one, target, each.unit(one)), one) for one in choices]
                best, chosen = min(counted, key=lambda pair: (pair[0]["spills"], pair[0]["per_unit"]["all"]))
                kernels[f"{each.whose}: {each.row}: {name}"] = best
                instructions += best["per_unit"]["all"] * each.share(chosen) * times[chosen.key]
            launches.clear()
            figures = rows.setdefault(each.row, {})[each.whose] = {"instructions": round(instructions, 4)}
            if each.bytes is not None:
                figures["bytes"] = each.bytes()
    return {"kernels": kernels, "rows": rows}


def _run_all(tuner: Autotuner, *args: Any, **options: Any) -> None:
    for choice in tuner.configs:
        tuner.fn.run(*args, **options, **choice.all_kwargs())


class TorchBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that torch's own computations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_computed(func, out):
            for x in torch.utils._pytree.tree_leaves((args, kwargs, out)):
                self.bytes += x.numel() * x.element_size() if isinstance(x, Tensor) else 0
        return out


def moved() -> dict[str, int]:
    """Bytes of our call in each row, counted by Triton's interpreter; launch choices are those of an H100."""
    found: dict[str, int] = {}
    with pretend(traffic.TARGET):
        for each in ours(traffic.TARGET, lambda launch: 1):
            with recorded() as launches, TorchBytes() as others:
                each.run()
            count = others.bytes + sum(
                traffic.bytes_once(one.loads) + traffic.bytes_once(one.stores) for one in launches
            )
            found[each.row] = count
    return found


def table_of(rows: dict[str, dict[str, Figures]], counted: dict[str, int]) -> dict[str, dict[str, Figures]]:
    """The rows of `compare`, ours with the bytes of `moved`, and for each rival a verdict.

    "lower" is what ours is, "instructions, bytes" at best; `reason` says why where it is not both.
    """
    least = minimums()
    found: dict[str, dict[str, Figures]] = {}
    for row, by_whose in rows.items():
        found[row] = {
            whose: {"bytes": counted[row], "minimum": least[row], **figures} for whose, figures in by_whose.items()
        }
        mine = found[row]["fastbert"]
        for whose, figures in found[row].items():
            if whose != "fastbert":
                lower = [name for name in ("instructions", "bytes") if mine[name] < figures[name]]
                figures["lower"] = ", ".join(lower)
                if len(lower) < 2:
                    figures["reason"] = REASONS.get((row, whose), "not explained")
    return found


def _states(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=DTYPE)


def installed() -> bool:
    """Whether all of them are."""
    return versions().keys() == set(PACKAGES)


def versions() -> dict[str, str]:
    """Versions of the rivals that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not found.get("torch", "").startswith(INDUCTOR_TORCH):
        found.pop("torch", None)
    found.pop("flash-attn", None)  # installed is not unpacked
    if (folder := _flash_attn_folder()) is not None:
        found["flash-attn"] = folder.parent.name.removeprefix("flash_attn-")
    return found
