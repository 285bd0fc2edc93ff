"""A checkpoint as ONNX: what its own class computes, recorded by torch's exporter and compared in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastbert import backend
from fastbert.checkpoints.architectures import architectures
from fastbert.checkpoints.load import Origin, read_model
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.installed import optional
from fastbert.model.body import EncoderModel, token_positions_on_grid
from fastbert.model.heads import (
    EncoderForMaskedLM,
    EncoderForQuestionAnswering,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    HeadModel,
    body_of,
)
from fastbert.run import eager, padded
from fastbert.run.eager import Registers

_HEADS: tuple[type[HeadModel], ...] = (
    EncoderForMaskedLM,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    EncoderForQuestionAnswering,
)
# Of the largest result, how much a result in onnxruntime may differ; and batches that are compared, as [batch, seqlen].
TOLERANCE, COMPARED = 1e-4, ((2, 11), (1, 1), (5, 29))
# A file of protobuf holds at most 2 GiB; weights above that go to a file beside it.
MOST_BYTES = 2**31 - 2**20


def export(folder: Path, path: Path) -> None:
    """Write the model of a checkpoint folder as ONNX, in float32.

    The inputs are `input_ids` and `attention_mask`, int64 `[batch, seqlen]`, and `token_type_ids` where the model has
    several types. The outputs are transformers': `last_hidden_state`, and `pooler_output` where there is a pooler; or
    `logits`; or `start_logits` and `end_logits`. At padding they have numbers without meaning.

    Args:
        folder: of the transformer. The class that its config.json names first is written; without a head where that is
            none of those for masked tokens, texts, tokens or answers.
        path: of the file, in a folder that is there.

    Raises:
        ArgumentError: the model has what is not recorded: disentangled attention, a convolution; or it is in int8.
        BackendError: results in onnxruntime differ.
        CheckpointError: the folder is not a checkpoint fastbert reads, or lacks the head that it names.
        MissingError: onnx, onnxscript or onnxruntime is not installed.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        optional(module, "onnx", "to write ONNX and to compare it")
    model = _model(folder)
    recorded = _Recorded(model).eval()
    names = recorded.inputs
    arguments = tuple(_batch(recorded, *COMPARED[0])[name] for name in names)
    own = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {name: {0: "batch", 1: "seqlen"} if name == names[0] else own for name in names}
    size = sum(parameter.nbytes for parameter in model.parameters())
    with backend.use_backend("torch"), torch.no_grad():
        torch.onnx.export(
            recorded,
            arguments,
            str(path),
            input_names=list(names),
            output_names=list(recorded.outputs),
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=size > MOST_BYTES,
            verbose=False,
        )
    _compare(recorded, path)


def _model(folder: Path) -> EncoderModel | HeadModel:
    body, _ = read_model(folder, EncoderModel)
    if body.encoder.in_eight_bits() is not None:
        mend = "Convert it first: fastbert convert --dtype fp32"
        raise ArgumentError("folder", f"{folder}, which is in int8", "a folder in floats", mend)
    origin: Origin = body.origin
    named = architectures(origin.config)[:1]
    for kind in _HEADS:
        if named == [origin.dialect.class_name(kind)]:
            model, untrained = read_model(folder, kind, dtype=torch.float32)
            if untrained:
                got = f"no trained {named[0]}, which config.json names: it lacks {', '.join(untrained)}"
                raise CheckpointError(str(folder), got, "a checkpoint with its head", "Train it first.")
            return model
    return body.float()


