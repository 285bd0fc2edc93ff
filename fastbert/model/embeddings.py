"""The input of the encoder: word + position + token type, LayerNorm, dropout, in one pass over packed tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.model.encoder import initialise
from fastbert.ops.dropout import drop
from fastbert.ops.embedding import check_inside, embedding
from fastbert.ops.layer_norm import layer_norm, norm_weights
from fastbert.ops.linear import Linear


class Embeddings(nn.Module):
    """Embeddings over packed ids. Tables that a config has not are None, and so is `project` where nothing is wider."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.embedding_size or config.hidden_size
        types = config.type_vocab_size
        self.word = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position = None if config.positions == "none" else nn.Embedding(config.max_positions, width)
        self.token_type = nn.Embedding(types, width) if types else None
        widens, first = config.embedding_size is not None, config.project_first
        self.norm = nn.LayerNorm(hidden if first else width, eps=config.eps, bias=config.norm_bias)
        self.project = Linear(width, hidden, bias=not first) if widens else None
        initialise(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """int64 `[tokens]` each -> `[tokens, hidden]`; no token types means type 0, and a model without reads none.

        `inputs_embeds`, floating `[tokens, width]`, come in the place of `input_ids`: what the word table would give.

        Raises:
            ArgumentError: an id outside its table.
        """
        dropout = self.config.hidden_dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=position_ids.device) if dropout else None
        if self.token_type is None:
            token_type_ids = None
        position, types = self._table(self.position), self._table(self.token_type)
        position_ids = torch.zeros_like(position_ids) if self.position is None else position_ids
        norm = norm_weights(self.norm)
        first = self.project if self.config.project_first else None
        if inputs_embeds is not None or first is not None:
            words = self._words(input_ids) if inputs_embeds is None else inputs_embeds
            check_inside("position_ids", position_ids, position)
            if token_type_ids is not None:
                check_inside("token_type_ids", token_type_ids, types)
            row = types[0] if token_type_ids is None else F.embedding(token_type_ids, types)
            x = words + F.embedding(position_ids, position) + row
            x = layer_norm(x if first is None else first(x), *norm, eps=self.norm.eps)
            x = x if seed is None else drop(x, seed, dropout)
        else:
            assert input_ids is not None
            x = embedding(
                input_ids,
                position_ids,
                token_type_ids,
                self.word.weight,
                position,
                types,
                *norm,
                dropout=dropout,
                seed=seed,
                eps=self.norm.eps,
                padding_idx=self.config.pad_token_id,
                sparse=self.word.sparse,
            )
        return x if self.project is None or first is not None else self.project(x)

    def _words(self, input_ids: Tensor | None) -> Tensor:
        """Rows of the word table."""
        assert input_ids is not None
        check_inside("input_ids", input_ids, self.word.weight)
        padding = self.config.pad_token_id
        return F.embedding(input_ids, self.word.weight, padding_idx=padding, sparse=self.word.sparse)

    def _table(self, of: nn.Embedding | None) -> Tensor:
        """A table; one that adds nothing where the model has none."""
        return self.word.weight.new_zeros((1, self.word.weight.shape[1])) if of is None else of.weight
