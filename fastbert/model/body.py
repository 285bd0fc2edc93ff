"""EncoderModel: embeddings, encoder, pooler; called as Hugging Face's models are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastbert import backend
from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.model import folded
from fastbert.model.embeddings import Embeddings
from fastbert.model.encoder import Encoder, initialise
from fastbert.model.masks import read_mask
from fastbert.model.outputs import ModelOutput, refuse_what_asks
from fastbert.ops.linear import Linear
from fastbert.ops.pooling import first_tokens
from fastbert.packing import Packing, check_dense
from fastbert.run.kept import Kept

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


# More than any executor's fewest.
SOME_ROWS = 512


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of a forward pass as the model computes with them: packed.

    Attributes:
        input_ids, position_ids, token_type_ids: int64 `[tokens]`; the last may be None.
        inputs_embeds: floating `[tokens, hidden]` where these came in the place of `input_ids`, which then is None.
        shape: of `input_ids` as they were given, `[batch, seqlen]` or packed `[tokens]`.
        packing: their layout.
        bias: added to the attention scores, where the mask was more than padding.
        pack: brings a tensor that was given as `input_ids` was, labels say, to `[tokens, ...]`.
        layout: brings packed rows back to the layout of the arguments, with 0 at padding.
    """

    input_ids: Tensor | None
    position_ids: Tensor
    token_type_ids: Tensor | None
    inputs_embeds: Tensor | None
    shape: torch.Size
    packing: Packing
    bias: Tensor | None
    pack: Callable[[Tensor], Tensor]
    layout: Callable[[Tensor], Tensor]


