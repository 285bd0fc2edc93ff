"""Rivals that run a whole encoder: each makes a function of padded ids and mask out of a checkpoint folder.

    graph = optimised(Source(folder), scratch)
    hidden = onnxruntime_model(graph)(ids, mask)    # [batch, seqlen] -> [batch, seqlen, hidden]

Graphs are files in a folder that the caller names; one that is there already is not made again. All rivals compute on
as many threads as torch does. What a function returns is where the runtime left it: a torch tensor, or a numpy array
that shares its memory.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.writing import making, replacing

Run = Callable[..., Any]

# What dynamic int8 may do to a row: it rounds activations anew in each product. The worst embedding of 1,000 reviews of
# films by MiniLM had a cosine of 0.894 to that of float32.
INT8_COSINE = 0.85


class UnservedError(Exception):
    """A rival is not installed, or can't run what it is asked for; the message says why."""


def installed(module: str) -> ModuleType:
    """Import it.

    Raises:
        UnservedError: it is not installed, or not beside the versions of what it needs that are here.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UnservedError(f"{module.partition('.')[0]} is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnservedError(f"{module} can't be imported: {error}") from error


@dataclass(frozen=True)
class Source:
    """What is made into a graph.

    Attributes:
        folder: a checkpoint.
        inputs: what the graph is a function of, by transformers' names, in this order: int64 `[batch, seqlen]` each.
        head: it gives the logits of the checkpoint's classifier `[batch, labels]`, in place of hidden states.
    """

    folder: Path
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    head: bool = False


def transformers_model(
    folder: Path, dtype: torch.dtype, device: torch.device, *, attention: str | None = "sdpa", head: bool = False
) -> nn.Module:
    """transformers' model of a checkpoint, in eval mode: its body, without pooler, or with `head` its classifier.

    Args:
        folder: the checkpoint.
        dtype: of its parameters.
        device: where they are.
        attention: a name of transformers'; None for its own choice, which is SDPA where a model has it.
        head: whether to load the classifier.

    Raises:
        UnservedError: transformers is not installed.
    """
    transformers: Any = installed("transformers")
    kind = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
    with quiet_transformers():
        model = kind.from_pretrained(folder, attn_implementation=attention, dtype=dtype)
    if not head and getattr(model, "pooler", None) is not None:
        model.pooler = None  # nobody reads what it makes
    return model.eval().to(device)


class _Answer(nn.Module):
    """A model of transformers as a function of tensors to one tensor, for export."""

    def __init__(self, model: nn.Module, source: Source) -> None:
        super().__init__()
        self.model, self.source = model, source

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.model(**dict(zip(self.source.inputs, inputs, strict=True)))
        return out.logits if self.source.head else out.last_hidden_state


def exported(source: Source, into: Path) -> Path:
    """transformers' model as ONNX, batch and length left open; of its attentions the one that onnxruntime can fuse.

    Raises:
        UnservedError: onnx or transformers is not installed.
    """
    path = into / "model.onnx"
    if path.exists():
        return path
    installed("onnx")
    model = transformers_model(source.folder, torch.float32, torch.device("cpu"), attention="eager", head=source.head)
    ids = torch.full((2, 16), 7, dtype=torch.int64, device="cpu")  # no padding in any family
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0  # a full mask would be traced away
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    axes = {name: {0: "batch", 1: "seqlen"} for name in source.inputs}
    axes["out"] = {0: "batch"} if source.head else {0: "batch", 1: "seqlen"}
    with quietly(), torch.no_grad(), replacing(path) as temporary:
        torch.onnx.export(
            _Answer(model, source).eval(), tuple(given[name] for name in source.inputs), str(temporary),
            input_names=list(source.inputs), output_names=["out"], dynamic_axes=axes, dynamo=False,
        )  # fmt: skip
    return path


def optimised(source: Source, into: Path) -> Path:
    """The export with onnxruntime's fused attention, LayerNorm and GELU for BERT.

    Raises:
        UnservedError: onnxruntime, onnx or transformers is not installed, or the model's layers are not like BERT's.
    """
    path = into / "optimised.onnx"
    if path.exists():
        return path
    graph = exported(source, into)
    optimizer: Any = installed("onnxruntime.transformers.optimizer")
    shape: Any = installed("transformers").AutoConfig.from_pretrained(source.folder)
    with quietly():
        model = optimizer.optimize_model(
            str(graph),
            model_type="bert",
            num_heads=shape.num_attention_heads,
            hidden_size=shape.hidden_size,
            opt_level=0,  # its own session does the rest
        )
    fused = model.get_fused_operator_statistics()
    if fused["Attention"] != shape.num_hidden_layers:
        raise UnservedError(f"onnxruntime's optimizer did not know the graph: it fused {fused}")
    with replacing(path) as temporary:
        model.save_model_to_file(str(temporary))
    return path


def quantised(graph: Path) -> Path:
    """A graph with int8 weights, and activations rounded to int8 before each product.

    Raises:
        UnservedError: onnxruntime or onnx is not installed.
    """
    path = graph.with_name(f"{graph.stem}-int8.onnx")
    if path.exists():
        return path
    quantization: Any = installed("onnxruntime.quantization")
    onnx: Any = installed("onnx")
    with quietly(), replacing(path) as temporary:
        quantization.quantize_dynamic(
            str(graph),
            str(temporary),
            weight_type=quantization.QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # the fused operators' results have no type
        )
    return path


def onnxruntime_model(graph: Path) -> Run:
    """onnxruntime on the CPU.

    Raises:
        UnservedError: onnxruntime is not installed.
    """
    onnxruntime: Any = installed("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: Tensor) -> Any:
        return session.run(None, {name: one.numpy() for name, one in zip(names, inputs, strict=True)})[0]

    return run


def openvino_model(graph: Path, dtype: torch.dtype) -> Run:
    """OpenVINO on the CPU, told to compute in float32 or bfloat16.

    Raises:
        UnservedError: OpenVINO is not installed.
    """
    openvino: Any = installed("openvino")
    core = openvino.Core()
    request = core.compile_model(core.read_model(graph), "CPU", openvino_options(dtype)).create_infer_request()

    def run(*inputs: Tensor) -> Any:
        return request.infer([one.numpy() for one in inputs], share_inputs=True, share_outputs=True)[0]

    return run


def openvino_options(dtype: torch.dtype) -> dict[str, Any]:
    """What OpenVINO is told: what to compute in, for it would take bfloat16 by itself, and on how many threads."""
    return {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # all threads work on one batch
    }


def converted(folder: Path, into: Path) -> Path:
    """The checkpoint of a BERT in CTranslate2's format, a folder.

    Raises:
        UnservedError: CTranslate2 or transformers is not installed.
    """
    path = into / "ctranslate2"
    if path.exists():
        return path
    converters: Any = installed("ctranslate2.converters")
    installed("transformers")
    # It reads a field that transformers 5 does not write any more, and a vocabulary that nothing here needs.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"position_embedding_type": "absolute"}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"word{i}" for i in range(len(words), config["vocab_size"])]
    with making(path) as made, tempfile.TemporaryDirectory(dir=into) as source, quietly():
        for file in folder.iterdir():
            (Path(source) / file.name).symlink_to(file.resolve())
        (Path(source) / "config.json").unlink()
        (Path(source) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if not (folder / "vocab.txt").exists():
            (Path(source) / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        converters.TransformersConverter(source).convert(str(made), force=True)
    return path


def ctranslate2_model(converted: Path) -> Run:
    """CTranslate2's BERT encoder on the CPU, in float32.

    Raises:
        UnservedError: CTranslate2 is not installed.
    """
    ctranslate2: Any = installed("ctranslate2")
    encoder = ctranslate2.Encoder(
        str(converted), device="cpu", compute_type="float32", intra_threads=torch.get_num_threads()
    )

    def run(ids: Tensor, mask: Tensor) -> Any:
        lengths = mask.sum(1, dtype=torch.int32).numpy()
        view = ctranslate2.StorageView.from_array
        return encoder.forward_batch(view(ids.int().numpy()), view(lengths)).last_hidden_state

    return run


def failures() -> tuple[type[Exception], ...]:
    """What rivals were seen to raise of a model or a machine that they don't know, our own errors among them.

    onnxruntime's have no base of their own.
    """
    known = (UnservedError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
    onnxruntime: Any = sys.modules.get("onnxruntime.capi.onnxruntime_pybind11_state")
    theirs = () if onnxruntime is None else vars(onnxruntime).values()
    return (*known, *(one for one in theirs if isinstance(one, type) and issubclass(one, Exception)))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars and warnings, if it is installed."""
    try:
        logging: Any = installed("transformers").utils.logging
    except UnservedError:
        yield
        return
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Converters print progress and warn of their own code."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
