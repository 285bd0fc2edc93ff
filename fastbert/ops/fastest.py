"""Which product of floats is the fastest on this CPU: torch's BLAS, its oneDNN, or kernels of our own.

The name of a CPU says little. So the ways are timed against each other when the answer is first needed, in a third of
a second or less, and the answer is kept in the user's cache: later runs choose alike, and so give the same bits. For
CPUs that were looked at with care the answer is here, and nothing is timed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import backend, forks
from fastbert.cache import folder, write
from fastbert.cpu.layout import in_blocks
from fastbert.cpu.machine import Machine, amx_asked, host, lane
from fastbert.cpu.memory import room
from fastbert.errors import ArgumentError, BackendError, FastbertError
from fastbert.installed import version
from fastbert.ops.common import multiplies_bare
from fastbert.ops.products import by_kernel, weight_gradient

Way = Literal["own", "onednn", "blas"]
# How the weights of a product come: laid out once by whoever multiplies them, as a module has them, or that and with
# gradients to be made.
Weights = Literal["laid out", "plain", "recorded"]

# Rows up to which a product waits for its weights more than for its arithmetic.
FEW = 64
# What is timed: so many rows, few and many, of the linear layers of a feed-forward, from one width to another and back.
# A batch that is trained on has more rows than a group of texts.
ROWS = {"laid out": (16, 512), "plain": (16, 512), "recorded": (16, 2048)}
WIDTHS = 384, 1536
# For at most so many seconds, in at most so many rounds.
SECONDS, ROUNDS = 0.25, 9
# A way that is slower than another by less than this is as fast: the first of them in the order of `Way` is taken.
TIE = 1.03
# Of the time of all threads the share that they may wait for a core: where others run, times say nothing.
WAITED = 0.05

FILE = "products.json"
# What changes how the libraries multiply, beside the CPU.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "MKL_CBWR")


class Kind(NamedTuple):
    """What is asked about: products of `dtype`, of few rows or of many, with weights that come so."""

    dtype: torch.dtype
    few: bool
    weights: Weights

    @property
    def name(self) -> str:
        """In words, for people and files."""
        rows = f"up to {FEW} rows" if self.few else f"more than {FEW} rows"
        return f"{str(self.dtype).removeprefix('torch.')}, {rows}, {self.weights}"


KINDS = [
    Kind(dtype, few, weights)
    for dtype in (torch.float32, torch.bfloat16)
    for weights in get_args(Weights)
    for few in (True, False)
    if not (few and weights == "recorded")  # not worth being laid out: torch multiplies these
]

_ALIKE: dict[Weights, Way] = {"laid out": "own", "plain": "onednn", "recorded": "own"}
# Of CPUs by LLVM's name: the fastest by `Kind.name`, which two quiet runs of `fastbert info` agreed on.
REVIEWED: dict[str, dict[str, Way]] = {
    cpu: {kind.name: _ALIKE[kind.weights] for kind in KINDS} for cpu in ("znver4", "znver5")
}


@dataclass(frozen=True)
class Choice:
    """The way that a kind of product takes, where that comes from, and of the ways that were timed the milliseconds."""

    way: Way
    source: str
    milliseconds: Mapping[str, float]


_lock = forks.lock()
_order: list[Way] | None = None  # told by `choose_products`
_fresh = False  # whether it asked for times of now
# By kind, and what else the answer depends on within a process.
_choices: dict[tuple[Kind, int, bool], Choice] = {}


def fastest(dtype: torch.dtype, rows: int, weights: Weights) -> Way:
    """The way that products of so many rows are to take; by `use_backend("native")` our own, where they come laid out.

    Raises:
        ArgumentError, BackendError: FASTBERT_PRODUCTS is no way, or one that this CPU has not.
    """
    if backend.forced() == "native" and weights != "plain":
        return "own"
    return choice(Kind(dtype, rows <= FEW, weights)).way


def choice(kind: Kind) -> Choice:
    """The `Choice` of a kind, timed where nobody knows it yet.

    Raises:
        ArgumentError, BackendError: as `fastest`.
    """
    at = kind, torch.get_num_threads(), bool(torch.backends.mkldnn.enabled)
    found = _choices.get(at)
    if found is None:
        found = _choose(kind)
        with _lock:  # not around the times: compiling takes a lock too
            found = _choices.setdefault(at, found if found.source else _keep(kind, found))
    return found


def _choose(kind: Kind) -> Choice:
    """Without a source where it was timed and is worth being kept."""
    ways = _served(kind)
    order = _order or _told(os.environ.get("FASTBERT_PRODUCTS", ""))
    if order is not None:
        first = next(way for way in order if way in ways)
        return Choice(first, "told by choose_products or FASTBERT_PRODUCTS", {})
    if len(ways) == 1:
        return Choice(ways[0], "no other serves", {})
    fresh = _fresh or os.environ.get("FASTBERT_PRODUCTS") == "measure"
    reviewed = {} if fresh or _limited() else REVIEWED.get(_cpu(), {})
    if reviewed.get(kind.name) in ways:
        return Choice(reviewed[kind.name], f"reviewed for {_cpu()}", {})
    return (None if fresh else _kept(kind, ways)) or _timed(kind, ways)


def choose_products(way: Way | Literal["measure"] | None) -> None:
    """Say how floats are multiplied on this CPU, for the whole process, as FASTBERT_PRODUCTS does from outside.

    Args:
        way: "own" takes the kernels of fastbert, "onednn" or "blas" those that torch brings; what that way does not
            serve takes the next of these three. "measure" forgets what was found before, on this machine with these
            versions, and times them again when they are next needed. None is as if nothing had been said.

    Raises:
        ArgumentError: there is no such way.
        BackendError: "own" on a CPU that has no kernels.
    """
    global _order, _fresh
    order = _told("" if way is None else way)
    with _lock:
        _order, _fresh = order, way == "measure"
        _choices.clear()
        if _fresh:
            _write({})


def onednn_serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether oneDNN's fused linear layers can run on these tensors."""
    return bool(
        x.shape[1] > 0
        and multiplies_bare(x, *others)
        and all(other is None or other.dim() > 1 or other.is_contiguous() for other in others)  # a bias: it reads past
        and _has_onednn(x.dtype)
    )