class EncoderModel(nn.Module):
    """A model without a task head: embeddings, encoder and, where there is one, a pooler of the first token."""

    origin: Any = (
        None  # what `fastbert.load` learned of the checkpoint, so that `fastbert.save` gives the same one back
    )

    graphs: Any = None  # what `fastbert.graphed` puts in the place of embeddings and encoder

    def __init__(self, config: EncoderConfig, *, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.kept = Kept()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Linear(config.hidden_size, config.hidden_size) if pooler else None
        if self.pooler is not None:
            initialise(self.pooler, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        packing: Packing | None = None,
        output_hidden_states: bool | None = None,
        output_pooled: bool = True,
        return_dict: bool | None = None,
        **hf: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: integers `[batch, seqlen]`; or packed `[tokens]` together with `packing`.
            attention_mask: any form in `masks.read_mask`; not together with `packing`.
            token_type_ids: as `input_ids`; type 0 by default. A model without token types reads none, so that what a
                tokenizer gives can be passed on as it is.
            position_ids: as `input_ids`; by default those of the family, see `EncoderConfig.positions`: for BERT the
                column in the padded grid. None where the family has no table of them.
            inputs_embeds: floating `[batch, seqlen, hidden]` (packed: `[tokens, hidden]`), in the place of `input_ids`:
                what the word table would give for them.
            packing: the layout of packed ids; the hidden states are then packed too.
            output_hidden_states: also return the embeddings and the output of every layer.
            output_pooled: False leaves `pooler_output` None, which saves its product where nobody reads it.
            return_dict: False gives a plain tuple of what is not None.
            hf: further arguments of Hugging Face's models; accepted where they ask for nothing.

        Returns:
            Hidden states, 0 at padding. `pooler_output` is tanh(W x + b) of each sequence's first kept token.

        Raises:
            ArgumentError: a wrong shape, mask or id, a sequence longer than the position table, or an argument of
                Hugging Face that asks for something else (attention weights, cross-attention, a cache).
        """
        refuse_what_asks(hf, "fastbert.EncoderModel")
        inputs = self.read(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, packing)
        states = self.run(inputs, every=bool(output_hidden_states))
        pooled = None
        if output_pooled and self.pooler is not None:
            pooled = self.pool(first_tokens(states[-1], inputs.packing))
        hidden_states = tuple(inputs.layout(state) for state in (states if output_hidden_states else states[-1:]))
        out = ModelOutput(hidden_states[-1], pooled, hidden_states if output_hidden_states else None)
        return out.to_tuple() if return_dict is False else out

    def read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | BlockMask | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        packing: Packing | None,
    ) -> Inputs:
        """The arguments of `forward`, packed.

        Raises:
            ArgumentError: see `forward`.
        """
        given, bias = packing, None
        input_ids = _as_int64("input_ids", input_ids)
        token_type_ids = _as_int64("token_type_ids", token_type_ids)
        position_ids = _as_int64("position_ids", position_ids)
        name, shape, device = self._described(input_ids, inputs_embeds)
        if position_ids is not None and self.config.positions == "none":
            expected = "None: this model has no table of positions, and counts places itself"
            raise ArgumentError("position_ids", "positions", expected)
        if packing is None:
            if len(shape) != 2:
                raise ArgumentError(name, f"shape {tuple(shape)}", "[batch, seqlen]")
            batch, seqlen = shape
            packing, bias = read_mask(attention_mask, batch, seqlen, device, by_distance=self.config.by_distance)
            if position_ids is None and input_ids is not None and self.config.positions == "tokens":
                # of all tokens, since those that the mask hides are counted too
                self._check_longest(name, packing)
                position_ids = token_positions_on_grid(self.config, input_ids)
            input_ids, inputs_embeds = (None if x is None else packing.pack(x) for x in (input_ids, inputs_embeds))
            token_type_ids, position_ids = (
                None if ids is None else packing.pack(_expanded(name, ids, batch, seqlen))
                for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids))
            )
        elif attention_mask is not None:
            raise ArgumentError("attention_mask", "a mask beside a packing", "one of the two")
        if position_ids is None:
            position_ids = self._positions(name, input_ids, packing)
        pack, layout = (packing.pack, packing.unpack) if given is None else (_as_it_is, _as_it_is)
        return Inputs(
            input_ids, position_ids, token_type_ids, inputs_embeds, shape, packing, bias, pack, layout
        )  # fmt: skip

    def _positions(self, name: str, input_ids: Tensor | None, packing: Packing) -> Tensor:
        """int64 `[tokens]`: the row of the position table that each token has by default."""
        self._check_longest(name, packing)
        first = self.config.first_position
        if self.config.positions == "tokens" and input_ids is not None:
            return token_positions(self.config, input_ids, packing.columns)
        return packing.columns + first if first else packing.columns

    def _check_longest(self, name: str, packing: Packing) -> None:
        by_tokens, most = self.config.positions == "tokens", self.config.longest
        longest = packing.max_seqlen if by_tokens else packing.padded_shape[1]
        if longest > most:
            expected = f"at most the model's {most} positions"
            raise ArgumentError(name, f"sequences of {longest} tokens", expected, "Truncate the texts.")

    def _described(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[str, torch.Size, torch.device]:
        """Which of the two was given, the shape of the ids, and where they are."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "both" if input_ids is not None else "neither"
            raise ArgumentError("input_ids", f"{got} of input_ids and inputs_embeds", "one of the two")
        if input_ids is not None:
            return "input_ids", input_ids.shape, input_ids.device
        assert inputs_embeds is not None
        check_dense("inputs_embeds", inputs_embeds)
        word = self.embeddings.word.weight
        wanted = (word.shape[1], word.dtype)
        if inputs_embeds.dim() < 2 or (inputs_embeds.shape[-1], inputs_embeds.dtype) != wanted:
            got = f"{inputs_embeds.dtype} of shape {tuple(inputs_embeds.shape)}"
            raise ArgumentError("inputs_embeds", got, f"{word.dtype} of shape [batch, seqlen, {word.shape[1]}]")
        return "inputs_embeds", inputs_embeds.shape[:-1], inputs_embeds.device

    def run(self, inputs: Inputs, read: Tensor | None = None, *, every: bool = True) -> list[Tensor]:
        """The packed embeddings and the packed output of each layer; `read` as in `Encoder.run`.

        Without `every` only the last of them need be there.
        """
        if self.graphs is not None:
            if every:
                raise ArgumentError("output_hidden_states", True, "False", "A graphed model has its last states only.")
            last = self.graphs.run(self, inputs)
            return [last if read is None else last.index_select(0, read)]
        x = self.embeddings(inputs.input_ids, inputs.position_ids, inputs.token_type_ids, inputs.inputs_embeds)
        normalised = self.embeddings.project is None
        if not every and inputs.bias is None and normalised and folded.unserved(self.encoder, x) is None:
            norm = self.embeddings.norm  # whose rows come in
            made = self.kept.get([norm, self.encoder], "folded", lambda: folded.fold(self.encoder, norm))
            if made is not None:
                backend.take("folded")
                return [made.run(x, inputs.packing, read)]
        return self.encoder.run(x, inputs.packing, inputs.bias, read, every=every)

    def executors(self) -> dict[str, str | None]:
        """What may compute the layers; see `Encoder.executors`. For many rows, in the dtype of the weights."""
        like = next(self.parameters())
        x = like.new_zeros((SOME_ROWS, self.config.hidden_size), dtype=like.dtype, device=like.device)
        with torch.no_grad():
            return {"folded": folded.unserved(self.encoder, x), **self.encoder.executors()}

    def train(self, mode: bool = True) -> EncoderModel:
        """See `torch.nn.Module.train`; an encoder that can't be trained says so before anything is changed."""
        self.encoder.check_mode(mode)
        return super().train(mode)

    def pool(self, first: Tensor) -> Tensor:
        """tanh(W x + b) of the sequences' first tokens, `[batch, hidden]` each. There must be a pooler."""
        assert self.pooler is not None
        return torch.tanh(self.pooler(first))


def token_positions(config: EncoderConfig, input_ids: Tensor, columns: Tensor) -> Tensor:
    """`positions="tokens"`, see EncoderConfig: int64 `[n]` of ids `[n]` in these columns of their sequences."""
    is_word = _is_word(config, input_ids)
    counted = is_word.cumsum(0)
    starts = torch.arange(len(input_ids), dtype=torch.int64, device=input_ids.device) - columns
    before = (counted - is_word).index_select(0, starts)
    return (counted - before) * is_word + (config.first_position - 1)


def _is_word(config: EncoderConfig, input_ids: Tensor) -> Tensor:
    return input_ids.ne(-1 if config.pad_token_id is None else config.pad_token_id).long()


def token_positions_on_grid(config: EncoderConfig, input_ids: Tensor) -> Tensor:
    """`token_positions` of a padded grid, int64 `[batch, seqlen]`."""
    is_word = _is_word(config, input_ids)
    return is_word.cumsum(1) * is_word + (config.first_position - 1)


def _as_int64(name: str, ids: Tensor | None) -> Tensor | None:
    """Ids of any integer type as int64; ArgumentError for what is no tensor of integers."""
    if ids is None:
        return None
    check_dense(name, ids)
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ArgumentError(name, f"a tensor of {ids.dtype}", "one of integers, int64 say")
    return ids.long()


def _expanded(name: str, ids: Tensor, batch: int, seqlen: int) -> Tensor:
    if ids.dim() != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] not in (1, seqlen):
        raise ArgumentError(name, f"shape {tuple(ids.shape)}", f"[{batch}, {seqlen}] or [1, {seqlen}]")
    return ids.expand(batch, seqlen)


def _as_it_is(x: Tensor) -> Tensor:
    return x


BertModel = EncoderModel
