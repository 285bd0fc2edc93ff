"""Each executor on each plan of a layer: forward and backward against the steps in float64, or a reason why not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbert import backend
from fastbert.config import Convolution, Disentangled, EncoderConfig
from fastbert.cpu.machine import Machine, host
from fastbert.errors import ArgumentError
from fastbert.kernels.target import interpreted
from fastbert.ops import common
from fastbert.packing import Packing
from fastbert.run import cpu, eager, onednn, prepared
from fastbert.run.eager import Registers
from fastbert.run.eight_bits import Fp8Linear, Int8Linear
from fastbert.run.parts import weights
from fastbert.run.steps import PROJECTIONS, Attend, Convolve, Product, Steps, layer_steps, readers
from fastbert.testing import assert_close, exactly

HIDDEN, HEADS, WIDE = 48, 3, 80
CONFIG = EncoderConfig(hidden_size=HIDDEN, num_heads=HEADS, intermediate_size=WIDE)
BERT = layer_steps(CONFIG)


def changed(i: int, **changes: Any) -> Steps:
    """BERT's steps with another step `i`."""
    return Steps((*BERT.of[:i], replace(BERT.of[i], **changes), *BERT.of[i + 1 :]))


def pre_norm(
    activation: Any = "gelu", *, gated: bool = False, rotary: float | None = None, window: int | None = None
) -> Steps:
    """A layer that normalises first: its residual is the sum before a LayerNorm. The last one is the next layer's."""
    return Steps(
        (
            Product("x", "qkv", into="qkv"),
            Attend("qkv", into="context", heads=HEADS, window=window, rotary=rotary),
            Product("context", "attention_output", into="x", add="sum", norm="attention_norm", sum="sum"),
            Product("x", "intermediate", into="wide", activation=activation, gated=gated),
            Product("wide", "output", into="x", add="sum", norm="output_norm", sum="sum"),
        )
    )


PLANS = {
    "post-norm": BERT,
    "tanh": changed(3, activation="gelu_tanh"),
    "relu": changed(3, activation="relu"),
    "pre-norm": pre_norm(),
    "gated": changed(3, gated=True),
    "gated silu, pre-norm": pre_norm("silu", gated=True),
    "without biases": BERT,
    "window": changed(1, window=3),
    "ALiBi": changed(1, alibi=(0.5, 0.25, 0.125)),
    "rotary": changed(1, rotary=10_000.0, rotary_scale=0.8),
    "rotary, gated, pre-norm": pre_norm("gelu", gated=True, rotary=500.0),
    "ModernBERT's, gated, without any bias": pre_norm("gelu", gated=True, rotary=500.0, window=4),
    "ALiBi, gated": Steps((BERT.of[0], replace(BERT.of[1], alibi=(0.5, 0.25, 0.125)), *changed(3, gated=True).of[2:])),
    "bias": BERT,
    "shared layers": BERT,
    "disentangled": changed(1, disentangled=Disentangled(("p2c", "c2p"), 10, buckets=6, normalised=True)),
    "disentangled, one term, gated": Steps(
        (
            BERT.of[0],
            replace(BERT.of[1], disentangled=Disentangled(("c2p",), 4)),
            *changed(3, gated=True).of[2:],
        )
    ),
}
PLANS |= {
    plan: layer_steps(replace(CONFIG, convolution=convolution))
    for plan, convolution in {
        "convolution": Convolution(3),
        "convolution of groups": Convolution(5, groups=4, activation="gelu"),
    }.items()
}
GATED = {plan for plan in PLANS if "gated" in plan}
DISENTANGLED = {plan for plan in PLANS if "disentangled" in plan}
CONVOLVED = {plan for plan in PLANS if "convolution" in plan}
PLACED = {"window", "ALiBi", "rotary", *DISENTANGLED}
# Of an executor the plans that it does not serve; it says why.
UNSERVED = {
    "eager": set[str](),
    "prepared": {"pre-norm", *GATED, *PLACED, *CONVOLVED},
    "cpu": CONVOLVED,
    "onednn": {*GATED, *CONVOLVED},
}
LENGTHS = [7, 1, 0, 17]


