"""BertModel: embeddings, encoder, pooler; called as Hugging Face's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.embeddings import Embeddings
from fastbert.encoder import Encoder, initialise
from fastbert.errors import ArgumentError
from fastbert.masks import read_mask
from fastbert.outputs import ModelOutput
from fastbert.packing import Packing
from fastbert.pooling import first_tokens

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class BertModel(nn.Module):
    """BERT without a task head."""

    origin: Any = (
        None  # what `fastbert.load` learned of the checkpoint, so that `fastbert.save` gives the same one back
    )

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
        packed, bias = packing is not None, None
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
        states = self.encoder.run(self.embeddings(input_ids, position_ids, token_type_ids), packing, bias)
        pooled = None
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(first_tokens(states[-1], packing)))
        if not output_hidden_states:
            states = states[-1:]
        if not packed:
            states = [packing.unpack(state) for state in states]
        return ModelOutput(states[-1], pooled, tuple(states) if output_hidden_states else None)
