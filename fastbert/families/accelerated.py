"""`fastbert.accelerate(model)`: transformers' models computed by fastbert, in place, and `restore`, the way back.

An encoder's `forward` is another function; all else of a model stays what and where it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from fastbert.errors import ArgumentError, FastbertError
from fastbert.families import FAMILIES
from fastbert.families.forward import MARK, AnyForward, Forward, InPlace, TorchForward, attach, detach
from fastbert.families.names import Family
from fastbert.families.whole import ModelForward

Model = TypeVar("Model", bound=nn.Module)

# By the names of the classes that they compute.
ENCODERS = {name: family for family in FAMILIES.values() for name in family.encoders}
MODELS = {name: family for family in FAMILIES.values() for name in family.models}

# Where random inputs end, of three sequences; a batch with much padding, and a sequence of one token.
LENGTHS = (17, 9, 1)


@dataclass(frozen=True)
class Difference:
    """How far two ways to one result are apart.

    Attributes:
        name: "ENCODER: output", or "ENCODER: PARAMETER" for its gradient.
        difference: largest, between the accelerated model and the model's own code.
        rounding: largest error of the model's own code, against the same in float64.
    """

    name: str
    difference: float
    rounding: float


def accelerate(model: Model, *, strict: bool = False) -> Model:
    """Let fastbert compute the encoders in `model`, in place.

    Parameters and modules stay the same objects under the same names, so `state_dict`, `save_pretrained`, optimizers,
    adapters and hooks go on working. Dropout draws its own masks.

    Args:
        model: a transformers model of BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, ALBERT, MPNet,
            ModernBERT, or DeBERTa v2 and v3, with any head; or any module with such a model in it, as those of
            sentence-transformers, or with a `torch.nn.TransformerEncoder`.
        strict: raise BackendError where a call asks for what is not served. Otherwise the model's own code runs, and a
            warning says so once for each reason.

    Returns:
        `model` itself.

    Raises:
        ArgumentError: there is no such encoder in it, or it asks for what fastbert does not compute (a decoder, an
            activation); nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", f"a {type(model).__name__}", "a torch.nn.Module")
    made: list[tuple[nn.Module, InPlace]] = []
    strange: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        kind = Family.class_name(module)
        encodes, whole = ENCODERS.get(kind), MODELS.get(kind)
        of_torch = type(module) is nn.TransformerEncoder
        if encodes is None and whole is None and not of_torch:
            continue
        argument = f"model.{name}" if name else "model"
        if "forward" in module.__dict__ and MARK not in module.__dict__:
            raise ArgumentError(argument, "a forward that was replaced", "the encoder's own")
        if of_torch:
            with refused(argument):
                made.append((module, TorchForward(module, strict=strict)))
        if encodes is not None:
            with refused(argument):
                made.append((module, Forward(module, encodes, strict=strict)))
        if whole is not None:
            inner = module._modules.get(whole.within) if whole.within else module
            if whole.within and ENCODERS.get(Family.class_name(inner)) is not whole:  # which may hold one of ours
                strange.append((argument, f"{type(module).__name__} whose {whole.within} is a {type(inner).__name__}"))
                continue
            with refused(argument):
                made.append((module, ModelForward(module, whole, strict=strict)))
    if not made and strange:
        raise ArgumentError(*strange[0], "one that is as transformers made it")
    if not made:
        known = ", ".join(sorted(name.rpartition(".")[2] for name in (*{**ENCODERS, **MODELS}, "TransformerEncoder")))
        raise ArgumentError("model", type(model).__name__, f"a model with one of these in it: {known}")
    for module, forward in made:
        attach(module, forward)
    return model


@contextmanager
def refused(argument: str) -> Iterator[None]:
    """Raise ArgumentError, which names the encoder, where it can't be read."""
    try:
        yield
    except (FastbertError, AttributeError) as error:
        raise ArgumentError(argument, str(error), "an encoder that fastbert computes") from error


def restore(model: Model) -> Model:
    """Take back what `accelerate` did; gives `model` itself.

    A function that was wrapped around an encoder's `forward` since stays, and calls the model's own code.

    Raises:
        ArgumentError: it is no module.
    """
    for module, forward in list(accelerated(model)):
        if not detach(module, forward):
            forward.on = False
    return model


def accelerated(model: nn.Module) -> Iterator[tuple[nn.Module, InPlace]]:
    """The encoders and whole models in `model` that `accelerate` found, and what computes each."""
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", f"a {type(model).__name__}", "a torch.nn.Module")
    for module in model.modules():
        if (forward := module.__dict__.get(MARK)) is not None:
            yield module, forward


def verify(model: nn.Module) -> list[Difference]:
    """Run random masked inputs through each accelerated encoder and through its own code, forward and gradient.

    In eval mode, in the dtype of its parameters, which are not changed; their `grad` is left alone.

    Returns:
        The output's difference, and that of each parameter's gradient.

    Raises:
        ArgumentError: `model` has no accelerated encoder.
        BackendError: its own code would run, as it is; the error says why.
    """
    found: list[Difference] = []
    generator = torch.Generator().manual_seed(0)
    for module, forward in accelerated(model):
        encoder = forward.encoder if isinstance(forward, ModelForward) else cast("AnyForward", forward)
        if encoder is None:  # another came into its place
            continue
        name = type(module).__name__
        if encoder.ours.in_eight_bits() is not None:
            raise ArgumentError("model", "a quantized model", "the model that it was made of")
        own = copy.deepcopy(module).eval()
        for part, made in list(accelerated(own)):
            detach(part, made)
            part.__dict__.pop("forward", None)  # with what was wrapped around it
        exact = copy.deepcopy(own).double()
        fast = copy.deepcopy(own)
        accelerate(fast, strict=True)
        like = next(own.parameters())
        batch, seqlen, width = len(LENGTHS), max(LENGTHS), encoder.ours.config.hidden_size
        taken = forward.width()
        drawn = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for shape in ((batch, seqlen, taken), (batch, seqlen, width))
        )
        x, dout = (numbers.to(like) for numbers in drawn)
        kept = torch.arange(seqlen, device="cpu") < torch.tensor(LENGTHS, dtype=torch.int64, device="cpu")[:, None]
        kept = kept.to(like.device)
        dout *= kept[..., None]
        x *= kept[..., None]  # as embeddings are where their neighbours see it, in DeBERTa's convolution
        results = [_results(forward, one, x, kept, dout) for one in (fast, own, exact)]
        for key in results[0]:
            got, plain, wanted = (result[key].double() for result in results)
            rounding, difference = (float((x - y).abs().max()) for x, y in ((plain, wanted), (got, plain)))
            found.append(Difference(f"{name}: {key}", difference, rounding))
    if not found:
        raise ArgumentError("model", type(model).__name__, "a model that was given to fastbert.accelerate")
    return found


def _results(forward: InPlace, encoder: nn.Module, x: Tensor, kept: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """The output where it is no padding, and the gradient of each parameter."""
    dtype = next(encoder.parameters()).dtype
    encoder.requires_grad_(True)
    out = forward.answer(encoder, x.to(dtype), kept)
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, parameters, dout.to(dtype), allow_unused=True)
    given = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
    return {"output": out.detach()[kept], **given}
