"""A whole model of transformers', from token ids to hidden states: padding is dropped before the embeddings."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.errors import FastbertError
from fastbert.families.forward import MARK, Forward, InPlace
from fastbert.families.names import Family
from fastbert.model.body import token_positions_on_grid
from fastbert.model.masks import read_mask
from fastbert.model.outputs import collected_by_transformers
from fastbert.ops.pooling import first_tokens
from fastbert.packing import Packing
from fastbert.run.parts import is_hooked

# Whose hooks on embeddings know no layout: gradient checkpointing's lets their output have a gradient.
TOLERATED = ("torch.distributed", "transformers.modeling_utils")

# Arguments of such a model that are read here.
READ = ("token_type_ids", "position_ids", "inputs_embeds", "output_hidden_states", "return_dict")


class ModelForward(InPlace):
    """What stands in the place of the `forward` of a model without a head.

    Where it can't serve a call the model's own code runs, which calls the encoder; that may still be computed by us.

    Args:
        theirs: the model.
        family: which it is of.
        strict: see InPlace.
    """

    def __init__(self, theirs: nn.Module, family: Family, *, strict: bool) -> None:
        from transformers import modeling_outputs

        super().__init__(theirs, strict=strict)
        self.family = family
        self.itself = None if family.within else Forward(theirs, family, strict=strict)
        embeddings: Any = type(theirs.embeddings)
        self.taken = set(inspect.signature(embeddings.forward).parameters)
        _, *arguments = inspect.signature(type(theirs).forward).parameters.values()
        by_place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.names = [argument.name for argument in arguments if argument.kind is by_place]
        self.__signature__ = inspect.Signature(arguments)  # which those ask for that pass on what a model takes
        self.output = getattr(modeling_outputs, family.models[family.class_name(theirs)])

    @property
    def encoder(self) -> Forward | None:
        """What computes its encoder; None where the one that is there now is not accelerated."""
        if self.itself is not None:
            return self.itself
        inner = self.theirs._modules.get(self.family.within)
        found = None if inner is None else inner.__dict__.get(MARK)
        return found if isinstance(found, Forward) and found.family is self.family else None

    def width(self) -> int:
        """Of embeddings that come in the place of ids; see InPlace."""
        theirs: Any = self.theirs
        return int(theirs.get_input_embeddings().embedding_dim)

    def answer(self, module: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
        """See InPlace."""
        out: Tensor = module(inputs_embeds=x, attention_mask=kept.long())[0]
        return out

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The model's own arguments and result."""
        by_place = dict(zip(self.names[2:], args, strict=False))
        wrong = len(by_place) < len(args) or not by_place.keys().isdisjoint(kwargs)  # which its own code says
        out = None
        if self.on and not wrong:
            encoder = self.encoder
            if encoder is None:
                self.say(f"its {self.family.within} is not accelerated")
            else:
                out = self._computed(encoder, input_ids, attention_mask, {**by_place, **kwargs})
        if out is not None:
            return out
        return type(self.theirs).forward(self.theirs, input_ids, attention_mask, *args, **kwargs)

    def _computed(self, encoder: Forward, input_ids: Any, attention_mask: Any, named: dict[str, Any]) -> Any:
        """None where the model's own code has to run."""
        theirs: Any = self.theirs
        inputs: Any = named.get("inputs_embeds") if input_ids is None else input_ids
        reason = self._unserved(encoder, input_ids, inputs, attention_mask, named)
        if reason is None:
            try:
                (batch, seqlen), by_distance = inputs.shape[:2], encoder.ours.config.by_distance
                read = read_mask(attention_mask, batch, seqlen, inputs.device, by_distance=by_distance)
            except FastbertError as error:
                reason = f"{error.argument}: {error.got}"
        if reason is not None:
            if encoder is self.itself:  # no encoder will say it
                self.say(reason)
            return None
        packing, bias = read
        every = bool(self._states(named))
        x = self._embedded(encoder, packing, input_ids, named)
        through = torch.is_grad_enabled()  # all that is given back has the gradient of what is made of it
        states = encoder.ours.run(x, packing, bias, every=every, unpack=through)
        padded = states if through else [packing.unpack(state).to(x.dtype) for state in states]
        last = padded[-1]
        made: dict[str, Any] = {"last_hidden_state": last}
        if getattr(theirs, "pooler", None) is not None:
            made["pooler_output"] = self._pooled(first_tokens(packing.pack(last) if through else states[-1], packing))
        if every:
            made["hidden_states"] = tuple(padded)
        asked = named.get("return_dict")
        out = self.output(**made)
        return out.to_tuple() if (theirs.config.return_dict if asked is None else asked) is False else out

    def _unserved(
        self, encoder: Forward, input_ids: Any, inputs: Any, attention_mask: Any, named: dict[str, Any]
    ) -> str | None:
        theirs: Any = self.theirs
        if (input_ids is None) == (named.get("inputs_embeds") is None) or not isinstance(inputs, Tensor):
            return "other than one of input_ids and inputs_embeds"
        if inputs.dim() != (2 if inputs is input_ids else 3) or not inputs.numel():
            return "inputs that are not [batch, seqlen], or none"
        if not (attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)):
            return "an attention_mask that is not [batch, seqlen]"
        if named.get("position_ids") is not None:
            return "position_ids"
        states = self._states(named)
        if not isinstance(states, bool):  # some models give those of these layers, some all
            return "hidden states of layers by their numbers"
        if states and getattr(theirs.config, "tie_last_hidden_states", None) is False:
            return "hidden states without the last norm"
        types = named.get("token_type_ids")
        if types is not None and ("token_type_ids" not in self.taken or types.shape != inputs.shape[:2]):
            return "token_type_ids"
        for name, usual in self.family.as_made.items():
            if getattr(theirs, name) != usual:
                return f"{name} that is not {usual}"
        if theirs.config.output_attentions or collected_by_transformers():
            return "attention weights are asked for, or something collects hidden states"
        called = [module for module in (theirs.embeddings, getattr(theirs, "pooler", None)) if module is not None]
        if not all(type(module).__module__.startswith(("transformers.", "torch.nn.")) for module in called):
            return "embeddings or a pooler of another class"
        whole = [*called, *([] if encoder is self.itself else [encoder.theirs])]
        if any(part.__dict__.get("forward") is not encoder for part in whole[len(called) :]):
            return "a function around the encoder's forward"
        inner = [module for part in called for module in part.modules()]
        if any(is_hooked(module, TOLERATED) or "forward" in module.__dict__ for module in inner):
            return "a hook on the embeddings or the pooler"
        if any(map(is_hooked, whole)):
            return "a hook on the encoder"
        return encoder.unserved(inputs, {name: value for name, value in named.items() if name not in READ})

    def _states(self, named: dict[str, Any]) -> Any:
        """Whether hidden states are asked for, or of which layers."""
        theirs: Any = self.theirs
        asked = named.get("output_hidden_states")
        return theirs.config.output_hidden_states if asked is None else asked

    def _embedded(self, encoder: Forward, packing: Packing, input_ids: Tensor | None, named: dict[str, Any]) -> Tensor:
        """The packed rows that go into the first layer, `[tokens, hidden]`."""
        theirs: Any = self.theirs
        config, embeddings = encoder.ours.config, theirs.embeddings
        if config.positions == "tokens" and embeddings.padding_idx != config.pad_token_id:  # another was set later
            config = replace(config, pad_token_id=embeddings.padding_idx, first_position=embeddings.padding_idx + 1)
        padded = {name: named.get(name) for name in ("inputs_embeds", "token_type_ids")} | {"input_ids": input_ids}
        if config.positions == "tokens" and input_ids is not None:
            padded["position_ids"] = token_positions_on_grid(config, input_ids)
        packed: dict[str, Any] = {name: packing.pack(x)[None] for name, x in padded.items() if x is not None}
        packed.setdefault("input_ids", None)  # which one of them has no default for
        if "position_ids" in self.taken and "position_ids" not in packed:
            packed["position_ids"] = packing.columns[None] + config.first_position
        x = embeddings(**packed)[0]
        projection = getattr(theirs, "embeddings_project", None)
        return encoder.entered(x if projection is None else projection(x))

    def _pooled(self, first: Tensor) -> Tensor:
        """What the pooler makes of each sequence's first token, `[batch, hidden]`."""
        theirs: Any = self.theirs
        activation = getattr(theirs, "pooler_activation", None)
        return theirs.pooler(first[:, None]) if activation is None else activation(theirs.pooler(first))
