"""Who takes part in `bench`: other libraries on texts, as a careful user of them calls them, and fastbert.

A contender is made of a `Job` and then called with texts. All of them begin with strings, so tokenising is theirs too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.checkpoints.files import checkpoint_folder, has
from fastbert.checkpoints.load import trained_head
from fastbert.checkpoints.sentence import MODULES, read_recipe
from fastbert.model.heads import EncoderForSequenceClassification
from fastbert.model.sentence import ACTIVATIONS, Embedder
from fastbert.rivals import runtimes
from fastbert.rivals.runtimes import Run, Source, UnservedError, installed
from fastbert.tasks.classify import Classification, TextClassifier
from fastbert.tasks.encode import TextEncoder
from fastbert.tasks.loading import DTYPES, DTypeName, unserved
from fastbert.tasks.max_length import tokens_at_most
from fastbert.tasks.score import TextScorer
from fastbert.text.checks import Text
from fastbert.text.tokenizer import Tokenizer

BATCH = 32  # texts; sentence-transformers' default

Kind = Literal["embeddings", "labels", "scores"]
Answers = npt.NDArray[np.float32]  # [texts, columns]: embeddings, the probability of each label, or one score
# Of a model's output, hidden states [batch, seqlen, hidden] or logits [batch, labels], and the mask [batch, seqlen].
Answer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Job:
    """A model, and what is asked of it.

    Attributes:
        folder: the checkpoint, as the user has it.
        transformer: the folder in it, or itself, that transformers reads.
        kind: what it makes of texts.
        device: where all compute.
        max_length: most tokens of a text.
        pairs: texts are pairs of strings.
        tokenizer: ours, to count tokens with.
        embedder: what makes embeddings of hidden states; None for other kinds.
        activation: what is applied to logits; None for embeddings.
        lower_case: texts are to be lowercased before anyone gets them, because the folder says so.
        scratch: a folder for graphs.
    """

    folder: Path
    transformer: Path
    kind: Kind
    device: torch.device
    max_length: int
    pairs: bool
    tokenizer: Tokenizer
    embedder: Embedder | None
    activation: Callable[[Tensor], Tensor] | None
    lower_case: bool
    scratch: Path

    @classmethod
    def of(
        cls, folder: str | os.PathLike[str], device: torch.device, max_length: int | None, *, pairs: bool, scratch: Path
    ) -> Job:
        """What the model in this folder is for: embeddings, unless it has a trained classifier and no modules.json.

        Raises:
            ArgumentError: `max_length` is not one of this model's.
            CheckpointError: fastbert does not read the folder.
        """
        path = checkpoint_folder(folder)
        head = None if has(path / MODULES) else trained_head(path, EncoderForSequenceClassification)
        embedder: Embedder | None = None
        activation: Callable[[Tensor], Tensor] | None = None
        transformer, lower_case, recipe_limit = path, False, None
        model: TextEncoder | TextClassifier | TextScorer
        kind: Kind
        if head is None:
            kind = "embeddings"
            model = TextEncoder.from_folder(path, dtype="fp32", device=device)
            embedder, recipe = model.embedder(), model.recipe
            transformer, lower_case, recipe_limit = read_recipe(path, device)[0], recipe.lower_case, recipe.max_length
        elif len(head.labels) > 1:
            kind = "labels"
            model = TextClassifier.from_folder(path, dtype="fp32", device=device)
            several = head.problem_type == "multi_label_classification"
            activation = torch.sigmoid if several else partial(torch.softmax, dim=1)
        else:
            kind = "scores"
            model = TextScorer.from_folder(path, dtype="fp32", device=device)
            activation = ACTIVATIONS[model.activation]
        longest = tokens_at_most(max_length, model.tokenizer, model.model.config, recipe_limit)
        return cls(
            path, transformer, kind, device, longest, pairs, model.tokenizer, embedder, activation, lower_case, scratch
        )

    @cached_property
    def their_tokenizer(self) -> Any:
        """transformers', which pads on the right: whoever pools by hand reads the first token in column 0.

        Raises:
            UnservedError: transformers is not installed.
        """
        return installed("transformers").AutoTokenizer.from_pretrained(self.transformer, padding_side="right")

    @property
    def source(self) -> Source:
        """The model as a function of tensors: which ones, and whether its head is asked."""
        types = ["token_type_ids"] if self.pairs and "token_type_ids" in self.their_tokenizer.model_input_names else []
        return Source(self.transformer, ("input_ids", "attention_mask", *types), head=self.kind != "embeddings")

    def answer(self, out: Tensor, mask: Tensor) -> Tensor:
        """What a user of a bare model does with its output: float32 `[batch, columns]`.

        Args:
            out: hidden states `[batch, seqlen, hidden]`, or logits `[batch, labels]`.
            mask: `[batch, seqlen]`, 0 at padding.
        """
        if self.activation is not None:
            return self.activation(out.float())
        assert self.embedder is not None
        x = out[:, 0].float() if self.embedder.pooling == ("cls",) else mean(out, mask)
        for layer in self.embedder.layers:
            x = layer(x)
        return x


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Of the hidden states `[batch, seqlen, hidden]` of each text, padding left out: float32 `[batch, hidden]`."""
    weight = mask.unsqueeze(-1)
    return (hidden.float() * weight).sum(1) / weight.sum(1)


