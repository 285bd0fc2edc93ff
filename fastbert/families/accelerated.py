"""`fastbert.accelerate(model)`: transformers' models computed by fastbert, in place, and `restore`, the way back.

An encoder's `forward` is another function; all else of a model stays what and where it is.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastbert.errors import ArgumentError, BackendError, FastbertError
from fastbert.families import FAMILIES
from fastbert.families.foreign import ForeignEncoder, ForeignLayer
from fastbert.families.names import Family
from fastbert.families.whole import ModelForward
from fastbert.model.outputs import collected_by_transformers, refuse_what_asks
from fastbert.ops.watch import Members
from fastbert.run.parts import is_hooked

Model = TypeVar("Model", bound=nn.Module)

# By the names of the classes that they compute.
ENCODERS = {name: family for family in FAMILIES.values() for name in family.encoders}
MODELS = {name: family for family in FAMILIES.values() for name in family.models}

# Whose hooks gather hidden states, which it is told by us.
TOLD = "transformers.utils.output_capturing"

# Whose functions a model is made of.
THEIRS = ("transformers.", "torch.")

# The attribute of an encoder that says what computes it, also where somebody wraps a function around its `forward`.
MARK = "_fastbert_forward"

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
    """What stands in the place of an encoder's `forward`.

    Attributes:
        on: False where it was taken back, and only a function that somebody wrapped around it still calls it.
    """

    on = True

    def __init__(self, theirs: nn.Module, family: Family, *, strict: bool) -> None:
        self.theirs, self.family, self.strict = theirs, family, strict
        self.said: set[str] = set()
        self._build()

    def _build(self) -> None:
        """Read their modules as they are now."""
        from transformers import modeling_outputs

        theirs, family = self.theirs, self.family
        self.output = getattr(modeling_outputs, family.output)
        asked = inspect.signature(type(theirs).forward).parameters.get("return_dict")
        self.return_dict = None if asked is None else asked.default
        states = inspect.signature(type(theirs).forward).parameters.get("output_hidden_states")
        self.output_hidden_states = None if states is None else states.default
        tree = _Tree(theirs)
        self.hf = family.hf(theirs)
        self.ours = ForeignEncoder(theirs, family)
        self.layers = [layer for layer in self.ours.layer if isinstance(layer, ForeignLayer)]
        computed = {id(part) for layer in self.layers for whole in layer.computed() for part in whole.modules()}
        called = [family.entry, *(["embeddings"] if not family.within else [])]
        entry = [part for path in filter(None, called) for part in theirs.get_submodule(path).modules()]
        apart = computed | {id(theirs), *map(id, entry)}
        self.silent = [module for module in theirs.modules() if id(module) not in apart]  # these are never called
        self.foreign = self._foreign()
        self.tree = tree  # last: where something above raises, the next call tries again

    def _foreign(self) -> str | None:
        """What in their modules is not as transformers has it; None where nothing is."""
        from transformers.activations import ACT2FN

        for kind in {type(module) for module in self.silent}:
            if not kind.__module__.startswith(("transformers.", "torch.nn.")):
                return f"a module of another class, {kind.__name__}"
        for kind in {type(module) for module in [self.theirs, *self.silent]}:
            methods = [value for value in vars(kind).values() if isinstance(value, FunctionType)]
            if not all(str(method.__module__).startswith(THEIRS) for method in methods):
                return f"the class {kind.__name__}, one of whose methods was replaced"
        for module in self.silent:
            kind = type(module)
            if any(callable(value) and hasattr(kind, name) for name, value in module.__dict__.items()):
                return f"a {kind.__name__} one of whose methods was replaced"
        names = ("hidden_act", "hidden_activation", "activation")
        asked = type(ACT2FN[next(getattr(self.hf, name) for name in names if hasattr(self.hf, name))])
        for layer in self.layers:
            if type(layer.theirs[0].get_submodule(self.family.names.activation)) is not asked:
                return "an activation other than the config's"
            scaling = getattr(layer.attention(), "scaling", None)
            if scaling is not None and abs(scaling - self.ours.config.head_dim**-0.5) > 1e-6:
                return "another scaling of attention's scores"
        return None

    def __call__(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The encoder's own arguments and result."""
        reason = None
        if self.on:
            padded = isinstance(hidden_states, Tensor) and hidden_states.dim() == 3 and hidden_states.numel() > 0
            asked = {name: kwargs[name] for name in kwargs if name not in ("output_hidden_states", "return_dict")}
            reason = self.unserved(hidden_states, asked, *args) if padded else "other than [batch, seqlen, hidden]"
            of_padding = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
            if reason is None and self.family.only_padding and not of_padding:
                reason = "an attention_mask that is not [batch, seqlen]"
        if reason is not None:
            self.say(reason)
        if reason is not None or not self.on:
            return type(self.theirs).forward(self.theirs, hidden_states, attention_mask, *args, **kwargs)
        hidden_states = self.entered(hidden_states)
        states = kwargs.get("output_hidden_states", self.output_hidden_states)
        out: Any = self.ours(hidden_states, attention_mask, output_hidden_states=states)
        if kwargs.get("return_dict", self.return_dict) is False:
            return out.to_tuple()
        return self.output(last_hidden_state=out.last_hidden_state, hidden_states=out.hidden_states)

    def entered(self, x: Tensor) -> Tensor:
        """What the first layer gets of what the encoder is given."""
        return x if self.family.entry is None else self.theirs.get_submodule(self.family.entry)(x)

    def unserved(self, inputs: Tensor, asked: dict[str, Any], *args: Any) -> str | None:
        """Why the model's own code has to run, given such inputs and further arguments; None where it has not."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return "it is recorded for other batches"
        if inputs.device.type == "meta":
            return "tensors without numbers"
        given = (*args, asked.get("output_attentions") or None)
        if any(value is not None for value in given) or "attentions" in collected_by_transformers():
            return "attention weights or cross-attention are asked for"
        try:
            refuse_what_asks(asked, "fastbert")
            if not torch.compiler.is_compiling() and not self.tree.same():  # a compiler has guards of its own
                self._build()
            self.ours.follow()
            if any(p >= 1.0 for layer in self.layers for p in layer.dropouts()):
                return "a dropout of everything"
            if any(layer.drops_otherwise() for layer in self.layers):
                return "a dropout that fastbert's layers have not"
        except FastbertError as error:
            return f"{error.argument}: {error.got}"
        except AttributeError as error:
            return f"a module that is gone: {error}"
        attention = getattr(self.hf, "_attn_implementation", None) or "eager"
        registered = ALL_ATTENTION_FUNCTIONS.get(attention)  # eager attention is not
        known_name = attention.startswith(("eager", "sdpa", "flex_attention", "flash_attention"))
        if not known_name or not (registered is None or registered.__module__.startswith(THEIRS)):
            return f"the attention implementation {attention!r}"
        if self.foreign is not None:
            return self.foreign
        if _global_hooks() or any(is_hooked(module, TOLD) for module in self.silent):
            return "a hook on a module that is never called by itself: put it on the model, a linear layer or a norm"
        return None

    def say(self, reason: str) -> None:
        """Say, once, why the model's own code runs; or raise BackendError, if it must not."""
        name = type(self.theirs).__name__
        if self.strict:
            raise BackendError(name, reason, "a call that fastbert serves", "Or accelerate without strict=True.")
        if reason not in self.said and not torch.compiler.is_compiling():
            self.said.add(reason)
            warnings.warn(f"{name} runs its own code, not fastbert's: {reason}", stacklevel=3)


