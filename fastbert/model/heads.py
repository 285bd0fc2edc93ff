"""Models with heads, called as Hugging Face's: the tasks they are pretrained and fine-tuned for.

Only what a head reads goes through the last layer's feed-forward: the class tokens, the masked tokens. Padding has no
logits and counts in no loss, whatever its labels say (Hugging Face computes values there, and counts them).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import EncoderConfig, HeadConfig, Read
from fastbert.errors import ArgumentError
from fastbert.model.body import EncoderModel, Inputs
from fastbert.model.encoder import initialise
from fastbert.model.outputs import HeadOutput, PreTrainingOutput, QuestionAnsweringOutput, refuse_what_asks
from fastbert.ops.common import in_full
from fastbert.ops.cross_entropy import IGNORED, check_labels, cross_entropy, linear_cross_entropy
from fastbert.ops.layer_norm import layer_norm, norm_weights
from fastbert.ops.linear import Linear, linear
from fastbert.ops.linear_activation import activated
from fastbert.ops.pooling import first_rows, first_tokens, pool
from fastbert.packing import Packing
from fastbert.transfer import send

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_LABELS = HeadConfig()
Out = TypeVar("Out", HeadOutput, PreTrainingOutput, QuestionAnsweringOutput)


def body_of(model: EncoderModel | HeadModel) -> EncoderModel:
    """A model without its head."""
    return model.bert if isinstance(model, HeadModel) else model


class HeadModel(nn.Module):
    """What the models with heads share. The arguments of every `forward`, beside its labels:

    input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, packing, return_dict, hf: as
        `EncoderModel.forward`.
    output_hidden_states: also return the embeddings and the output of every layer, all tokens of it.

    Every loss is the mean over the labels that count, in float32 (float64 for a float64 model); 0 where none counts.

    Every `forward` raises ArgumentError for a wrong shape, mask, id or label.

    Attributes:
        bert: the body.
        parts: names of the modules that make the head; a checkpoint has each of them wholly or not at all. A family
            need not have a `transform`.
        pooler: whether the head reads the body's pooler, where the family has no `transform` in its place.
        reads: what its classifier reads; None where there is none.
        transform: what is before the classifier; None where there is nothing.
    """

    parts: ClassVar[tuple[str, ...]]
    pooler: ClassVar[bool]
    reads: ClassVar[Read | None] = None
    origin: Any = None  # as EncoderModel's

    def __init__(self, config: EncoderConfig, head: HeadConfig = _LABELS) -> None:
        super().__init__()
        self.config = config
        self.head_config = head
        self.bert = EncoderModel(config, pooler=self.pooler and self.reads not in config.heads.transformed)
        self.transform = Transform(config) if self.reads in config.heads.transformed else None

    def own_parts(self) -> list[str]:
        """Those of `parts` that it has."""
        return [part for part in self.parts if getattr(self, part) is not None]

    def train(self, mode: bool = True) -> HeadModel:
        """See `EncoderModel.train`."""
        self.bert.encoder.check_mode(mode)
        return super().train(mode)

    def _linear(self, outputs: int) -> nn.Linear:
        linear = Linear(self.config.hidden_size, outputs)
        initialise(linear, self.config.initializer_range)
        return linear

    def _drop(self, x: Tensor) -> Tensor:
        probability = self.head_config.classifier_dropout
        if probability is None:
            probability = 0.0 if self.reads in ("answer", "pair") else self.config.hidden_dropout
        return F.dropout(x, probability, self.training)

    def _states_at(
        self, inputs: Inputs, rows: Tensor, output_hidden_states: bool | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The last layer's output at packed rows, `[len(rows), hidden]`; and all hidden states, if asked for."""
        nothing = inputs.packing.tokens == 0
        states = self.bert.run(
            inputs, None if output_hidden_states or nothing else rows, every=bool(output_hidden_states)
        )
        at_rows = states[-1]
        if nothing:
            at_rows = at_rows.new_zeros(len(rows), self.config.hidden_size)
        elif output_hidden_states:
            at_rows = at_rows.index_select(0, rows)
        return at_rows, tuple(map(inputs.layout, states)) if output_hidden_states else None

    def _pooled(self, inputs: Inputs, output_hidden_states: bool | None) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The pooler's or the transform's output, `[batch, hidden]`; and all hidden states, if asked for."""
        shape = self.config.heads
        if shape.pooling == "mean":
            x, hidden_states = self._all_states(inputs, output_hidden_states)
            pooled = pool(x, inputs.packing, "mean")
        else:
            first, hidden_states = self._states_at(inputs, first_rows(inputs.packing), output_hidden_states)
            pooled = _zero_where_empty(first, inputs.packing)
        return self.bert.pool(pooled) if self.transform is None else self.transform(pooled, self._drop), hidden_states

    def _token_states(
        self, inputs: Inputs, output_hidden_states: bool | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """What a classifier of tokens reads, `[tokens, hidden]`; and all hidden states, if asked for."""
        x, hidden_states = self._all_states(inputs, output_hidden_states)
        return x if self.transform is None else self.transform(x, self._drop), hidden_states

    def _all_states(
        self, inputs: Inputs, output_hidden_states: bool | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        states = self.bert.run(inputs, every=bool(output_hidden_states))
        return states[-1], tuple(map(inputs.layout, states)) if output_hidden_states else None


class LabelledModel(HeadModel, ABC):
    """What the models with one kind of labels share; their classes say what the labels and the logits are."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        packing: Packing | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **hf: Any,
    ) -> HeadOutput | tuple[Any, ...]:
        """See the class."""
        refuse_what_asks(hf, "fastbert's model")
        inputs = self.bert.read(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, packing)
        return _as_asked(self._answer(inputs, labels, output_hidden_states), return_dict)

    @abstractmethod
    def _answer(self, inputs: Inputs, labels: Tensor | None, output_hidden_states: bool | None) -> HeadOutput:
        """Loss, logits and hidden states of a batch."""