def onednn_fuses(x: Tensor, *others: Tensor | None) -> bool:
    """Whether they do, on weights as a module has them: where they can and are the fastest."""
    return onednn_serves(x, *others) and fastest(x.dtype, len(x), "plain") == "onednn"


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and backend.onednn_multiplies_bfloat16())


def _served(kind: Kind) -> list[Way]:
    """The ways that there are, in the order of `Way`."""
    machine = host()
    # kernels of our own make gradients in float32; weights that change from call to call are not laid out for one
    laid_out = kind.weights == "laid out" or (kind.weights == "recorded" and kind.dtype == torch.float32)
    own = laid_out and isinstance(machine, Machine) and kind.dtype in machine.dtypes
    there = {"own": own, "onednn": kind.weights != "recorded" and _has_onednn(kind.dtype), "blas": True}
    return [way for way in get_args(Way) if there[way]]


def _told(name: str) -> list[Way] | None:
    if name in ("", "measure"):
        return None
    if name not in get_args(Way):
        raise ArgumentError("FASTBERT_PRODUCTS", repr(name), f"{', '.join(get_args(Way))}, or measure")
    if name == "own" and isinstance(reason := host(), str):
        raise BackendError("FASTBERT_PRODUCTS", f"own, and {reason}", "a CPU for which kernels are compiled")
    return sorted(get_args(Way), key=lambda way: way != name)


def _cpu() -> str:
    machine = host()
    return machine.cpu if isinstance(machine, Machine) else torch.backends.cpu.get_cpu_capability()


def _limited() -> bool:
    """Whether somebody took away a part of the CPU, or allowed one that is off."""
    return lane() is not None or amx_asked() or any(name in os.environ for name in LIMITS)


@cache
def _versions() -> str:
    found = {name: version(name) for name in ("fastbert", "torch", "llvmlite")}
    # A bare checkout has no fastbert, and a platform without kernels no llvmlite.
    return ", ".join(f"no {name}" if of is None else f"{name} {of}" for name, of in found.items())


