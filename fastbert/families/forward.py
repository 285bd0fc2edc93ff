"""What stands in the place of an encoder's `forward`: it asks whether fastbert may compute a call, and does."""

from __future__ import annotations

import copy
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastbert.errors import BackendError, FastbertError
from fastbert.families.attention import NAME
from fastbert.families.foreign import ForeignEncoder, ForeignLayer
from fastbert.families.names import Family
from fastbert.families.torch_encoder import EightBitAttention, TorchEncoder
from fastbert.model.masks import read_mask
from fastbert.model.outputs import collected_by_transformers, refuse_what_asks
from fastbert.ops.watch import Members
from fastbert.packing import Packing
from fastbert.run.parts import is_hooked

# The attribute of a module that says what computes it, also where somebody wraps a function around its `forward`.
MARK = "_fastbert_forward"

# Whose hooks gather hidden states, which it is told by us.
TOLD = "transformers.utils.output_capturing"

# Whose functions a model is made of.
THEIRS = ("transformers.", "torch.")

# Attributes of attention that say how many heads there are, and how wide one is.
HEADS, HEAD_DIM = ("num_attention_heads", "n_heads"), ("attention_head_size", "head_dim")

# Attributes of any encoder's modules that what was read of them depends on.
WATCHED = (*HEADS, *HEAD_DIM, "scaling", "activation")

# Fields of a config that no encoder reads, and that may be long.
LABELS = ("id2label", "label2id")


class InPlace(ABC):
    """What stands in the place of a module's `forward`.

    Attributes:
        theirs: the module.
        strict: raise where the module's own code would run.
        on: False where it was taken back, and only a function that somebody wrapped around it still calls it.
    """

    on = True

    def __init__(self, theirs: nn.Module, *, strict: bool) -> None:
        self.theirs, self.strict = theirs, strict
        self.said: set[str] = set()

    @property
    def __code__(self) -> CodeType:
        """Of the module's own forward: torch.export names its inputs by it."""
        return cast("FunctionType", type(self.theirs).forward).__code__

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own arguments and result."""

    @abstractmethod
    def answer(self, module: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
        """What such a module makes of `[batch, seqlen, width]`, where True of `[batch, seqlen]` is no padding."""

    @abstractmethod
    def width(self) -> int:
        """Of what comes in."""

    def replica(self) -> nn.Module:
        """What `torch.nn.DataParallel` asks the module for: a copy that has other weights, with its own `forward`."""
        self.say("torch.nn.DataParallel makes copies of it, with weights of their own; use DistributedDataParallel")
        made = type(self.theirs)._replicate_for_data_parallel(self.theirs)
        detach(made, self)
        return cast("nn.Module", made)

    def say(self, reason: str) -> None:
        """Say, once, why the module's own code runs; or raise BackendError, if it must not."""
        name = type(self.theirs).__name__
        if self.strict:
            raise BackendError(name, reason, "a call that fastbert serves", "Or accelerate without strict=True.")
        if reason not in self.said and not torch.compiler.is_compiling():
            self.said.add(reason)
            warnings.warn(f"{name} runs its own code, not fastbert's: {reason}", stacklevel=3)


def attach(module: nn.Module, forward: InPlace) -> None:
    """Let `forward` compute a module."""
    if MARK in module.__dict__:  # it stays where it is, with what was wrapped around it
        vars(module.__dict__[MARK]).update(vars(forward))
        return
    module.forward = forward
    module._replicate_for_data_parallel = forward.replica  # type: ignore[method-assign]
    setattr(module, MARK, forward)


def detach(module: nn.Module, forward: InPlace) -> bool:
    """Take back what `attach` did; gives False where a function that was wrapped around `forward` stays."""
    held = module.__dict__
    for name in (MARK, "_replicate_for_data_parallel"):
        held.pop(name, None)
    if held.get("forward") is not forward:
        return False
    del held["forward"]
    return True