def parts_of(plan: str, generator: torch.Generator) -> dict[str, nn.Module]:
    bias, gates = plan != "without biases" and "without any bias" not in plan, 2 if "gated" in plan else 1
    norm_bias = "without any bias" not in plan
    parts: dict[str, nn.Module] = {
        "qkv": nn.Linear(HIDDEN, 3 * HIDDEN, bias=bias),
        "attention_output": nn.Linear(HIDDEN, HIDDEN, bias=bias),
        "attention_norm": nn.LayerNorm(HIDDEN, eps=1e-5, bias=norm_bias),
        "intermediate": nn.Linear(HIDDEN, gates * WIDE, bias=bias),
        "output": nn.Linear(WIDE, HIDDEN, bias=bias),
        "output_norm": nn.LayerNorm(HIDDEN, eps=1e-12, bias=norm_bias),
    }
    asked = next(step.disentangled for step in PLANS[plan].of if isinstance(step, Attend))
    if asked is not None:
        parts["relative"] = nn.Embedding(2 * asked.span, HIDDEN)
        parts |= {"relative_norm": nn.LayerNorm(HIDDEN, eps=1e-7)} if asked.normalised else {}
        parts |= {PROJECTIONS[term]: nn.Linear(HIDDEN, HIDDEN) for term in asked.terms}
    for step in PLANS[plan].of:
        if isinstance(step, Convolve):
            width, groups = (3, 1) if plan == "convolution" else (5, 4)
            parts[step.part] = nn.Conv1d(HIDDEN, HIDDEN, width, padding=width // 2, groups=groups)
            parts[step.norm] = nn.LayerNorm(HIDDEN, eps=1e-7)
    for part in parts.values():
        for parameter in part.parameters():
            scale = 0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return parts


@contextmanager
def way(path: str) -> Iterator[None]:
    """The path of ops; interpreted kernels where it is Triton's."""
    with backend.use_backend(path) if path != "native" else nullcontext():
        yield


class Case:
    """A plan's layers, random numbers of its registers, and what the judge says of them."""

    def __init__(self, plan: str, generator: torch.Generator) -> None:
        self.steps, self.packing = PLANS[plan], Packing.from_lengths(LENGTHS)
        first = parts_of(plan, generator)
        self.layers = [first, first if plan == "shared layers" else parts_of(plan, generator)]
        rows = self.packing.tokens
        self.bias = torch.randn(len(LENGTHS), HEADS, 17, 17, generator=generator) if plan == "bias" else None
        self.registers = {
            name: torch.randn(rows, HIDDEN, generator=generator).requires_grad_() for name in self.steps.carried
        }
        self.dout = torch.randn(rows, HIDDEN, generator=generator)

    def judged(self, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        """The output and the gradients, computed by the reference in `dtype`; see `results`."""
        held = {name: x.to(dtype) for name, x in self.registers.items()}
        bias = None if self.bias is None else self.bias.to(dtype)
        for parts in self.layers:
            held = exactly(self.steps, parts, held, self.packing, bias)
        return self.results(held["x"], scale)

    def plain(self, exact: list[Tensor]) -> list[Tensor]:
        """What plain torch makes of it in float32; of some roundings of a gradient the worst, as a few numbers that
        happen to be rounded well say nothing of how well they usually are.
        """
        tries = zip(*(self.judged(torch.float32, scale) for scale in (1.0, 0.7, 1.3, 1.9)), strict=True)
        return [max(some, key=lambda x: (x - wanted).abs().max()) for some, wanted in zip(tries, exact, strict=True)]

    def results(self, out: Tensor, scale: float = 1.0) -> list[Tensor]:
        """The output, and without no_grad the gradient of each register and parameter, by way of `scale` times it."""
        if not out.requires_grad:
            return [out]
        given = [
            *self.registers.values(),
            *(p for parts in self.layers for part in parts.values() for p in part.parameters()),
        ]
        unique = list({id(x): x for x in given}.values())
        grads = torch.autograd.grad(out, unique, scale * self.dout.to(out.dtype))
        return [out, *(grad / scale for grad in grads)]

    def run(self, take: Any) -> Tensor:
        registers = Registers(dict(self.registers))
        for parts in self.layers:
            take(parts, registers)
        return registers.floats["x"]


@pytest.mark.parametrize("path", ["torch", pytest.param("native", marks=pytest.mark.cpu), "triton"])
@pytest.mark.parametrize("plan", PLANS)
def test_eager(plan: str, path: str, generator: torch.Generator) -> None:
    if path == "triton" and not interpreted():
        pytest.skip("the kernels need Triton's interpreter here")
    case = Case(plan, generator)
    with way(path):
        got = case.results(
            case.run(lambda parts, registers: eager.run(case.steps, parts, registers, case.packing, bias=case.bias))
        )
    exact = [x.double() for x in case.judged(torch.float64)]
    for ours, plain, wanted in zip(got, case.plain(exact), exact, strict=True):
        assert_close(ours, plain, wanted, factor=3.0, what=plan)


@pytest.mark.parametrize("plan", PLANS)
def test_rows_that_are_read(plan: str, generator: torch.Generator) -> None:
    case, read = Case(plan, generator), torch.tensor([0, 7, 24])
    whole = case.run(lambda parts, registers: eager.run(case.steps, parts, registers, case.packing, bias=case.bias))
    first, last = case.layers
    registers = Registers(dict(case.registers))
    eager.run(case.steps, first, registers, case.packing, bias=case.bias)
    some = eager.run(case.steps, last, registers, case.packing, bias=case.bias, read=read)
    torch.testing.assert_close(some, whole[read])


@pytest.mark.parametrize("plan", PLANS)
def test_prepared(plan: str, generator: torch.Generator) -> None:
    if not interpreted():
        pytest.skip("the kernels need Triton's interpreter here")
    case = Case(plan, generator)
    with backend.use_backend("triton"), torch.no_grad():
        if plan in UNSERVED["prepared"]:
            assert prepared.unserved(case.steps, case.layers[0])
            assert not prepared.run(case.steps, case.layers[0], Registers(dict(case.registers)), case.packing)
            return
        if case.bias is not None:
            pytest.skip("a layer with a bias is not asked to be prepared")
        taken: list[bool] = []
        out = case.run(lambda parts, registers: taken.append(prepared.run(case.steps, parts, registers, case.packing)))
    assert taken == [True, True]
    assert_close(out, case.judged(torch.float32)[0], case.judged(torch.float64)[0], factor=3.0)


@pytest.mark.cpu
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("read", [None, [0, 7, 24]], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_cpu(
    plan: str, read: list[int] | None, form: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also slack, which is poisoned; a CPU that does not multiply what is asked for plays one that does."""
    machine = host()
    if not isinstance(machine, Machine):
        pytest.skip(f"{machine}: Linux on x86-64 with AVX2 runs this")
    if form != "float32" and getattr(machine, form) is None:
        from emulated import WIDE

        monkeypatch.setattr(common, "host", lambda: WIDE)
    case = Case(plan, generator)
    if case.bias is not None:
        pytest.skip("layers with a bias are not asked to be run so")
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    for parts in case.layers:
        for part in parts.values():
            part.to(dtype)
    layers = [(case.steps, in_8_bits(parts, Int8Linear) if form == "int8" else parts) for parts in case.layers]
    case.registers = {name: x.detach().to(dtype) for name, x in case.registers.items()}
    x, slack = case.registers["x"], torch.full((3, HIDDEN), torch.nan, dtype=dtype)
    with torch.no_grad(), backend.use_backend("native"):
        if plan in UNSERVED["cpu"]:
            assert "a convolution" in str(cpu.unserved(layers, x))
            return
        assert cpu.unserved(layers, x) is None
        made = cpu.lay_out(layers, x)
        assert made is not None
        rows = torch.arange(len(x)) if read is None else torch.tensor(read)
        exact, plain = (case.judged(to)[0][rows] for to in (torch.float64, dtype))
        loose = {name: torch.cat([held, slack]) for name, held in case.registers.items()}
        for registers in (case.registers, case.registers, loose):
            got = made.run(registers, case.packing, None if read is None else rows)[: len(rows)]
            if form == "int8":
                assert torch.nn.functional.cosine_similarity(got.double(), exact).min() > 0.99
            else:
                assert_close(got, plain, exact, factor=3.0)


@pytest.mark.cpu
def test_what_the_kernels_of_a_cpu_leave_to_others(generator: torch.Generator) -> None:
    """It is said why, and `eager` says what is wrong."""
    if not isinstance(host(), Machine):
        pytest.skip("no kernels here: Linux on x86-64 with AVX2 runs this")
    parts, x = parts_of("post-norm", generator), torch.randn(25, HIDDEN, generator=generator)
    packing = Packing.from_lengths(LENGTHS)
    odd = {"attention_output": nn.Linear(HIDDEN, HIDDEN), "qkv": nn.Linear(HIDDEN, 3 * 9)}
    wide = {"intermediate": nn.Linear(HIDDEN, WIDE + 1)}
    with torch.no_grad(), backend.use_backend("native"):
        for changes, other, reason in (
            ({"window": -1}, {}, "window"),
            ({"rotary": 10_000.0}, odd, "odd width"),
        ):
            layers = [(changed(1, **changes), parts | other)]
            assert reason in str(cpu.unserved(layers, x))
            with pytest.raises(ArgumentError):
                eager.run(*layers[0], Registers({"x": x}), packing)
        assert "half" in str(cpu.unserved([(changed(3, gated=True), parts | wide)], x))
        hooked = parts_of("disentangled", generator)
        for name in ("position_key", "position_query", "relative_norm"):
            handle = hooked[name].register_forward_hook(lambda *_: None)
            assert name in str(cpu.unserved([(PLANS["disentangled"], hooked)], x))
            handle.remove()
        assert cpu.unserved([(PLANS["disentangled"], hooked)], x) is None
        hooked["relative"].double()
        assert "table" in str(cpu.unserved([(PLANS["disentangled"], hooked)], x))
        made = cpu.lay_out([(changed(1, rotary=0.5), parts)], x)
        assert made is not None
        with pytest.raises(ArgumentError, match="base"):
            made.run({"x": x}, packing)


@pytest.mark.cpu
@pytest.mark.parametrize("plan", sorted(DISENTANGLED))
def test_longer_and_shorter_texts_in_turns(plan: str, generator: torch.Generator) -> None:
    """Of what is made for the positions of the longest so far, each takes its own."""
    if not isinstance(host(), Machine):
        pytest.skip("no kernels here: Linux on x86-64 with AVX2 runs this")
    case = Case(plan, generator)
    layers = [(case.steps, parts) for parts in case.layers]
    with torch.no_grad(), backend.use_backend("native"):
        made = cpu.lay_out(layers, case.registers["x"].detach())
        assert made is not None
        for lengths in ([7, 1, 0, 17], [70, 3], [300], [7, 1, 0, 17], [90, 80]):
            case.packing = Packing.from_lengths(lengths)
            case.registers = {
                name: torch.randn(sum(lengths), HIDDEN, generator=generator) for name in case.steps.carried
            }
            got = made.run(case.registers, case.packing)
            exact, plain = (case.judged(dtype)[0] for dtype in (torch.float64, torch.float32))
            assert_close(got, plain, exact, factor=3.0)


@pytest.mark.cpu
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("read", [None, [0, 7, 24]], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_onednn(plan: str, read: list[int] | None, generator: torch.Generator, choose: Any) -> None:
    choose("onednn")
    case = Case(plan, generator)
    layers = [(case.steps, parts) for parts in case.layers]
    with torch.no_grad():
        if plan in UNSERVED["onednn"]:
            assert onednn.unserved(layers, case.registers["x"])
            return
        if case.bias is not None:
            pytest.skip("layers with a bias are not asked to be run so")
        assert onednn.unserved(layers, case.registers["x"]) is None
        made, rows = onednn.OneDnnProgram(layers), torch.arange(25) if read is None else torch.tensor(read)
        for _ in range(2):
            got = made.run(case.registers, case.packing, None if read is None else rows)
            exact, plain = (case.judged(dtype)[0][rows] for dtype in (torch.float64, torch.float32))
            assert_close(got, plain, exact, factor=3.0)


@pytest.mark.parametrize("kind", [Fp8Linear, Int8Linear])
@pytest.mark.parametrize("plan", PLANS)
def test_eager_in_8_bits(plan: str, kind: Any, generator: torch.Generator) -> None:
    case = Case(plan, generator)
    wanted = case.judged(torch.float64)[0]
    case.layers = [in_8_bits(parts, kind) for parts in case.layers]
    with torch.no_grad():
        got = case.run(lambda parts, registers: eager.run(case.steps, parts, registers, case.packing, bias=case.bias))
    assert torch.nn.functional.cosine_similarity(got.double(), wanted).min() > 0.98


def in_8_bits(parts: dict[str, nn.Module], kind: Any) -> dict[str, nn.Module]:
    """All but norms, convolutions and what belongs to tables of distances."""
    kept = ("relative", "convolution", *PROJECTIONS.values())
    return {
        name: part if isinstance(part, nn.LayerNorm) or name in kept else kind.of(*weights(part))
        for name, part in parts.items()
    }


def test_who_reads_what() -> None:
    assert readers(BERT.of, 2) == (BERT.of[3], BERT.of[4])
    assert readers(BERT.of, 4) == (BERT.of[0], BERT.of[2])
    assert BERT.carried == ("x",) and pre_norm().carried == ("x", "sum")
    assert BERT.late == ("context", "x") and pre_norm().late == ("context", "sum")


def test_layers_alike_share_their_steps() -> None:
    assert layer_steps(CONFIG) is layer_steps(replace(CONFIG))
    assert layer_steps(CONFIG) != Steps(BERT.of), "another object"
    assert copy.deepcopy(BERT) is pickle.loads(pickle.dumps(BERT)) is BERT
