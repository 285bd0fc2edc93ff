"""The input of the encoder: word + position + token type, LayerNorm, dropout, in one pass over packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.model.encoder import initialise
from fastbert.ops.dropout import drop
from fastbert.ops.embedding import embedding
from fastbert.ops.layer_norm import layer_norm


class Embeddings(nn.Module):
    """BERT's embeddings over packed ids."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_positions, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.eps)
        initialise(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """int64 `[tokens]` each -> `[tokens, hidden]`; no token types means type 0.

        `inputs_embeds`, floating `[tokens, hidden]`, come in the place of `input_ids`: what the word table would give.
        """
        dropout = self.config.hidden_dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=position_ids.device) if dropout else None
        if inputs_embeds is not None:
            types = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
            x = inputs_embeds + self.position(position_ids) + self.token_type(types)
            x = layer_norm(x, self.norm.weight, self.norm.bias, eps=self.norm.eps)
            return x if seed is None else drop(x, seed, dropout)
        assert input_ids is not None
        return embedding(
            input_ids,
            position_ids,
            token_type_ids,
            self.word.weight,
            self.position.weight,
            self.token_type.weight,
            self.norm.weight,
            self.norm.bias,
            dropout=dropout,
            seed=seed,
            eps=self.norm.eps,
            padding_idx=self.config.pad_token_id,
            sparse=self.word.sparse,
        )
