"""`fastbert.quantize`: a model whose encoders multiply in 8 bits, for inference: fp8 on a GPU, int8 on a CPU.

In fp8 a layer's four products take e4m3 on both sides: weights with a scale for each output channel, activations with a
scale for each token. LayerNorm and GELU write their results quantized. Attention's output is quantized by a kernel of
its own, because a token's scale spans the heads, and a program of attention owns one head.

In int8 weights have a scale for each output channel, activations a scale and a zero point for each token; sums are
exact, in int32. A product and all that follows it, to the next one's int8, is one kernel.

Residuals, LayerNorm, attention and the heads of a model compute as before.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args

from torch import Tensor, nn

from fastbert.backend import int8_unserved
from fastbert.config import EncoderConfig
from fastbert.cpu.int8 import Int8Matrix
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.families.accelerated import refused
from fastbert.families.forward import MARK, AnyForward
from fastbert.families.whole import ModelForward
from fastbert.model.encoder import Encoder
from fastbert.model.layer import Layer
from fastbert.run.eight_bits import EightBitLinear, Fp8Linear, Int8Linear
from fastbert.run.parts import weights

QuantizedDType = Literal["fp8", "int8"]
Model = TypeVar("Model", bound=nn.Module)

KINDS: dict[QuantizedDType, type[EightBitLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear}
HAS_ENCODER = "a module with a fastbert.Encoder in it, or one that was given to fastbert.accelerate"

# Methods by which models of transformers and sentence-transformers write files that one in floats is read from.
SAVES = ("save", "save_pretrained", "push_to_hub")


def quantize(model: Model, *, dtype: QuantizedDType | None = None) -> Model:
    """A copy of `model`, for inference, whose encoders multiply in 8 bits; the memory of all but matrices is shared.

    It is in eval mode. Its parameters are objects of its own that require no gradient: a move or a cast of it leaves
    `model` as it is.

    Args:
        model: any module with a `fastbert.Encoder` in it, or that was given to `fastbert.accelerate`; encoders in eval
            mode.
        dtype: "int8" runs on a CPU, by kernels where it has AVX2 or AVX-512, fastest with VNNI; elsewhere it is slower
            than float32, with a warning. float32 rounds the least beside it.
            "fp8", for e4m3, runs on NVIDIA GPUs from sm_89 on, in bfloat16; on a CPU it computes the same numbers
            slowly, to test accuracy. By default what the device of the model runs fast: int8 on a CPU, else fp8.

    Raises:
        ArgumentError: `dtype` is not known; or `model` has no encoder, or one that is in training mode, that others
            changed, or whose widths are not multiples of 16 (fp8).
        BackendError: the device can't, or the model is not in bfloat16 (fp8 on a GPU); also later, where the copy was
            moved to one that can't, or a gradient is asked for.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", f"a {type(model).__name__}", HAS_ENCODER)
    if dtype is None:
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        dtype = "int8" if on_cpu else "fp8"
    if dtype not in get_args(QuantizedDType):
        raise ArgumentError("dtype", repr(dtype), "'fp8' or 'int8'")
    kind = KINDS[dtype]
    return _replaced(model, kind, lambda linear: kind.of(*weights(linear)))