def _machine() -> str:
    """What the times hold for."""
    limits = [f"{name}={os.environ[name]}" for name in ("FASTBERT_CPU", "FASTBERT_AMX", *LIMITS) if name in os.environ]
    onednn = "on" if torch.backends.mkldnn.enabled else "off"
    parts = [_cpu(), torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads", f"oneDNN {onednn}"]
    return "; ".join([*parts, _versions(), *limits])


def _read() -> dict[str, Any]:
    """What the file holds for all machines; nothing where there is none, or something else."""
    try:
        held = json.loads((folder() / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def _of_machine() -> dict[str, Any]:
    """Of that what is for the machine at hand."""
    held = _read().get(_machine())
    return held if isinstance(held, dict) else {}


def _write(of_machine: dict[str, Any]) -> bool:
    """Keep this for the machine at hand; whether it could be."""
    held = {**_read(), _machine(): of_machine}
    try:
        write(folder() / FILE, json.dumps(held, indent=1) + "\n")
    except (OSError, FastbertError):
        return False
    return True


def _kept(kind: Kind, ways: list[Way]) -> Choice | None:
    found = _of_machine().get(kind.name)
    if not isinstance(found, dict) or found.get("way") not in ways:
        return None
    times = found.get("milliseconds")
    if not isinstance(times, dict) or not all(isinstance(one, float) for one in times.values()):
        return None
    return Choice(found["way"], f"kept in {folder() / FILE}", times)


def _keep(kind: Kind, made: Choice) -> Choice:
    kept = _write({**_of_machine(), kind.name: {"way": made.way, "milliseconds": made.milliseconds}})
    where = f"kept in {folder() / FILE}" if kept else "the cache can't be written to"
    return replace(made, source=f"timed just now; {where}")


def _timed(kind: Kind, ways: list[Way]) -> Choice:
    """See `_choose`."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        calls = {way: call for way, call in _calls(kind).items() if way in ways}
        for call in calls.values():
            call()  # compiles, and brings its weights near
        seconds: dict[str, list[float]] = {way: [] for way in calls}
        begin, waited = time.perf_counter(), _waited()
        end = begin + SECONDS
        while len(seconds[ways[-1]]) < ROUNDS and (time.perf_counter() < end or not seconds[ways[-1]]):
            for way, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[way].append(time.perf_counter() - start)
        spent = time.perf_counter() - begin
    best = {way: min(times) for way, times in seconds.items()}
    milliseconds = {way: round(1e3 * one, 4) for way, one in best.items()}
    if _waited() - waited > WAITED * spent * torch.get_num_threads():
        return Choice(ways[0], "timed just now, while something else ran: neither heeded nor kept", milliseconds)
    first = next(way for way in ways if best[way] <= TIE * min(best.values()))
    return Choice(first, "", milliseconds)


def _waited() -> float:
    """Seconds that this process's threads have waited for a core; 0 where the system does not say."""
    waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that ended
            waited += int(path.read_text(encoding="ascii").split()[1])
    return waited * 1e-9


def _calls(kind: Kind) -> dict[Way, Callable[[], object]]:
    """What each way does, on numbers drawn for it."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows, (narrow, wide) = ROWS[kind.weights][0 if kind.few else 1], WIDTHS

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(kind.dtype)

    x, made = drawn(rows, narrow), drawn(rows, wide)
    up, up_bias, down, down_bias = drawn(wide, narrow), drawn(wide), drawn(narrow, wide), drawn(narrow)
    machine = host()
    calls: dict[Way, Callable[[], object]] = {}
    if kind.weights == "recorded":
        calls["blas"] = lambda: (F.linear(x, up, up_bias), made @ up, made.t() @ x)
        if isinstance(machine, Machine):
            calls["own"] = lambda: (
                by_kernel(machine, x, up, up_bias),
                by_kernel(machine, made, up.t(), None),
                weight_gradient(machine, x, made),
            )
        return calls

    up_t, down_t = (one.t().contiguous() if kind.weights == "laid out" else one.t() for one in (up, down))

    def blas() -> object:
        torch.addmm(up_bias, x, up_t, out=made)
        return (x + down_bias).addmm_(torch.ops.aten.gelu_(made), down_t)

    calls["blas"] = blas
    if _has_onednn(kind.dtype):
        fused = torch.ops.mkldnn._linear_pointwise
        up_o, down_o = up, down
        if kind.weights == "laid out":
            up_o, down_o = (torch.ops.mkldnn._reorder_linear_weight(weight) for weight in (up, down))
        calls["onednn"] = lambda: fused.binary(fused(x, up_o, up_bias, "gelu", [], "none"), x, down_o, down_bias, "add")
    if kind.weights == "laid out" and isinstance(machine, Machine) and kind.dtype in machine.dtypes:
        from fastbert.cpu.linear import linear
        from fastbert.cpu.program import Program

        between, out = room((rows, wide), kind.dtype), room((rows, narrow), kind.dtype)
        up_b, down_b = (in_blocks(weight, machine.vectors.columns) for weight in (up, down))
        calls["own"] = Program(
            [
                linear(machine, x, up_b, up_bias, between, activation="gelu"),
                linear(machine, between, down_b, down_bias, out, residual=x),
            ]
        ).run
    return calls