class Transform(nn.Module):
    """What a family has between hidden states and a classifier; see `HeadShape`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.shape = config.heads
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=self.shape.bias)
        norm = nn.LayerNorm(config.hidden_size, eps=config.eps, bias=config.norm_bias)
        self.norm = norm if self.shape.norm else None
        initialise(self, config.initializer_range)

    def forward(self, x: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
        """`[rows, hidden]` -> `[rows, hidden]`."""
        if self.shape.first_dropout is not None:
            dropout = partial(F.dropout, p=self.shape.first_dropout, training=self.training)
        x = self.dense(dropout(x) if self.shape.drop_first else x)
        activation = self.shape.activation
        x = torch.tanh(x) if activation == "tanh" else activated(x, activation)
        return x if self.norm is None else layer_norm(x, *norm_weights(self.norm), eps=self.norm.eps)


class PredictionHead(nn.Module):
    """Masked-token prediction up to the decoder, whose weight is the word table, and the decoder's bias, if any."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, shape = config.embedding_size or config.hidden_size, config.heads
        self.dense = Linear(config.hidden_size, width, bias=shape.bias)
        self.norm = nn.LayerNorm(width, eps=config.eps, bias=config.norm_bias)
        self.bias = nn.Parameter(torch.empty(config.vocab_size)) if shape.decoder_bias else None
        initialise(self, config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, hidden]` -> `[rows, width]`, as wide as the word table: what the decoder multiplies."""
        x = activated(self.dense(x), self.config.heads.predict or self.config.activation)
        return layer_norm(x, *norm_weights(self.norm), eps=self.norm.eps)

    def logits(self, x: Tensor, word: Tensor) -> Tensor:
        """`[rows, hidden]` and the word table `[vocab, width]` -> `[rows, vocab]`."""
        return linear(self(x), word, self.bias)

    def loss(self, x: Tensor, word: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of rows with int64 labels `[rows]`, without their logits."""
        return linear_cross_entropy(self(x), word, self.bias, labels)


class EncoderForMaskedLM(LabelledModel):
    """Masked-token prediction. The decoder's weight is the word table.

    Without labels the logits of every token, `[batch, seqlen, vocab]` (packed: `[tokens, vocab]`).

    With `labels`, int64 as `input_ids`, -100 where a token is not to be predicted, the loss and no logits: the head
    runs on the labelled tokens alone, and its logits are never whole. A GPU is waited for once, for their number; not
    where ids are packed and their labels are on the CPU.
    """

    parts = ("predictions",)
    pooler = False

    def __init__(self, config: EncoderConfig, head: HeadConfig = _LABELS) -> None:
        super().__init__(config, head)
        self.predictions = PredictionHead(config)

    def _answer(self, inputs: Inputs, labels: Tensor | None, output_hidden_states: bool | None) -> HeadOutput:
        word = self.bert.embeddings.word.weight
        if labels is None:
            x, hidden_states = self._all_states(inputs, output_hidden_states)
            return HeadOutput(None, inputs.layout(self.predictions.logits(x, word)), hidden_states)
        rows, labels = _labelled(labels, inputs, word)
        x, hidden_states = self._states_at(inputs, rows, output_hidden_states)
        return HeadOutput(self.predictions.loss(x, word, labels), None, hidden_states)

    def logits_at(
        self, rows: Tensor, input_ids: Tensor, token_type_ids: Tensor | None, packing: Packing, *, at_once: int
    ) -> Iterator[Tensor]:
        """The logits of these rows of packed ids, `[at most at_once, vocab]` each time, and of no others.

        Args:
            rows: int64 `[n]`.
            input_ids: as `forward`.
            token_type_ids: as there.
            packing: as there.
            at_once: how many rows.
        """
        inputs = self.bert.read(input_ids, None, token_type_ids, None, None, packing)
        x, _ = self._states_at(inputs, rows, False)
        for part in x.split(at_once):
            yield self.predictions.logits(part, self.bert.embeddings.word.weight)


class EncoderForPreTraining(HeadModel):
    """Masked-token and next-sentence prediction: BERT as it is pretrained; of ALBERT the order of the sentences."""

    parts = ("predictions", "next_sentence")
    pooler = True
    reads = "pair"

    def __init__(self, config: EncoderConfig, head: HeadConfig = _LABELS) -> None:
        super().__init__(config, head)
        self.predictions = PredictionHead(config)
        self.next_sentence = self._linear(2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        packing: Packing | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **hf: Any,
    ) -> PreTrainingOutput | tuple[Any, ...]:
        """`prediction_logits` as EncoderForMaskedLM's, `seq_relationship_logits` as EncoderForNextSentencePrediction's.

        The loss is the sum of those of the labels that are given (Hugging Face gives none unless both are).

        Args:
            labels: int64 as `input_ids`, -100 where a token is not to be predicted; with them no `prediction_logits`.
                See EncoderForMaskedLM.
            next_sentence_label: int64 `[batch]`; 0 where the second text follows the first, 1 where it does not, or,
                of ALBERT, where the two were swapped.
        """
        refuse_what_asks(hf, "fastbert's model")
        inputs = self.bert.read(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, packing)
        word = self.bert.embeddings.word.weight
        logits, losses = None, []
        if labels is None:
            x, hidden_states = self._all_states(inputs, output_hidden_states)
            logits = inputs.layout(self.predictions.logits(x, word))
            first = first_tokens(x, inputs.packing)
        else:
            rows, labels = _labelled(labels, inputs, word)
            batch = inputs.packing.batch
            x, hidden_states = self._states_at(
                inputs, torch.cat([first_rows(inputs.packing), rows]), output_hidden_states
            )
            first = _zero_where_empty(x[:batch], inputs.packing)
            losses.append(self.predictions.loss(x[batch:], word, labels))
        relation = self.next_sentence(self._drop(self.bert.pool(first)))
        if next_sentence_label is not None:
            losses.append(cross_entropy(relation, next_sentence_label.flatten(), "next_sentence_label"))
        return _as_asked(
            PreTrainingOutput(torch.stack(losses).sum() if losses else None, logits, relation, hidden_states),
            return_dict,
        )


class EncoderForReplacedTokens(LabelledModel):
    """Which tokens were put in the place of others: ELECTRA's discriminator, as it is pretrained.

    Logits `[batch, seqlen]`, 0 at padding (packed: `[tokens]`), of a token being a replaced one; `labels` int64 as
    `input_ids`: 1 for a replaced token, 0 for another, -100 where a token has none. The loss is the mean binary
    cross-entropy.
    """

    parts = ("dense", "replaced")
    pooler = False

    def __init__(self, config: EncoderConfig, head: HeadConfig = _LABELS) -> None:
        super().__init__(config, head)
        self.dense = self._linear(config.hidden_size)
        self.replaced = self._linear(1)

    def _answer(self, inputs: Inputs, labels: Tensor | None, output_hidden_states: bool | None) -> HeadOutput:
        x, hidden_states = self._all_states(inputs, output_hidden_states)
        logits = self.replaced(activated(self.dense(x), self.config.activation)).squeeze(1)
        loss = None
        if labels is not None:
            check_labels(labels, inputs.shape, 2, logits.device)
            both = torch.stack([torch.zeros_like(logits), logits], 1)  # whose softmax is the logits' sigmoid
            loss = cross_entropy(both, inputs.pack(labels))
        return HeadOutput(loss, inputs.layout(logits), hidden_states)


class EncoderForNextSentencePrediction(LabelledModel):
    """Whether the second text of a pair follows the first.

    Logits `[batch, 2]`; `labels` int64 `[batch]`: 0 where the second text follows the first, 1 where not.
    """

    parts = ("next_sentence",)
    pooler = True

    def __init__(self, config: EncoderConfig, head: HeadConfig = _LABELS) -> None:
        super().__init__(config, head)
        self.next_sentence = self._linear(2)

    def _answer(self, inputs: Inputs, labels: Tensor | None, output_hidden_states: bool | None) -> HeadOutput:
        pooled, hidden_states = self._pooled(inputs, output_hidden_states)
        logits = self.next_sentence(pooled)
        loss = None if labels is None else cross_entropy(logits, labels.flatten())
        return HeadOutput(loss, logits, hidden_states)


class EncoderForSequenceClassification(LabelledModel):
    """One label, several labels or numbers for each sequence; see `HeadConfig.problem_type`.

    Logits `[batch, classes]`; `labels` integers `[batch]` for a single label; `[batch, classes]` of 0 and 1 for
    several; numbers `[batch, classes]` (or `[batch]`, for one class) for regression.
    """

    parts = ("transform", "classifier")
    pooler = True
    reads = "text"

    def __init__(self, config: EncoderConfig, head: HeadConfig = _LABELS) -> None:
        super().__init__(config, head)
        self.classifier = self._linear(len(head.labels))

    def _answer(self, inputs: Inputs, labels: Tensor | None, output_hidden_states: bool | None) -> HeadOutput:
        pooled, hidden_states = self._pooled(inputs, output_hidden_states)
        logits = self.classifier(self._drop(pooled))
        return HeadOutput(None if labels is None else self._loss(logits, labels), logits, hidden_states)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.head_config.problem_type
        if problem is None and logits.shape[1] == 1:
            problem = "regression"
        elif problem is None:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if problem == "single_label_classification":
            return cross_entropy(logits, labels.flatten().long())
        exact = in_full(logits)
        if labels.shape != logits.shape and (logits.shape[1] > 1 or labels.shape != logits.shape[:1]):
            raise ArgumentError("labels", f"shape {tuple(labels.shape)}", f"{tuple(logits.shape)}, for {problem}")
        wanted = labels.reshape(logits.shape).to(exact.dtype)
        if problem == "regression":
            total = F.mse_loss(exact, wanted, reduction="sum")
        else:
            total = F.binary_cross_entropy_with_logits(exact, wanted, reduction="sum")
        return total / max(logits.numel(), 1)


class EncoderForTokenClassification(LabelledModel):
    """A label for each token: named entities, parts of speech.

    Logits `[batch, seqlen, classes]`, 0 at padding (packed: `[tokens, classes]`); `labels` int64 as `input_ids`, -100
    where a token has none.
    """

    parts = ("transform", "classifier")
    pooler = False
    reads = "token"

    def __init__(self, config: EncoderConfig, head: HeadConfig = _LABELS) -> None:
        super().__init__(config, head)
        self.classifier = self._linear(len(head.labels))

    def _answer(self, inputs: Inputs, labels: Tensor | None, output_hidden_states: bool | None) -> HeadOutput:
        x, hidden_states = self._token_states(inputs, output_hidden_states)
        logits = self.classifier(self._drop(x))
        loss = None
        if labels is not None:
            check_labels(labels, inputs.shape, logits.shape[1], logits.device)
            loss = cross_entropy(logits, inputs.pack(labels))
        return HeadOutput(loss, inputs.layout(logits), hidden_states)


class EncoderForQuestionAnswering(HeadModel):
    """Where in a text the answer begins and where it ends."""

    parts = ("transform", "qa_outputs")
    pooler = False
    reads = "answer"

    def __init__(self, config: EncoderConfig, head: HeadConfig = _LABELS) -> None:
        super().__init__(config, head)
        self.qa_outputs = self._linear(2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        packing: Packing | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **hf: Any,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Logits `[batch, seqlen]`, -inf at padding, which is no answer (packed: `[tokens]`).

        The loss, where both positions are given, is the mean of that of the start and that of the end.

        Args:
            start_positions: int64 `[batch]`, columns of the padded grid, also for packed ids. Negative ones mean column
                0, as in Hugging Face's; one that is no token counts for nothing.
            end_positions: likewise.
        """
        refuse_what_asks(hf, "fastbert's model")
        inputs = self.bert.read(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, packing)
        x, hidden_states = self._token_states(inputs, output_hidden_states)
        both = self.qa_outputs(self._drop(x))
        on_grid = inputs.packing.unpack(both, fill=-torch.inf).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start, end = on_grid
            loss = _position_loss(start, start_positions, "start_positions")
            loss = (loss + _position_loss(end, end_positions, "end_positions")) / 2
        start, end = on_grid if packing is None else both.unbind(-1)
        return _as_asked(QuestionAnsweringOutput(loss, start, end, hidden_states), return_dict)


class EncoderForMultipleChoice(HeadModel):
    """Which of several texts fits."""

    parts = ("transform", "classifier")
    pooler = True
    reads = "choice"

    def __init__(self, config: EncoderConfig, head: HeadConfig = _LABELS) -> None:
        super().__init__(config, head)
        self.classifier = self._linear(1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        packing: Packing | None = None,
        num_choices: int | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **hf: Any,
    ) -> HeadOutput | tuple[Any, ...]:
        """Logits `[batch, choices]`.

        Args:
            input_ids: `[batch, choices, seqlen]`; or packed, one sequence a choice, all choices of one question after
                each other, together with `packing` and `num_choices`.
            attention_mask: `[batch, choices, seqlen]`; None for packed ids.
            token_type_ids: as `input_ids`.
            position_ids: as `input_ids`.
            labels: int64 `[batch]`, the choice that fits.
        """
        if packing is None:
            given = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
            if given is None or given.dim() != 3:
                got = None if given is None else f"shape {tuple(given.shape)}"
                raise ArgumentError("input_ids", got, "[batch, choices, seqlen]")
            num_choices = given.shape[1]
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
                None if x is None else x.flatten(0, 1)
                for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            )
        elif num_choices is None or num_choices < 1 or packing.batch % num_choices:
            raise ArgumentError("num_choices", num_choices, f"a divisor of the {packing.batch} packed sequences")
        refuse_what_asks(hf, "fastbert's model")
        inputs = self.bert.read(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, packing)
        pooled, hidden_states = self._pooled(inputs, output_hidden_states)
        logits = self.classifier(self._drop(pooled)).view(inputs.packing.batch // num_choices, num_choices)
        loss = None if labels is None else cross_entropy(logits, labels)
        return _as_asked(HeadOutput(loss, logits, hidden_states), return_dict)


def _as_asked(out: Out, return_dict: bool | None) -> Out | tuple[Any, ...]:
    return out.to_tuple() if return_dict is False else out


def _labelled(labels: Tensor, inputs: Inputs, word: Tensor) -> tuple[Tensor, Tensor]:
    """The packed rows whose label counts, and these labels, on the device of the word table.

    Labels on a GPU are waited for once, for their number, on which the shapes that follow depend. Those of packed ids
    may be on the CPU, which looks there and sends them.
    """
    device = word.device
    on_cpu = len(inputs.shape) == 1 and isinstance(labels, Tensor) and labels.device == torch.device("cpu")
    check_labels(labels, inputs.shape, len(word), labels.device if on_cpu else device)
    labels = inputs.pack(labels)
    if torch.compiler.is_compiling():  # a graph has one shape: all rows, and the loss leaves out those that don't count
        return torch.arange(len(labels), device=device), labels.to(device)
    rows = (labels != IGNORED).nonzero().flatten()
    rows, labels = send([rows, labels.index_select(0, rows)], device)
    return rows, labels


def _zero_where_empty(first: Tensor, packing: Packing) -> Tensor:
    return first.masked_fill((packing.lengths == 0)[:, None], 0.0)


def _position_loss(logits: Tensor, positions: Tensor, name: str) -> Tensor:
    """Cross-entropy of int64 `[batch]` (or `[batch, 1]`) among columns `[batch, seqlen]`; -inf is no candidate."""
    batch, seqlen = logits.shape
    logits = F.pad(logits, (0, 1), value=-torch.inf)  # the column of all positions beyond the grid
    if positions.numel() != batch or positions.dtype != torch.int64:
        raise ArgumentError(
            name, f"{positions.dtype} of shape {tuple(positions.shape)}", f"torch.int64 of shape [{batch}]"
        )
    positions = positions.reshape(batch, 1).clamp(0, seqlen)
    is_token = logits.gather(1, positions) > -torch.inf
    return cross_entropy(logits, positions.where(is_token, IGNORED).flatten(), name)


BertForMaskedLM = EncoderForMaskedLM
BertForMultipleChoice = EncoderForMultipleChoice
BertForNextSentencePrediction = EncoderForNextSentencePrediction
BertForPreTraining = EncoderForPreTraining
BertForQuestionAnswering = EncoderForQuestionAnswering
BertForSequenceClassification = EncoderForSequenceClassification
BertForTokenClassification = EncoderForTokenClassification