class AnyForward(InPlace):
    """What stands in the place of an encoder's `forward`."""

    def __init__(self, theirs: nn.Module, *, strict: bool) -> None:
        super().__init__(theirs, strict=strict)
        self.build()

    @abstractmethod
    def _read(self) -> ForeignEncoder:
        """What computes their modules as they are now."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The config that what was read depends on, by the names of its fields."""

    @abstractmethod
    def _watched(self) -> tuple[str, ...]:
        """Attributes of modules that it depends on beside `WATCHED`."""

    @abstractmethod
    def _called(self) -> list[nn.Module]:
        """Modules that are called before the layers, or after them."""

    @abstractmethod
    def _unlike(self) -> str | None:
        """What in a layer is not as its config says; None where nothing is."""

    def build(self) -> None:
        """Read their modules as they are now."""
        tree = _Tree(self.theirs, self._settings, (*WATCHED, *self._watched()))
        self.ours = self._read()
        self.layers = [layer for layer in self.ours.layer if isinstance(layer, ForeignLayer)]
        first = self.ours.first_norm
        called = [] if first is None else [first.get()]
        called += [*self._called(), *(part for layer in self.layers for part in layer.computed())]
        apart = {id(self.theirs), *(id(part) for whole in called for part in whole.modules())}
        self.silent = [module for module in self.theirs.modules() if id(module) not in apart]  # these are never called
        self.foreign = self._foreign()
        self.tree = tree  # last: where something above raises, the next call tries again

    def _foreign(self) -> str | None:
        """What in their modules is not as transformers or torch has it; None where nothing is."""
        kinds = {type(module) for module in self.silent} - {EightBitAttention}
        for kind in kinds:
            if not kind.__module__.startswith(("transformers.", "torch.nn.")):
                return f"a module of another class, {kind.__name__}"
        for kind in {type(self.theirs), *kinds}:
            methods = [value for value in vars(kind).values() if isinstance(value, FunctionType)]
            if not all(str(method.__module__).startswith(THEIRS) for method in methods):
                return f"the class {kind.__name__}, one of whose methods was replaced"
        for module in self.silent:
            kind = type(module)
            if any(callable(value) and hasattr(kind, name) for name, value in module.__dict__.items()):
                return f"a {kind.__name__} one of whose methods was replaced"
        return self._unlike()

    def _unserved(self, inputs: Tensor, asked: Callable[[], str | None]) -> str | None:
        """Why the model's own code has to run, given such inputs; `asked` says whether other arguments want it."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return "it is recorded for other batches"
        if inputs.device.type == "meta":
            return "tensors without numbers"
        try:
            if not torch.compiler.is_compiling() and not self.tree.same():  # a compiler has guards of its own
                self.build()
            reason = asked()
            if reason is not None:
                return reason
            self.ours.follow()
            if any(p >= 1.0 for layer in self.layers for p in layer.dropouts()):
                return "a dropout of everything"
        except FastbertError as error:
            return f"{error.argument}: {error.got}"
        except AttributeError as error:
            return f"a module that is gone: {error}"
        return self.changed()

    def changed(self) -> str | None:
        """Why their own code has to run whatever the call: what others changed, when it was read; None for nothing."""
        if self.foreign is not None:
            return self.foreign
        if _global_hooks() or any(is_hooked(module, TOLD) for module in self.silent):
            return "a hook on a module that is never called by itself: put it on the model, a linear layer or a norm"
        return None


class Forward(AnyForward):
    """Of an encoder of transformers."""

    def __init__(self, theirs: nn.Module, family: Family, *, strict: bool) -> None:
        self.family = family
        super().__init__(theirs, strict=strict)

    def _read(self) -> ForeignEncoder:
        from transformers import modeling_outputs

        self.output = getattr(modeling_outputs, self.family.output)
        asked = inspect.signature(type(self.theirs).forward).parameters.get("return_dict")
        self.return_dict = None if asked is None else asked.default
        states = inspect.signature(type(self.theirs).forward).parameters.get("output_hidden_states")
        self.output_hidden_states = None if states is None else states.default
        self.hf = self.family.hf(self.theirs)
        return ForeignEncoder(self.theirs, self.family)

    def _settings(self) -> dict[str, Any]:
        return vars(self.family.hf(self.theirs))

    def _watched(self) -> tuple[str, ...]:
        return self.family.watched

    def _called(self) -> list[nn.Module]:
        paths = [self.family.entry, *(["embeddings"] if not self.family.within else [])]
        return list(map(self.theirs.get_submodule, filter(None, paths)))

    def width(self) -> int:
        """See InPlace."""
        if self.family.entry is None:
            return self.ours.config.hidden_size
        return cast("nn.Linear", self.theirs.get_submodule(self.family.entry)).in_features

    def answer(self, module: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
        """See InPlace."""
        mask = kept.long()
        if not self.family.only_padding:
            added = torch.zeros(kept.shape, dtype=x.dtype, device=x.device)
            mask = added.masked_fill(~kept, torch.finfo(x.dtype).min)[:, None, None]
        out: Tensor = module(x, attention_mask=mask)[0]
        return out

    def _unlike(self) -> str | None:
        from transformers.activations import ACT2FN

        names = ("hidden_act", "hidden_activation", "activation")
        asked = type(ACT2FN[next(getattr(self.hf, name) for name in names if hasattr(self.hf, name))])
        for layer in self.layers:
            if type(layer.theirs[0].get_submodule((self.family.modules or self.family.names).activation)) is not asked:
                return "an activation other than the config's"
            attention, config = layer.attention(), self.ours.config
            scaling = getattr(attention, "scaling", None)
            if scaling is not None and abs(scaling - config.head_dim**-0.5) > 1e-6:
                return "another scaling of attention's scores"
            sizes = {**dict.fromkeys(HEADS, config.num_heads), **dict.fromkeys(HEAD_DIM, config.head_dim)}
            if any(getattr(attention, name, size) != size for name, size in sizes.items()):
                return "other heads than the config's"
        return self.family.unlike(self.theirs, self.ours.config)

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
            if reason is None:
                try:
                    packing, bias = self._mask(hidden_states, attention_mask)
                except FastbertError as error:
                    reason = f"{error.argument}: {error.got}"
        if reason is not None:
            self.say(reason)
        if reason is not None or not self.on:
            return type(self.theirs).forward(self.theirs, hidden_states, attention_mask, *args, **kwargs)
        states = bool(kwargs.get("output_hidden_states", self.output_hidden_states))
        x = packing.pack(self.entered(hidden_states))
        out: Any = self.ours.answer(x, packing, bias, packed=False, output_hidden_states=states)
        if kwargs.get("return_dict", self.return_dict) is False:
            return out.to_tuple()
        return self.output(last_hidden_state=out.last_hidden_state, hidden_states=out.hidden_states)

    def _mask(self, hidden_states: Tensor, attention_mask: Any) -> tuple[Packing, Tensor | None]:
        (batch, seqlen), by_distance = hidden_states.shape[:2], self.ours.config.by_distance
        device = hidden_states.device
        return read_mask(attention_mask, batch, seqlen, device, by_distance=by_distance, zeros_at_padding=True)

    def entered(self, x: Tensor) -> Tensor:
        """What the first layer gets of what the encoder is given."""
        return x if self.family.entry is None else self.theirs.get_submodule(self.family.entry)(x)

    def unserved(self, inputs: Tensor, asked: dict[str, Any], *args: Any) -> str | None:
        """Why the model's own code has to run, given such inputs and further arguments; None where it has not."""
        return self._unserved(inputs, lambda: self._asked(asked, args))

    def _asked(self, asked: dict[str, Any], args: tuple[Any, ...]) -> str | None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        given = (*args, asked.get("output_attentions") or None)
        if any(value is not None for value in given) or "attentions" in collected_by_transformers():
            return "attention weights or cross-attention are asked for"
        refuse_what_asks(asked, "fastbert")
        attention = getattr(self.hf, "_attn_implementation", None) or "eager"
        registered = ALL_ATTENTION_FUNCTIONS.get(attention)  # eager attention is not
        if attention == NAME:
            return None
        known_name = attention.startswith(("eager", "sdpa", "flex_attention", "flash_attention"))
        if not known_name or not (registered is None or registered.__module__.startswith(THEIRS)):
            return f"the attention implementation {attention!r}"
        return None