class _Recorded(nn.Module):
    """A model as transformers' class of it is called, on a padded grid, with the same work wherever the padding is."""

    def __init__(self, model: EncoderModel | HeadModel) -> None:
        super().__init__()
        self.model, config = model, model.config
        layers = body_of(model).encoder.layers()
        if (reason := padded.unserved(layers)) is not None:
            mend = "Export transformers' own model."
            raise ArgumentError("to", f"'onnx', of a model with {reason}", "a model without it", mend)
        self.angles = padded.angles_of(layers, config.longest, config.head_dim)
        typed = config.type_vocab_size > 1
        self.inputs = ("input_ids", "attention_mask", *(["token_type_ids"] if typed else []))
        # By their names, whether a token has each, or a text.
        self.outputs: dict[str, bool] = {"logits": not isinstance(model, EncoderForSequenceClassification)}
        if isinstance(model, EncoderForQuestionAnswering):
            self.outputs = {"start_logits": True, "end_logits": True}
        elif isinstance(model, EncoderModel):
            self.outputs = {"last_hidden_state": True, **({"pooler_output": False} if model.pooler else {})}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        batch, seqlen = input_ids.shape
        body, grid = body_of(self.model), padded.Grid(attention_mask != 0, self.angles)
        packing = padded.whole_grid(batch, seqlen, input_ids.device)
        if self.model.config.positions == "tokens":
            positions = token_positions_on_grid(self.model.config, input_ids).flatten()
        else:
            columns = torch.arange(seqlen, dtype=torch.int64, device=input_ids.device)
            positions = (columns + self.model.config.first_position).expand(batch, seqlen).flatten()
        types = None if token_type_ids is None else token_type_ids.flatten()
        x = body.embeddings(input_ids.flatten(), positions, types)
        registers = Registers(body.encoder.registers(x, packing) if len(body.encoder.layer) else {"x": x})
        for steps, parts in body.encoder.layers():
            x = eager.run(steps, parts, registers, packing, attention=grid.attend)
        return self._answer(x, grid.is_token)

    def _answer(self, x: Tensor, is_token: Tensor) -> tuple[Tensor, ...]:
        """The outputs, of the last rows `[batch * seqlen, hidden]`."""
        model, body = self.model, body_of(self.model)
        on_grid = (*is_token.shape, -1)
        if isinstance(model, EncoderForMaskedLM):
            return (model.predictions.logits(x, body.embeddings.word.weight).view(on_grid),)
        if isinstance(model, EncoderForSequenceClassification):
            states = x.view(on_grid)
            pooled = states[:, 0]
            if model.config.heads.pooling == "mean":
                weights = is_token.unsqueeze(2).to(x.dtype)
                pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
            pooled = body.pool(pooled) if model.transform is None else model.transform(pooled, _as_it_is)
            return (model.classifier(pooled),)
        if isinstance(model, EncoderForTokenClassification | EncoderForQuestionAnswering):
            x = x if model.transform is None else model.transform(x, _as_it_is)
            if isinstance(model, EncoderForTokenClassification):
                return (model.classifier(x).view(on_grid),)
            start, end = model.qa_outputs(x).view(on_grid).unbind(-1)
            return start, end
        states = x.view(on_grid)
        return states, *([body.pool(states[:, 0])] if body.pooler is not None else [])


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _batch(recorded: _Recorded, batch: int, seqlen: int) -> dict[str, Tensor]:
    """Random ids, as many as the model has places for, in texts of several lengths."""
    config = recorded.model.config
    seqlen = min(seqlen, config.longest)
    draw = torch.Generator("cpu").manual_seed(seqlen)
    ids = torch.randint(config.vocab_size, (batch, seqlen), generator=draw, device="cpu", dtype=torch.int64)
    lengths = torch.arange(batch, dtype=torch.int64, device="cpu") * seqlen // max(batch, 1) + 1
    mask = (torch.arange(seqlen, dtype=torch.int64, device="cpu") < lengths.flip(0)[:, None]).long()
    mask[0] = 1
    if (padding := config.pad_token_id) is not None:  # which counts as no token in some families
        ids = torch.where(ids == padding, (padding + 1) % config.vocab_size, ids).where(mask == 1, padding)
    types = torch.randint(max(config.type_vocab_size, 1), ids.shape, generator=draw, device="cpu", dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _compare(recorded: _Recorded, path: Path) -> None:
    """Raise BackendError where onnxruntime computes something else than the model, at tokens."""
    runtime: Any = optional("onnxruntime", "onnx", "to compare what was written")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for shape in COMPARED:
        given = {name: tensor for name, tensor in _batch(recorded, *shape).items() if name in recorded.inputs}
        with torch.no_grad():
            expected = _results(recorded, given)
        found = session.run(list(recorded.outputs), {name: tensor.numpy() for name, tensor in given.items()})
        is_token = given["attention_mask"] == 1
        for (name, of_tokens), result in zip(recorded.outputs.items(), found, strict=True):
            got, wanted = torch.from_numpy(result), expected[name]
            if got.shape != wanted.shape:
                raise BackendError("onnxruntime", f"{name} of shape {tuple(got.shape)}", f"{tuple(wanted.shape)}")
            got, wanted = (got[is_token], wanted[is_token]) if of_tokens else (got, wanted)
            error, most = (got - wanted).abs().max().item(), TOLERANCE * wanted.abs().max().item()
            if not error <= most:
                raise BackendError("onnxruntime", f"{name} that differs by {error:.3g}", f"at most {most:.3g}")


def _results(recorded: _Recorded, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = recorded.model(**given)
    return {name: cast("Tensor", getattr(out, name)) for name in recorded.outputs}
