"""`fastbert.accelerate(model)`: transformers' models computed by fastbert, in place, and `restore`, the way back.

An encoder's `forward` is another function; all else of a model stays what and where it is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastbert.errors import ArgumentError, BackendError, FastbertError
from fastbert.families.albert import ALBERT
from fastbert.families.bert import BERT
from fastbert.families.distilbert import DISTILBERT
from fastbert.families.foreign import ForeignEncoder
from fastbert.families.names import Family
from fastbert.model.outputs import collected_by_transformers, refuse_what_asks
from fastbert.ops.watch import hooks_of

Model = TypeVar("Model", bound=nn.Module)

FAMILIES = {name: family for family in (BERT, DISTILBERT, ALBERT) for name in family.encoders}

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


class Forward:
    """What stands in the place of an encoder's `forward`."""

    def __init__(self, theirs: nn.Module, family: Family, *, strict: bool) -> None:
        self.theirs, self.family, self.strict = theirs, family, strict
        layers = family.layers(theirs)
        self.ours = ForeignEncoder(theirs, layers, family.names, family.config(theirs))
        self.said: set[str] = set()
        below = [module for layer in layers for module in layer.modules()]
        # of modules that are never called by us: groups of others
        self.silent = [module for module in below if next(module.children(), None) is not None]

    def __call__(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The encoder's own arguments and result."""
        reason = self._unserved(hidden_states, args, kwargs)
        if reason is not None:
            self._say(reason)
            return type(self.theirs).forward(self.theirs, hidden_states, attention_mask, *args, **kwargs)
        if self.family.entry is not None:
            hidden_states = self.theirs.get_submodule(self.family.entry)(hidden_states)
        self.ours.follow()
        asked = {name: kwargs.get(name) for name in ("output_hidden_states", "return_dict")}
        out: Any = self.ours(hidden_states, attention_mask, output_hidden_states=asked["output_hidden_states"])
        if asked["return_dict"] is False:
            return out.to_tuple()
        from transformers import modeling_outputs

        return getattr(modeling_outputs, self.family.output)(
            last_hidden_state=out.last_hidden_state, hidden_states=out.hidden_states
        )

    def _unserved(self, hidden_states: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the model's own code has to run; None where it has not."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return "it is recorded for other batches"
        if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 3 or hidden_states.device.type == "meta":
            return "hidden states that are not [batch, seqlen, hidden]"
        if any(value is not None for value in args) or "attentions" in collected_by_transformers():
            return "attention weights or cross-attention are asked for"
        known = {"output_hidden_states", "return_dict"}
        try:
            refuse_what_asks({name: value for name, value in kwargs.items() if name not in known}, "fastbert")
        except ArgumentError as error:
            return f"{error.argument} is asked for"
        if any(map(_is_hooked, self.silent)):
            return "a hook on a module that is never called by itself: put it on the model, a linear layer or a norm"
        if any("forward" in module.__dict__ for module in self.silent):
            return "a layer whose forward was replaced"
        return None

    def _say(self, reason: str) -> None:
        name = type(self.theirs).__name__
        if self.strict:
            raise BackendError(name, reason, "a call that fastbert serves", "Or accelerate without strict=True.")
        if reason not in self.said and not torch.compiler.is_compiling():
            self.said.add(reason)
            warnings.warn(f"{name} runs its own code, not fastbert's: {reason}", stacklevel=3)


def accelerate(model: Model, *, strict: bool = False) -> Model:
    """Let fastbert compute the encoders in `model`, in place.

    Parameters and modules stay the same objects under the same names, so `state_dict`, `save_pretrained`, optimizers,
    adapters and hooks go on working. Dropout draws its own masks.

    Args:
        model: a transformers model of BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT or ALBERT, with any
            head; or any module with such a model in it, as those of sentence-transformers.
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
    made: list[tuple[nn.Module, Forward]] = []
    for name, module in model.named_modules():
        if (family := FAMILIES.get(_class_name(module))) is not None:
            try:
                made.append((module, Forward(module, family, strict=strict)))
            except FastbertError as error:
                argument = f"model.{name}" if name else "model"
                raise ArgumentError(argument, str(error), "an encoder that fastbert computes") from error
    if not made:
        known = ", ".join(sorted(name.rpartition(".")[2] for name in FAMILIES))
        raise ArgumentError("model", type(model).__name__, f"a model with one of these in it: {known}")
    for module, forward in made:
        module.forward = forward
    return model


def restore(model: Model) -> Model:
    """Take back what `accelerate` did; gives `model` itself."""
    for module, _ in accelerated(model):
        del module.__dict__["forward"]
    return model


def accelerated(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """The encoders in `model` that `accelerate` found, and what computes each."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Forward):
            yield module, forward


def verify(model: nn.Module) -> list[Difference]:
    """Run random masked inputs through each accelerated encoder and through its own code, forward and gradient.

    In eval mode, in the dtype of its parameters, which are not changed; their `grad` is left alone.

    Returns:
        The output's difference, and that of each parameter's gradient.

    Raises:
        ArgumentError: `model` has no accelerated encoder.
    """
    found: list[Difference] = []
    for module, forward in accelerated(model):
        name, config = type(module).__name__, forward.ours.config
        own = copy.deepcopy(module).eval()
        del own.__dict__["forward"]
        exact = copy.deepcopy(own).double()
        fast = copy.deepcopy(own)
        accelerate(fast, strict=True)
        like = next(own.parameters())
        entry = None if forward.family.entry is None else module.get_submodule(forward.family.entry)
        width = config.hidden_size if entry is None else int(getattr(entry, "in_features", config.hidden_size))
        x = torch.randn((len(LENGTHS), max(LENGTHS), width), dtype=like.dtype, device=like.device)
        kept = torch.arange(max(LENGTHS), device=like.device) < torch.tensor(LENGTHS, device=like.device)[:, None]
        dout = torch.randn((*x.shape[:2], config.hidden_size), dtype=like.dtype, device=like.device) * kept[..., None]
        results = [_results(one, x, kept, dout) for one in (fast, own, exact)]
        for key in results[0]:
            got, plain, wanted = (result[key].double() for result in results)
            rounding, difference = (float((x - y).abs().max()) for x, y in ((plain, wanted), (got, plain)))
            found.append(Difference(f"{name}: {key}", difference, rounding))
    if not found:
        raise ArgumentError("model", type(model).__name__, "a model that was given to fastbert.accelerate")
    return found


def _results(encoder: nn.Module, x: Tensor, kept: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """The output where it is no padding, and the gradient of each parameter."""
    dtype = next(encoder.parameters()).dtype
    encoder.requires_grad_(True)
    mask = torch.zeros(kept.shape, dtype=dtype, device=x.device).masked_fill(~kept, torch.finfo(dtype).min)
    out = encoder(x.to(dtype), attention_mask=mask[:, None, None]).last_hidden_state
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, parameters, dout.to(dtype), allow_unused=True)
    given = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
    return {"output": out.detach()[kept], **given}


def _is_hooked(module: nn.Module) -> bool:
    """By others than transformers, which gathers hidden states so, and is told them by us."""
    return any(
        not (getattr(hook, "__module__", None) or "").startswith("transformers.")
        for hooks in hooks_of(module)
        for hook in hooks.values()
    )


def _class_name(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}".removeprefix("transformers.models.")