class _Tree:
    """The modules below an encoder, their classes and how attention scales, when it was made."""

    def __init__(self, top: nn.Module) -> None:
        self.groups = [module for module in top.modules() if module._modules]
        self.kinds = list({type(module) for module in self.groups})
        self.scaled = [module.__dict__ for module in self.groups if "scaling" in module.__dict__]
        self.members = Members(module._modules for module in self.groups)
        self.marks = self._current()

    def _current(self) -> list[Any]:
        forwards, scaling = [kind.forward for kind in self.kinds], [module.get("scaling") for module in self.scaled]
        return [forwards, scaling, *[len(module.__dict__) for module in self.groups], *map(type, self.groups)]

    def same(self) -> bool:
        """Whether they are what they were."""
        return self.members.same() and self._current() == self.marks


def accelerate(model: Model, *, strict: bool = False) -> Model:
    """Let fastbert compute the encoders in `model`, in place.

    Parameters and modules stay the same objects under the same names, so `state_dict`, `save_pretrained`, optimizers,
    adapters and hooks go on working. Dropout draws its own masks.

    Args:
        model: a transformers model of BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, ALBERT, MPNet,
            ModernBERT, or DeBERTa v2 and v3, with any head; or any module with such a model in it, as those of
            sentence-transformers.
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
    made: list[tuple[nn.Module, Forward | ModelForward]] = []
    encoders: dict[int, Forward] = {}
    wholes: list[tuple[nn.Module, Family]] = []
    for name, module in model.named_modules():
        kind = Family.class_name(module)
        encodes, whole = ENCODERS.get(kind), MODELS.get(kind)
        if encodes is None and whole is None:
            continue
        argument = f"model.{name}" if name else "model"
        if "forward" in module.__dict__ and MARK not in module.__dict__:
            raise ArgumentError(argument, "a forward that was replaced", "the encoder's own")
        if whole is not None:
            wholes.append((module, whole))
        family = encodes or whole
        if family is not None and (encodes or not family.within):
            try:
                encoders[id(module)] = Forward(module, family, strict=strict)
            except (FastbertError, AttributeError) as error:
                raise ArgumentError(argument, str(error), "an encoder that fastbert computes") from error
            if encodes:
                made.append((module, encoders[id(module)]))
    made += [(whole, ModelForward(whole, encoders[id(whole.get_submodule(of.within))])) for whole, of in wholes]
    if not made:
        known = ", ".join(sorted(name.rpartition(".")[2] for name in {**ENCODERS, **MODELS}))
        raise ArgumentError("model", type(model).__name__, f"a model with one of these in it: {known}")
    for module, forward in made:
        if MARK in module.__dict__:  # it stays where it is, with what was wrapped around it
            vars(module.__dict__[MARK]).update(vars(forward))
        else:
            module.forward = forward
            setattr(module, MARK, forward)
    return model


def restore(model: Model) -> Model:
    """Take back what `accelerate` did; gives `model` itself.

    A function that was wrapped around an encoder's `forward` since stays, and calls the model's own code.

    Raises:
        ArgumentError: it is no module.
    """
    for module, forward in list(accelerated(model)):
        del module.__dict__[MARK]
        if module.__dict__.get("forward") is forward:
            del module.__dict__["forward"]
        else:
            forward.on = False
    return model


def accelerated(model: nn.Module) -> Iterator[tuple[nn.Module, Forward | ModelForward]]:
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
        whole = isinstance(forward, ModelForward)
        encoder = forward.encoder if isinstance(forward, ModelForward) else forward
        name = type(module).__name__
        own = copy.deepcopy(module).eval()
        for part in own.modules():
            for attribute in ("forward", MARK):
                part.__dict__.pop(attribute, None)
        exact = copy.deepcopy(own).double()
        fast = copy.deepcopy(own)
        accelerate(fast, strict=True)
        like = next(own.parameters())
        batch, seqlen, width = len(LENGTHS), max(LENGTHS), encoder.ours.config.hidden_size
        given: Any = own
        if whole:
            taken = given.get_input_embeddings().embedding_dim
        else:
            taken = width if encoder.family.entry is None else own.get_submodule(encoder.family.entry).in_features
        drawn = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for shape in ((batch, seqlen, taken), (batch, seqlen, width))
        )
        x, dout = (numbers.to(like) for numbers in drawn)
        kept = torch.arange(seqlen, device="cpu") < torch.tensor(LENGTHS, dtype=torch.int64, device="cpu")[:, None]
        kept = kept.to(like.device)
        dout *= kept[..., None]
        of_padding = whole or encoder.family.only_padding
        results = [_results(one, x, kept, dout, whole=whole, of_padding=of_padding) for one in (fast, own, exact)]
        for key in results[0]:
            got, plain, wanted = (result[key].double() for result in results)
            rounding, difference = (float((x - y).abs().max()) for x, y in ((plain, wanted), (got, plain)))
            found.append(Difference(f"{name}: {key}", difference, rounding))
    if not found:
        raise ArgumentError("model", type(model).__name__, "a model that was given to fastbert.accelerate")
    return found


def _results(
    encoder: nn.Module, x: Tensor, kept: Tensor, dout: Tensor, *, whole: bool, of_padding: bool
) -> dict[str, Tensor]:
    """The output where it is no padding, and the gradient of each parameter."""
    dtype = next(encoder.parameters()).dtype
    encoder.requires_grad_(True)
    mask = kept.long()
    if not of_padding:
        added = torch.zeros(kept.shape, dtype=dtype, device=x.device).masked_fill(~kept, torch.finfo(dtype).min)
        mask = added[:, None, None]
    named = {"inputs_embeds": x.to(dtype)} if whole else {}
    out = encoder(*([] if whole else [x.to(dtype)]), attention_mask=mask, **named)[0]
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, parameters, dout.to(dtype), allow_unused=True)
    given = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
    return {"output": out.detach()[kept], **given}


def _global_hooks() -> bool:
    """Whether functions are called beside every module's forward pass or gradient."""
    of = nn.modules.module
    return bool(of._global_forward_hooks or of._global_forward_pre_hooks or of._global_backward_hooks)