@dataclass(frozen=True)
class Contender:
    """A library with the model loaded.

    Attributes:
        run: texts to what the library makes of them; this is timed.
        array: that as answers; this is not.
    """

    run: Callable[[Sequence[Text]], Any]
    array: Callable[[Any], Answers] = np.asarray


@dataclass(frozen=True)
class Entry:
    """Who wants to take part, in what.

    Attributes:
        name: of the library.
        dtype: what it computes in.
        make: loads the model. It raises UnservedError with the reason why it can't.
    """

    name: str
    dtype: DTypeName
    make: Callable[[Job], Contender]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"


def entries(device: torch.device) -> list[Entry]:
    """All that are known, in float32 first, transformers before the others; in dtypes that serve this device."""
    served = [dtype for dtype in DTYPES if dtype not in unserved(device)]
    floats = [dtype for dtype in served if dtype != "int8"]
    known = [Entry("transformers", dtype, partial(_transformers, dtype)) for dtype in floats]
    known += [Entry("sentence-transformers", dtype, partial(_sentence_transformers, dtype)) for dtype in floats]
    known += [Entry("onnxruntime", "fp32", _onnxruntime), Entry("onnxruntime", "int8", _onnxruntime_int8)]
    known += [Entry("OpenVINO", dtype, partial(_openvino, dtype)) for dtype in floats if dtype != "fp16"]
    known += [Entry("fastbert", dtype, partial(_fastbert, dtype)) for dtype in served]
    return sorted(known, key=lambda entry: entry.dtype != "fp32")


