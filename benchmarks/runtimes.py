"""Rivals that run a whole BERT: each makes a function of padded ids and mask out of a checkpoint folder.

    hidden = onnxruntime_model(folder, int8=False)(ids, mask)    # [batch, seqlen] -> [batch, seqlen, hidden]

All of them compute on as many threads as torch does. What a function returns is where the runtime left it: a torch
tensor, or a numpy array that shares its memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from contest import Case, Contender, Provider, UnservedError
from providers import compiled, installed
from torch import Tensor, nn
from workloads import MODELS, POSITIONS, VOCABULARY

from fastbert import BertModel, EncoderConfig, save

Run = Callable[[Tensor, Tensor], Any]

# What dynamic int8 may do to a row: it rounds activations anew in each product. The worst embedding of 1,000 reviews of
# films by MiniLM had a cosine of 0.894 to that of float32.
INT8_COSINE = 0.85

_made = tempfile.TemporaryDirectory(prefix="fastbert-bench-")  # removed when the process ends


def checkpoint(model: str, seqlen: int) -> Path:
    """A checkpoint folder of a model of `workloads.MODELS` with random weights, for sequences as long as `seqlen`."""
    return _checkpoint(model, max(seqlen, POSITIONS))


@cache
def _checkpoint(model: str, positions: int) -> Path:
    shape = MODELS[model]
    config = EncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_positions=positions,
    )
    torch.manual_seed(0)
    bert = BertModel(config, pooler=False)
    with torch.no_grad():
        for parameter in bert.parameters():  # biases of 0 and norms of 1 would hide who forgets them
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder = Path(_made.name) / f"{model}-{positions}"
    save(bert, folder)
    return folder


def transformers_model(folder: Path, dtype: torch.dtype, device: torch.device, *, attention: str = "sdpa") -> nn.Module:
    """transformers' BertModel, in eval mode, without pooler.

    Raises:
        UnservedError: transformers is not installed.
    """
    transformers: Any = installed("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(
        folder, attn_implementation=attention, dtype=dtype, add_pooling_layer=False
    )
    return model.eval().to(device)


def hidden_states(model: nn.Module) -> nn.Module:
    """A model of transformers as a module of ids and mask that gives hidden states, for export."""
    return _HiddenStates(model).eval()


class _HiddenStates(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


@cache
def _exported(folder: Path) -> Path:
    """transformers' model as ONNX, batch and length left open; of its attentions the one that onnxruntime can fuse."""
    installed("onnx")
    model = transformers_model(folder, torch.float32, torch.device("cpu"), attention="eager")
    path = _scratch(folder) / "model.onnx"
    ids = torch.ones(2, 16, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0  # a full mask would be traced away
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "seqlen"} for name in (*names, "hidden")}
    with quietly(), torch.no_grad():
        torch.onnx.export(
            hidden_states(model), (ids, mask), str(path),
            input_names=names, output_names=["hidden"], dynamic_axes=axes, dynamo=False,
        )  # fmt: skip
    return path


@cache
def _optimised(folder: Path) -> Path:
    """The export with onnxruntime's fused attention, LayerNorm and GELU for BERT."""
    exported = _exported(folder)
    optimizer: Any = installed("onnxruntime.transformers.optimizer")
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with quietly():
        model = optimizer.optimize_model(
            str(exported),
            model_type="bert",
            num_heads=shape["num_attention_heads"],
            hidden_size=shape["hidden_size"],
            opt_level=0,  # its own session does the rest
        )
    fused = model.get_fused_operator_statistics()
    if fused["Attention"] != shape["num_hidden_layers"]:
        raise UnservedError(f"onnxruntime's optimizer did not know the graph: it fused {fused}")
    path = _scratch(folder) / "optimised.onnx"
    model.save_model_to_file(str(path))
    return path


@cache
def _quantised(folder: Path) -> Path:
    """The optimised graph with int8 weights, and activations rounded to int8 before each product."""
    optimised = _optimised(folder)
    quantization: Any = installed("onnxruntime.quantization")
    onnx: Any = installed("onnx")
    path = _scratch(folder) / "int8.onnx"
    with quietly():
        quantization.quantize_dynamic(
            str(optimised),
            str(path),
            weight_type=quantization.QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # the fused operators' results have no type
        )
    return path


def onnxruntime_model(folder: Path, *, int8: bool) -> Run:
    """onnxruntime on the CPU, its graph optimised for BERT, in float32 or dynamic int8.

    Raises:
        UnservedError: onnxruntime, onnx or transformers is not installed.
    """
    onnxruntime: Any = installed("onnxruntime")
    path = _quantised(folder) if int8 else _optimised(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(ids: Tensor, mask: Tensor) -> Any:
        return session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]

    return run


