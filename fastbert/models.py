"""BertModel: embeddings, encoder, pooler; called as Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastbert import folding, laid_out
from fastbert.config import EncoderConfig
from fastbert.embeddings import Embeddings
from fastbert.encoder import Encoder, initialise
from fastbert.errors import ArgumentError
from fastbert.masks import read_mask
from fastbert.ops.linear import held
from fastbert.ops.pooling import first_tokens
from fastbert.outputs import ModelOutput
from fastbert.packing import Packing

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of a forward pass as the model computes with them: packed.

    Attributes:
        input_ids, position_ids, token_type_ids: int64 `[tokens]`; the last may be None.
        packing: their layout.
        bias: added to the attention scores, where the mask was more than padding.
        pack: brings a tensor that was given as `input_ids` was, labels say, to `[tokens, ...]`.
        layout: brings packed rows back to the layout of the arguments, with 0 at padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    packing: Packing
    bias: Tensor | None
    pack: Callable[[Tensor], Tensor]
    layout: Callable[[Tensor], Tensor]


class BertModel(nn.Module):
    """BERT without a task head."""

    origin: Any = (
        None  # what `fastbert.load` learned of the checkpoint, so that `fastbert.save` gives the same one back
    )

    graphs: Any = None  # what `fastbert.graphed` puts in the place of embeddings and encoder

    def __init__(self, config: EncoderConfig, *, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooler else None
        if self.pooler is not None:
            initialise(self.pooler, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | BlockMask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        packing: Packing | None = None,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: int64 `[batch, seqlen]`; or packed `[tokens]` together with `packing`.
            attention_mask: any form in `masks.read_mask`; not together with `packing`.
            token_type_ids: as `input_ids`; type 0 by default.
            position_ids: as `input_ids`; by default the column in the padded grid, as in Hugging Face's BERT.
            packing: the layout of packed ids; the hidden states are then packed too.
            output_hidden_states: also return the embeddings and the output of every layer.

        Returns:
            Hidden states, 0 at padding. `pooler_output` is tanh(W x + b) of each sequence's first kept token.

        Raises:
            ArgumentError: a wrong shape, mask or id, or a sequence longer than the position table.
        """
        inputs = self.read(input_ids, attention_mask, token_type_ids, position_ids, packing)
        states = self.run(inputs, every=output_hidden_states)
        pooled = None if self.pooler is None else self.pool(first_tokens(states[-1], inputs.packing))
        hidden_states = tuple(inputs.layout(state) for state in (states if output_hidden_states else states[-1:]))
        return ModelOutput(hidden_states[-1], pooled, hidden_states if output_hidden_states else None)

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | BlockMask | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        packing: Packing | None,
    ) -> Inputs:
        """The arguments of `forward`, packed.

        Raises:
            ArgumentError: see `forward`.
        """
        given, bias = packing, None
        if packing is None:
            if input_ids.dim() != 2:
                raise ArgumentError("input_ids", f"shape {tuple(input_ids.shape)}", "[batch, seqlen]")
            batch, seqlen = input_ids.shape
            packing, bias = read_mask(attention_mask, batch, seqlen, input_ids.device)
            input_ids = packing.pack(input_ids)
            token_type_ids, position_ids = (
                None if ids is None else packing.pack(ids.expand(batch, seqlen))
                for ids in (token_type_ids, position_ids)
            )
        elif attention_mask is not None:
            raise ArgumentError("attention_mask", "a mask beside a packing", "one of the two")
        if position_ids is None:
            if packing.padded_shape[1] > self.config.max_positions:
                raise ArgumentError(
                    "input_ids",
                    f"sequences of {packing.padded_shape[1]} tokens",
                    f"at most the model's {self.config.max_positions} positions",
                    "Truncate the texts.",
                )
            position_ids = packing.columns
        pack, layout = (packing.pack, packing.unpack) if given is None else (_as_it_is, _as_it_is)
        return Inputs(input_ids, position_ids, token_type_ids, packing, bias, pack, layout)

    def run(self, inputs: Inputs, read: Tensor | None = None, *, every: bool = True) -> list[Tensor]:
        """The packed embeddings and the packed output of each layer; `read` as in `Encoder.run`.

        Without `every` only the last of them need be there.
        """
        if self.graphs is not None:
            if every:
                raise ArgumentError("output_hidden_states", True, "False", "A graphed model has its last states only.")
            last = self.graphs.run(self, inputs)
            return [last if read is None else last.index_select(0, read)]
        x = self.embeddings(inputs.input_ids, inputs.position_ids, inputs.token_type_ids)
        if not every and inputs.bias is None and laid_out.serves(self.encoder, x):
            made = held(self, "laid out", lambda: laid_out.lay_out(self.encoder, x))
            if made is not None:
                return [made.run(x, inputs.packing, read)]
        if not every and inputs.bias is None and folding.serves(self.encoder, x):
            folded = held(self, "folded", lambda: folding.fold(self.encoder, self.embeddings.norm))
            if folded is not None:
                return [folded.run(x, inputs.packing, read)]
        return self.encoder.run(x, inputs.packing, inputs.bias, read)

    def pool(self, first: Tensor) -> Tensor:
        """tanh(W x + b) of the sequences' first tokens, `[batch, hidden]` each. There must be a pooler."""
        assert self.pooler is not None
        return torch.tanh(self.pooler(first))


def _as_it_is(x: Tensor) -> Tensor:
    return x