def by_length(
    tokenizer: Any,
    run: Run,
    answer: Answer,
    *,
    max_length: int,
    device: torch.device,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
) -> Callable[[Sequence[Text]], Answers]:
    """What a careful user writes around a bare model: texts sorted by length, in batches of 32, padded to the longest.

    Args:
        tokenizer: transformers'.
        run: of the tensors that `inputs` names, int64 `[batch, seqlen]`; gives the model's output.
        answer: what becomes of the output.
        max_length: most tokens of a text.
        device: where tensors are put.
        inputs: names of tensors that the tokenizer makes.
    """

    @torch.inference_mode()
    def answers(texts: Sequence[Text]) -> Answers:
        columns = [texts] if isinstance(texts[0], str) else zip(*texts, strict=True)
        made = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
        ids = made["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        parts = []
        for begin in range(0, len(order), BATCH):
            batch = {name: [made[name][i] for i in order[begin : begin + BATCH]] for name in inputs}
            padded = tokenizer.pad(batch, return_tensors="pt").to(device)
            out = run(*(padded[name] for name in inputs))
            out = out if isinstance(out, Tensor) else torch.from_numpy(np.asarray(out))
            parts.append(answer(out, padded["attention_mask"]))
        rows = torch.cat(parts).float().cpu().numpy()
        found = np.empty_like(rows)
        found[order] = rows
        return found

    return answers


def _bare(job: Job, run: Run) -> Contender:
    """A contender around a model that knows ids and no texts."""
    if job.embedder is not None and job.embedder.pooling not in (("mean",), ("cls",)):
        raise UnservedError(f"its users write the pooling, and nobody writes {' and '.join(job.embedder.pooling)}")
    return Contender(
        by_length(
            job.their_tokenizer,
            run,
            job.answer,
            max_length=job.max_length,
            device=job.device,
            inputs=job.source.inputs,
        )
    )


def _transformers(dtype: DTypeName, job: Job) -> Contender:
    source = job.source
    model = runtimes.transformers_model(job.transformer, DTYPES[dtype], job.device, attention=None, head=source.head)

    def run(*inputs: Tensor) -> Tensor:
        out = model(**dict(zip(source.inputs, inputs, strict=True)))
        return out.logits if source.head else out.last_hidden_state

    return _bare(job, run)


def _sentence_transformers(dtype: DTypeName, job: Job) -> Contender:
    library: Any = installed("sentence_transformers")
    options = {"device": str(job.device), "model_kwargs": {"dtype": DTYPES[dtype]}}
    asked = {"batch_size": BATCH, "show_progress_bar": False, "convert_to_tensor": True}
    if job.embedder is not None:
        model = library.SentenceTransformer(str(job.folder), **options)
        model.max_seq_length = job.max_length
        normalised = job.embedder.layers[-1:] == (F.normalize,)
        run = partial(model.encode, prompt="", normalize_embeddings=normalised, **asked)
    elif job.pairs:
        model = library.CrossEncoder(str(job.folder), max_length=job.max_length, **options)
        run = partial(model.predict, activation_fn=job.activation, **asked)
    else:
        raise UnservedError("it labels and scores pairs of texts only")
    return Contender(lambda texts: run(texts).float().cpu().numpy(), lambda made: made.reshape(len(made), -1))


def _graph(job: Job) -> Path:
    """The model as onnxruntime runs it best: optimised for BERT, or as it was exported where its layers are not so."""
    _on_cpu(job)
    installed("onnxruntime")
    try:
        return runtimes.optimised(job.source, job.scratch)
    except UnservedError:
        return runtimes.exported(job.source, job.scratch)


def _onnxruntime(job: Job) -> Contender:
    return _bare(job, runtimes.onnxruntime_model(_graph(job)))


def _onnxruntime_int8(job: Job) -> Contender:
    return _bare(job, runtimes.onnxruntime_model(runtimes.quantised(_graph(job))))


def _openvino(dtype: DTypeName, job: Job) -> Contender:
    _on_cpu(job)
    installed("openvino")
    return _bare(job, runtimes.openvino_model(runtimes.exported(job.source, job.scratch), DTYPES[dtype]))


def _on_cpu(job: Job) -> None:
    if job.device.type != "cpu":
        raise UnservedError("it is compared on CPUs only")


def _fastbert(dtype: DTypeName, job: Job) -> Contender:
    if job.kind == "embeddings":
        encoder = TextEncoder.from_folder(job.folder, dtype=dtype, device=job.device)
        return Contender(partial(encoder.encode, max_length=job.max_length, prompt=""))
    if job.kind == "scores":
        scorer = TextScorer.from_folder(job.folder, dtype=dtype, device=job.device)
        return Contender(partial(scorer.score, max_length=job.max_length), lambda made: made[:, None])
    classifier = TextClassifier.from_folder(job.folder, dtype=dtype, device=job.device)
    labels = classifier.model.head_config.labels

    def probabilities(found: list[Classification]) -> Answers:
        return np.array([[one.probabilities[label] for label in labels] for one in found], np.float32)

    return Contender(partial(classifier.classify, max_length=job.max_length), probabilities)