def with_scales(model: Model, scales: Mapping[str, Tensor]) -> Model:
    """`quantize` to int8 of weights that are whole numbers times known scales; the whole numbers stay what they are.

    Args:
        model: in eval mode.
        scales: of each weight that the layers of its encoder multiply by, by its name: float32 `[out]`.

    Raises:
        ArgumentError: a weight has none; else as `quantize`.
        BackendError: as `quantize`.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def make(linear: nn.Module) -> EightBitLinear:
        weight, bias = weights(linear)
        scale = scales.get(names[id(weight)])
        if scale is None:
            raise ArgumentError("scales", f"none for {names[id(weight)]}", "one for each weight of the layers")
        return Int8Linear(Int8Matrix.of(weight, scale), weight.shape[1], bias)

    return _replaced(model, Int8Linear, make)


def _replaced(model: Model, kind: type[EightBitLinear], make: Callable[[nn.Module], EightBitLinear]) -> Model:
    """A copy of a model, with what `make` gives in the places of what its encoders multiply by."""
    if kind is Int8Linear and (slow := int8_unserved(next(model.parameters()).device)) is not None:
        warnings.warn(f"int8 is slower than float32 here: {slow}", stacklevel=3)
    encoders = {name: encoder for name, encoder in _encoders(model) if encoder.in_eight_bits() is None}
    if not encoders:
        raise ArgumentError("model", type(model).__name__, HAS_ENCODER)
    copies: dict[int, Any] = {id(parameter): _shared(parameter) for parameter in model.parameters()}
    copies |= {id(x): x.detach() for module in model.modules() for x in vars(module).values() if _is_made(x)}
    for name, encoder in encoders.items():
        _check(name or "model", encoder, kind)
        for layer in dict.fromkeys(cast("list[Layer]", list(encoder.layer))):
            for module, quantized in layer.quantized(make):
                copies[id(module)] = quantized
    made = copy.deepcopy(model, copies)
    for name in encoders:
        _keep_from_harm(made, name)
    for _, forward in _forwards(made):
        forward.build()  # nothing of the matrices of before
    return made.eval()


def in_int8(encoder: Encoder) -> bool:
    """Whether `quantize` made it, for int8."""
    return isinstance(encoder.in_eight_bits(), Int8Linear)


def _encoders(model: nn.Module) -> Iterator[tuple[str, Encoder]]:
    """What computes the encoders in a model, by the names of these."""
    for name, module in model.named_modules():
        if type(module) is Encoder:
            yield name, module
    for name, forward in _forwards(model):
        if not forward.tree.same():
            with refused(name or "model"):
                forward.build()
        if (reason := forward.changed()) is not None:
            raise ArgumentError(name or "model", reason, "an encoder that fastbert computes")
        forward.ours.follow()
        yield name, forward.ours


def _forwards(model: nn.Module) -> Iterator[tuple[str, AnyForward]]:
    """What `accelerate` put in the place of the `forward` of encoders, by the names of these."""
    for name, module in model.named_modules():
        forward = module.__dict__.get(MARK)
        forward = forward.itself if isinstance(forward, ModelForward) else forward
        if isinstance(forward, AnyForward):
            yield name, forward


def _shared(parameter: nn.Parameter) -> nn.Parameter:
    """Another one of the same memory; those of other classes, and of inference mode, stay as they are."""
    if type(parameter) is not nn.Parameter or parameter.is_inference():
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _is_made(x: Any) -> bool:
    """Whether it is what a pass with a gradient left in a module, which torch copies nowhere."""
    return isinstance(x, Tensor) and not x.is_leaf


def _check(name: str, encoder: Encoder, kind: type[EightBitLinear]) -> None:
    """Raise ArgumentError or BackendError where an encoder can't be quantized."""
    if encoder.training:
        raise ArgumentError(name, "an encoder in training mode", "one in eval mode", "Call model.eval() first.")
    if kind is Fp8Linear:
        _check_config(encoder.config)
    for parameter in encoder.parameters():
        kind.check_device(parameter)
    if encoder.is_frozen():
        raise ArgumentError(name, "a frozen model", "one that was loaded without frozen=True")
    if not encoder.is_plain():
        got = "modules other than nn.Linear and nn.LayerNorm, or with hooks, or dropout that is on"
        raise ArgumentError(name, got, "plain ones", "Merge adapters, and remove hooks, first.")


def _check_config(config: EncoderConfig) -> None:
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(config, name)
        if width % 16:
            raise ArgumentError(name, width, "a multiple of 16, which products in fp8 need")


def _keep_from_harm(model: nn.Module, encoder: str) -> None:
    """Let an encoder and the modules above it refuse training before any of them is changed, and files before any is
    written: a model in floats would take weights that it does not find in them for new ones.
    """
    names = encoder.split(".") if encoder else []
    for module in {model, *(model.get_submodule(".".join(names[: i + 1])) for i in range(len(names)))}:
        module.__dict__["train"] = partial(_train, module)
        for name in SAVES if hasattr(type(module), "save_pretrained") else ():
            if hasattr(type(module), name):
                module.__dict__[name] = refuse_to_save


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise ArgumentError("mode", mode, "False", "A quantized model can't be trained.")
    return type(module).train(module, mode)


def refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise CheckpointError, whatever it is given."""
    mend = "fastbert.convert writes a folder in int8; torch.save keeps its state_dict(), for another quantized one."
    raise CheckpointError("model", "a quantized model", "the model that it was made of", mend)