def openvino_model(folder: Path, dtype: torch.dtype) -> Run:
    """OpenVINO on the CPU, told to compute in float32 or bfloat16.

    Raises:
        UnservedError: OpenVINO, onnx or transformers is not installed.
    """
    openvino: Any = installed("openvino")
    core = openvino.Core()
    compiled_model = core.compile_model(core.read_model(_exported(folder)), "CPU", openvino_options(dtype))
    request = compiled_model.create_infer_request()

    def run(ids: Tensor, mask: Tensor) -> Any:
        return request.infer([ids.numpy(), mask.numpy()], share_inputs=True, share_outputs=True)[0]

    return run


def openvino_options(dtype: torch.dtype) -> dict[str, Any]:
    """What OpenVINO is told: what to compute in, for it would take bfloat16 by itself, and on how many threads."""
    return {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # all threads work on one batch
    }


def ctranslate2_model(folder: Path) -> Run:
    """CTranslate2's BERT encoder on the CPU, in float32.

    Raises:
        UnservedError: CTranslate2 or transformers is not installed.
    """
    ctranslate2: Any = installed("ctranslate2")
    encoder = ctranslate2.Encoder(
        str(_converted(folder)), device="cpu", compute_type="float32", intra_threads=torch.get_num_threads()
    )

    def run(ids: Tensor, mask: Tensor) -> Any:
        lengths = mask.sum(1, dtype=torch.int32).numpy()
        view = ctranslate2.StorageView.from_array
        return encoder.forward_batch(view(ids.int().numpy()), view(lengths)).last_hidden_state

    return run


def torchao_model(folder: Path) -> Run:
    """transformers' model by torch.compile, whose linear layers TorchAO has quantized: int8 weights, and activations
    rounded to int8 row by row before each product.

    Raises:
        UnservedError: TorchAO or transformers is not installed, or there is no C++ compiler.
    """
    with quietly():  # it tells of kernels for GPUs that it can't load
        quantization: Any = installed("torchao.quantization")
        utilities: Any = installed("torchao.utils")
    model = transformers_model(folder, torch.float32, torch.device("cpu"))
    reduced = utilities.should_reduce_range(torch.device("cpu"))  # without VNNI sums of the whole range overflow
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig(reduce_range=reduced))
    run = compiled(model, dynamic=True)
    return lambda ids, mask: run(input_ids=ids, attention_mask=mask).last_hidden_state


@cache
def _converted(folder: Path) -> Path:
    converters: Any = installed("ctranslate2.converters")
    installed("transformers")
    source = _scratch(folder) / "for-ctranslate2"
    source.mkdir()
    for file in folder.iterdir():
        (source / file.name).symlink_to(file.resolve())
    # It reads a field that transformers 5 does not write any more, and a vocabulary that nothing here needs.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"position_embedding_type": "absolute"}
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if not (source / "vocab.txt").exists():
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words += [f"word{i}" for i in range(len(words), config["vocab_size"])]
        (source / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    converted = _scratch(folder) / "ctranslate2"
    with quietly():
        converters.TransformersConverter(str(source)).convert(str(converted))
    return converted


@cache
def _scratch(folder: Path) -> Path:
    """A folder for what is made of a checkpoint."""
    return Path(tempfile.mkdtemp(dir=_made.name, prefix=f"{folder.name}-"))


@contextlib.contextmanager
def quietly() -> Any:
    """Converters print progress and warn of their own code."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def providers(contend: Callable[[Case, Any, Run], Contender]) -> dict[str, Provider]:
    """The runtimes as providers by name, for forward passes on a CPU.

    Args:
        contend: makes a contender of a case, its operands, which have the checkpoint's `folder`, and a function.
    """

    def onnxruntime(case: Case, of: Any) -> Contender:
        on_cpu_forward(case, "fp32")
        return contend(case, of, onnxruntime_model(of.folder, int8=False))

    def onnxruntime_int8(case: Case, of: Any) -> Contender:
        on_cpu_forward(case, "fp32")
        return in_int8(contend(case, of, onnxruntime_model(of.folder, int8=True)))

    def openvino(case: Case, of: Any) -> Contender:
        on_cpu_forward(case, "fp32", "bf16")
        return contend(case, of, openvino_model(of.folder, case.torch_dtype))

    def ctranslate2(case: Case, of: Any) -> Contender:
        on_cpu_forward(case, "fp32")
        contender = contend(case, of, ctranslate2_model(of.folder))
        return replace(contender, padded_tokens=case.workload.tokens)  # it takes padding out for its linear layers

    return {
        "onnxruntime": onnxruntime,
        "onnxruntime int8": onnxruntime_int8,
        "OpenVINO": openvino,
        "CTranslate2": ctranslate2,
    }


def in_int8(contender: Contender) -> Contender:
    """A contender that computes in int8, and is held to no more than that."""
    return replace(contender, dtype="int8", least_cosine=INT8_COSINE)


def on_cpu_forward(case: Case, *dtypes: str) -> None:
    """Raise UnservedError unless the case is a forward pass on a CPU in one of these dtypes."""
    if case.backward:
        raise UnservedError("it has no gradients")
    if case.device.type != "cpu":
        raise UnservedError("it is compared on CPUs only")
    if case.dtype not in dtypes:
        raise UnservedError(f"it has no {case.dtype} on a CPU")
