"""The model behind the server: texts to tokens, and tokens to rows of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import fastbert
from fastbert.errors import ArgumentError
from fastbert.model.sentence import ACTIVATIONS
from fastbert.packing import Packing
from fastbert.tasks.batch_tokens import default_batch_tokens
from fastbert.tasks.loading import DTYPES, DTypeName
from fastbert.tasks.max_length import tokens_at_most
from fastbert.tasks.results import Compute, results
from fastbert.text.checks import Text
from fastbert.text.tokens import Tokens

Task = Literal["embed", "rerank", "predict"]
EngineName = Literal["fastbert", "sentence-transformers"]
Rows = npt.NDArray[np.float32]

THEIR_BATCH = 32  # texts: what SentenceTransformer.encode takes


@dataclass(frozen=True)
class Engine:
    """A model that was loaded for one task.

    Attributes:
        task: what its rows are: embeddings, or the logits of a head.
        tokenize: of texts, or pairs of texts, the tokens, at most so many of each; from one thread at a time.
        compute: a row of each text, float32 `[texts, width]`; embeddings have the length that the pooling gave them.
            From one thread at a time, which may be another than `tokenize`'s.
        longest: most tokens of a text.
        batch_tokens: of a batch.
        vocabulary: token ids are below it.
        probabilities: of logits `[texts, labels]` what the model's own library makes of them, of the same shape.
        labels: of the columns of logits.
        prompts: what may be put before texts, by name.
        prompt_name: of the one that is put there by default.
    """

    task: Task
    tokenize: Callable[[Sequence[Text], int], Tokens]
    compute: Callable[[Tokens], Rows]
    width: int
    longest: int
    batch_tokens: int
    vocabulary: int
    probabilities: Callable[[Rows], Rows] = lambda logits: logits
    labels: Sequence[str] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt_name: str | None = None

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before a text and after it."""
        empty, text = (self.tokenize([text], self.longest).ids.tolist() for text in ("", "a"))
        at = next((i for i, (a, b) in enumerate(zip(empty, text, strict=False)) if a != b), len(empty))
        return empty[:at], empty[at:]

    def framed(self, ids: list[int], most: int | None) -> list[int]:
        """Token ids with the special tokens around them, which may be there already; cut to at most so many."""
        before, after = self.frame
        begin, end = len(before), len(ids) - len(after)
        if end >= begin and ids[:begin] == before and ids[end:] == after:
            ids = ids[begin:end]
        return [*before, *(ids if most is None else ids[: most - len(before) - len(after)]), *after]


def load(
    name: EngineName,
    folder: Path,
    task: Task,
    dtype: DTypeName | None,
    device: str | None,
    batch_tokens: int | None,
) -> Engine:
    """The engine of this name.

    Args:
        folder: a checkpoint folder of Hugging Face or of sentence-transformers.
        dtype: as in `fastbert.TextEncoder.from_folder`.
        batch_tokens: of a batch; by default what fastbert takes for this model on this machine.

    Raises:
        FastbertError: an argument is wrong, or the folder has no model for the task.
    """
    if name == "sentence-transformers":
        return _theirs(folder, task, dtype, device, batch_tokens)
    if task == "embed":
        return _embedding(folder, dtype, device, batch_tokens)
    return _scoring(folder, task, dtype, device, batch_tokens)


def _embedding(folder: Path, dtype: DTypeName | None, device: str | None, batch_tokens: int | None) -> Engine:
    encoder = fastbert.TextEncoder.from_folder(folder, dtype=dtype, device=device)
    model, recipe = encoder.model, encoder.recipe
    embedder = encoder.embedder(normalize=False)  # a request says whether its embeddings get length 1
    width = encoder.width()
    batch_tokens = batch_tokens or default_batch_tokens(model, next(model.parameters()).device)

    def embeddings(ids: Tensor, types: Tensor | None, packing: Packing) -> Tensor:
        out = model(ids, token_type_ids=types, packing=packing, output_pooled=False)
        return embedder(out.last_hidden_state, packing)

    return Engine(
        task="embed",
        tokenize=encoder.tokenizer.encode,
        compute=lambda tokens: _rows(model, tokens, embeddings, width, batch_tokens),
        width=width,
        longest=tokens_at_most(None, encoder.tokenizer, model.config, recipe.max_length),
        batch_tokens=batch_tokens,
        vocabulary=model.config.vocab_size,
        prompts=recipe.prompts,
        prompt_name=recipe.prompt_name,
    )