class TorchForward(AnyForward):
    """Of a `torch.nn.TransformerEncoder`."""

    ours: TorchEncoder

    def _read(self) -> ForeignEncoder:
        return TorchEncoder(self.theirs)

    def _settings(self) -> dict[str, Any]:
        return {}

    def _watched(self) -> tuple[str, ...]:
        return "norm_first", "num_heads", "batch_first"

    def _called(self) -> list[nn.Module]:
        return self.ours.called()

    def _unlike(self) -> str | None:
        return None

    def width(self) -> int:
        """See InPlace."""
        return self.ours.config.hidden_size

    def answer(self, module: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
        """See InPlace."""
        out: Tensor = module(self.ours.layout(x), src_key_padding_mask=~kept)
        return self.ours.layout(out)

    def __call__(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Any:
        """The encoder's own arguments and result."""
        given = mask, src_key_padding_mask
        reason = self._unserved(src, lambda: self.ours.unserved(src, *given, is_causal)) if self.on else None
        if reason is not None:
            self.say(reason)
        if reason is not None or not self.on:
            return nn.TransformerEncoder.forward(self.theirs, src, *given, is_causal)  # type: ignore[arg-type]
        return self.ours.encode(src, *given)


class _Tree:
    """The modules below an encoder, their classes, what is `watched` of them and the config, when it was made."""

    def __init__(self, top: nn.Module, settings: Callable[[], dict[str, Any]], watched: tuple[str, ...]) -> None:
        modules = list(top.modules())
        self.groups = [module for module in modules if module._modules]
        self.below = [module for module in self.groups if module is not top]  # which gets attributes of ours
        self.kinds = list({type(module) for module in self.groups})
        self.watched = [(module.__dict__, name) for module in modules for name in watched if name in module.__dict__]
        tables = [module._buffers for module in modules if module._buffers]
        held = [buffer for table in tables for buffer in table.values() if buffer is not None]
        self.buffers = [buffer for buffer in held if not buffer.is_inference()]  # whose writes torch counts
        self.members = Members([*(module._modules for module in self.groups), *tables])
        self.settings, given = settings, settings()
        self.count = len(given)
        self.fields = [(name, _copied(value)) for name, value in given.items() if name not in LABELS]
        self.marks = self._current()

    def _current(self) -> list[Any]:
        forwards, watched = [kind.forward for kind in self.kinds], [held.get(name) for held, name in self.watched]
        writes = [buffer._version for buffer in self.buffers]
        return [forwards, watched, writes, *[len(module.__dict__) for module in self.below], *map(type, self.groups)]

    def same(self) -> bool:
        """Whether they are what they were."""
        return self.members.same() and self._current() == self.marks and self._says_the_same()

    def _says_the_same(self) -> bool:
        """Whether the config has the same fields."""
        given = self.settings()
        return len(given) == self.count and all(given.get(name, LABELS) == value for name, value in self.fields)


def _copied(value: Any) -> Any:
    """A field that may be changed in place as it is now."""
    return copy.deepcopy(value) if isinstance(value, list | dict | set) else value


def _global_hooks() -> bool:
    """Whether functions are called beside every module's forward pass or gradient."""
    of = nn.modules.module
    return bool(of._global_forward_hooks or of._global_forward_pre_hooks or of._global_backward_hooks)