def _scoring(folder: Path, task: Task, dtype: DTypeName | None, device: str | None, batch_tokens: int | None) -> Engine:
    activation: Callable[[Tensor], Tensor]
    if task == "rerank":
        scorer = fastbert.TextScorer.from_folder(folder, dtype=dtype, device=device)
        model, tokenizer, activation = scorer.model, scorer.tokenizer, ACTIVATIONS[scorer.activation]
    else:
        classifier = fastbert.TextClassifier.from_folder(folder, dtype=dtype, device=device)
        model, tokenizer = classifier.model, classifier.tokenizer
        several = model.head_config.problem_type == "multi_label_classification"
        activation = torch.sigmoid if several else partial(torch.softmax, dim=1)
    labels = model.head_config.labels
    batch_tokens = batch_tokens or default_batch_tokens(model, next(model.parameters()).device)

    def logits(ids: Tensor, types: Tensor | None, packing: Packing) -> Tensor:
        return model(ids, token_type_ids=types, packing=packing).logits.float()

    return Engine(
        task=task,
        tokenize=tokenizer.encode,
        compute=lambda tokens: _rows(model, tokens, logits, len(labels), batch_tokens),
        width=len(labels),
        longest=tokens_at_most(None, tokenizer, model.config),
        batch_tokens=batch_tokens,
        vocabulary=model.config.vocab_size,
        probabilities=lambda rows: activation(torch.from_numpy(rows)).numpy(),
        labels=labels,
    )


def _rows(
    model: Any,
    tokens: Tokens,
    compute: Compute,
    width: int,
    batch_tokens: int,
) -> Rows:
    """`tasks.results.results` in the order of the texts; a row that is not finite is its own request's error."""
    order, found = results(model, tokens, compute, (len(tokens.lengths), width), batch_tokens, None)
    rows = np.empty_like(found)
    rows[order] = found
    return rows


def _theirs(folder: Path, task: Task, dtype: DTypeName | None, device: str | None, batch_tokens: int | None) -> Engine:
    """sentence-transformers, to be compared with: batches of 32 texts of like length, padded, as its `encode` makes."""
    from sentence_transformers import SentenceTransformer

    if task != "embed":
        raise ArgumentError("--task", task, "embed, with --engine sentence-transformers")
    if dtype == "int8":
        raise ArgumentError("--dtype", dtype, "fp32, bf16 or fp16, with --engine sentence-transformers")
    model: Any = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": DTYPES[dtype or "fp32"]})
    if type(model[-1]).__name__ == "Normalize":  # whose module has moved from version to version
        del model[-1]
    model.eval()

    def tokenize(texts: Sequence[Text], most: int) -> Tokens:
        ids: list[list[int]] = model.tokenizer(list(texts), truncation=True, max_length=most)["input_ids"]
        joined = np.array([token for row in ids for token in row], np.int32)
        return Tokens(joined, None, np.cumsum([0, *map(len, ids)], dtype=np.int64))

    @torch.inference_mode()
    def compute(tokens: Tokens) -> Rows:
        rows = np.empty((len(tokens.lengths), width), np.float32)
        order = np.argsort(-tokens.lengths, kind="stable")
        for texts in np.split(order, range(THEIR_BATCH, len(order), THEIR_BATCH)):
            ids = [tokens.ids[tokens.offsets[text] : tokens.offsets[text + 1]] for text in texts]
            features = model.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
            rows[texts] = model(features)["sentence_embedding"][:, :width].float().cpu().numpy()
        return rows

    width = model.get_embedding_dimension()
    return Engine(
        task="embed",
        tokenize=tokenize,
        compute=compute,
        width=width,
        longest=model.max_seq_length,
        batch_tokens=batch_tokens or 8192,
        vocabulary=len(model.tokenizer),
        prompts={name: prompt or "" for name, prompt in model.prompts.items()},
        prompt_name=model.default_prompt_name,
    )
