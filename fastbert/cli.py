"""The command line: `fastbert encode`, `train`, `classify`, `score`, `tag`, `info`.

Heavy imports are inside the commands, so that `fastbert --help` is quick and `main` comes before torch.
"""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from fastbert import installed
from fastbert.errors import ArgumentError, FastbertError
from fastbert.piping import (
    READER_GONE,
    Lines,
    check_ending,
    check_output,
    end_on_signals,
    flush_stdout,
    occupy_standard_streams,
    results,
    say,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # Texts, and their embeddings, float32 [texts, hidden].
    _Parts = Iterator[tuple[list[str], npt.NDArray[np.float32]]]

_Records = Iterator[dict[str, Any]]
Model = TypeVar("Model")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help are brackets
    help="Packed, padding-free BERT encoders.",
)


_Input = Annotated[Path, typer.Argument(metavar="INPUT", help="A file of texts, one a line; - for stdin.")]
_Output = Annotated[Path | None, typer.Option(help="Write here instead of to stdout.")]
_DType = Annotated[
    Literal["fp32", "bf16", "fp16", "int8"] | None,
    typer.Option(help="What the model computes in; int8 on a CPU. By default fp16 on a GPU, fp32 on a CPU."),
]
_MaxLength = Annotated[
    int | None, typer.Option(help="Most tokens of a text, the rest is cut off; by default what the folder allows.")
]
_BatchTokens = Annotated[int | None, typer.Option(help="Most tokens of a batch; by default what the last cache holds.")]


def main() -> None:
    """The entry point. Exit codes: docs/command_line.md. What went wrong is one sentence on stderr."""
    # Threads of torch that wait do so asleep: where another process wants the cores too, two that spin were up to ten
    # times as slow. OpenMP reads this when torch is loaded; what the user says, here or more exactly, is stronger.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    occupy_standard_streams()
    warnings.showwarning = _show_warning
    try:
        try:
            app(prog_name="fastbert")
        finally:
            flush_stdout()
    except FastbertError as error:
        say(f"error: {error}")
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(READER_GONE)
    except OSError as error:
        say(f"error: {error}")
        sys.exit(1)
    except MemoryError as error:
        say(f"error: not enough memory: {error}")
        sys.exit(1)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - the last net, for what no one foresaw; panics of Rust are no Exception
        with NamedTemporaryFile("w", prefix="fastbert-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"error: {what}. This is a mistake in fastbert; please report it where you got it, with {file.name}")
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastbert {_version('fastbert')}")
        raise typer.Exit


@app.callback()
def _of_all_commands(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def encode(
    model: Annotated[Path, typer.Option(help="A Hugging Face checkpoint folder.")],
    input: _Input = Path("-"),
    output: Annotated[Path | None, typer.Option(help="Write here instead of JSON lines on stdout.")] = None,
    file_format: Annotated[
        Literal["npy", "jsonl"] | None,
        typer.Option("--format", help="npy: float32 [lines, hidden]. By default the ending of --output tells."),
    ] = None,
    pooling: Annotated[
        Literal["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"] | None,
        typer.Option(
            help="How the tokens of a text become one embedding; by default as the folder says, or their mean."
        ),
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Scale embeddings to length 1; by default as the folder says, or so.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to put before each text.")] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Which of the folder's prompts to put before each text.")
    ] = None,
    truncate_dim: Annotated[
        int | None,
        typer.Option(help="How many columns of an embedding to keep; by default as the folder says, or all."),
    ] = None,
    dtype: _DType = None,
    max_length: _MaxLength = None,
    batch_tokens: _BatchTokens = None,
) -> None:
    """Embed texts, one a line: row i of the result is line i of the input.

    Lines end with \\n or \\r\\n. Empty lines are empty texts.
    """
    output = check_output(output)
    if file_format is None:
        file_format = "npy" if output is not None and output.suffix.lower() == ".npy" else "jsonl"
        if file_format == "jsonl":
            check_ending(output, "Or say --format.")
    if output is None and file_format == "npy":
        raise ArgumentError("--output", "nothing", "a file to write .npy to", "Add --output FILE, or --format jsonl.")

    from fastbert.tasks.encode import TextEncoder

    end_on_signals()
    lines = Lines(input)
    encoder = TextEncoder.from_folder(model, dtype=dtype)
    with results(output) as file:
        if file_format == "npy" and not file.seekable():
            raise ArgumentError("--output", f"{output}, a pipe", "a file for .npy", "Add --format jsonl.")
        taken: deque[list[str]] = deque()

        def parts() -> Generator[list[str], None, None]:
            for part in lines.parts(file):
                if part:
                    taken.append(part)
                yield part

        arrays = encoder.encode_parts(
            parts(),
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            prompt=prompt,
            prompt_name=prompt_name,
            truncate_dim=truncate_dim,
            batch_tokens=batch_tokens,
            progress=sys.stderr.isatty(),
        )
        encoded = ((taken.popleft(), array) for array in arrays)
        if file_format == "npy":
            _write_npy(file, encoder.width(pooling, truncate_dim), encoded)
        else:
            _write_jsonl(file, encoded)
    _report(lines)


@app.command()
def train(
    task: Annotated[
        Literal["classify", "tag", "mlm", "pretrain"],
        typer.Argument(
            metavar="TASK",
            help="classify texts, tag words, mlm: predict masked tokens, pretrain: that and the next sentence.",
        ),
    ],
    model: Annotated[Path, typer.Option(help="The Hugging Face checkpoint folder to start from.")],
    train: Annotated[Path, typer.Option(help="Examples to learn from; see docs/training.md for the formats.")],
    out: Annotated[Path, typer.Option(help="The folder to write; new or empty, or that of the run to resume.")],
    valid: Annotated[Path | None, typer.Option(help="Examples to measure by after each epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")] = False,
    epochs: Annotated[int, typer.Option(help="How often each example is seen.")] = 3,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 5e-5,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of a batch.")] = 1024,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Most tokens of an example.")] = 256,
    dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="What to compute in; the weights are fp32 in both.")
    ] = "fp32",
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the learning rate rises.")] = 0.1,
    schedule: Annotated[Literal["linear", "cosine"], typer.Option(help="How it falls after that.")] = "linear",
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on matrices only.")] = 0.01,
    clip: Annotated[float, typer.Option(help="Most norm of the gradient.")] = 1.0,
    eval_every: Annotated[int | None, typer.Option(help="Steps between measurements within an epoch.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs that were not the best.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints, beside one an epoch.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the new head, the order, dropout and masks.")] = 0,
    parallel: Annotated[
        Literal["ddp", "fsdp"], typer.Option(help="Under torchrun: a whole model a process, or one sharded over all.")
    ] = "ddp",
) -> None:
    """Train a model; the last metrics go to stdout and to metrics.json in the out folder.

    A run that was interrupted goes on with --resume, bit for bit as if it never stopped.
    """
    from fastbert import training
    from fastbert.training.parallel import is_first, is_one_of_several, leave

    if not is_one_of_several():  # which torchrun ends, and which may hear no signal while they wait for each other
        end_on_signals()
    settings = training.Settings(
        task=task,
        model=str(model),
        train=str(train),
        valid=None if valid is None else str(valid),
        out=str(out),
        epochs=epochs,
        lr=lr,
        batch_tokens=batch_tokens,
        accumulate=accumulate,
        max_length=max_length,
        dtype=dtype,
        warmup=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        clip=clip,
        eval_every=eval_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
        seed=seed,
        parallel=parallel,
    )
    metrics = training.train(settings, resume=resume, progress=sys.stderr.isatty(), say=say)
    if is_first():
        print(json.dumps(metrics))
    leave()


@app.command()
def classify(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a classifier.")],
    input: _Input = Path("-"),
    output: _Output = None,
    dtype: _DType = None,
    max_length: _MaxLength = None,
    batch_tokens: _BatchTokens = None,
) -> None:
    """Label texts, one a line; JSON lines with text, label and the probability of every label."""
    from fastbert.tasks.classify import TextClassifier

    def records(classifier: TextClassifier, texts: list[str]) -> _Records:
        found = classifier.classify(
            texts, max_length=max_length, batch_tokens=batch_tokens, progress=sys.stderr.isatty()
        )
        for text, one in zip(texts, found, strict=True):
            yield {"text": text, "label": one.label, "probabilities": one.probabilities}

    _answer(input, output, lambda: TextClassifier.from_folder(model, dtype=dtype), records)


@app.command()
def score(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a head of one output, as of a cross-encoder.")],
    input: _Input = Path("-"),
    output: _Output = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="A line is two texts with a tab between them.")] = False,
    dtype: _DType = None,
    max_length: _MaxLength = None,
    batch_tokens: _BatchTokens = None,
) -> None:
    """Score texts or pairs of them, one a line; JSON lines with text and score."""
    from fastbert.tasks.score import TextScorer

    def records(scorer: TextScorer, texts: list[str]) -> _Records:
        given = _pairs(texts) if pairs else texts
        found = scorer.score(given, max_length=max_length, batch_tokens=batch_tokens, progress=sys.stderr.isatty())
        for text, one in zip(given, found.tolist(), strict=True):
            yield {"text": text, "score": one}

    _answer(input, output, lambda: TextScorer.from_folder(model, dtype=dtype), records)


@app.command()
def tag(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a tagger.")],
    input: _Input = Path("-"),
    output: _Output = None,
    words: Annotated[
        Literal["remembered", "whitespace", "json"],
        typer.Option(help="As the training file cut them, what spaces part, or each line a JSON list of words."),
    ] = "remembered",
    dtype: _DType = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Most tokens of a window, longer texts are several; by default what the folder allows."),
    ] = None,
    batch_tokens: _BatchTokens = None,
) -> None:
    """Find entities in texts, one a line; JSON lines with text and its entities.

    An entity has a type, start and end in characters, its text, and the mean probability of its tags as score. Of lists
    of words, start and end count words.
    """
    from fastbert.tasks.tag import TextTagger

    def records(tagger: TextTagger, texts: list[str]) -> _Records:
        given = _word_lists(texts) if words == "json" else texts
        found = tagger.tag(
            given,
            words="whitespace" if words == "whitespace" else "remembered",
            max_length=max_length,
            batch_tokens=batch_tokens,
            progress=sys.stderr.isatty(),
        )
        for text, entities in zip(given, found, strict=True):
            yield {
                "words" if words == "json" else "text": text,
                "entities": [
                    {"type": one.kind, "start": one.start, "end": one.end, "text": one.text, "score": one.score}
                    for one in entities
                ],
            }

    _answer(input, output, lambda: TextTagger.from_folder(model, dtype=dtype), records)


@app.command()
def info(
    model: Annotated[Path | None, typer.Option(help="A checkpoint folder: also say what computes it, and why.")] = None,
    dtype: _DType = None,
) -> None:
    """Versions, devices, and which path runs on each device and why."""
    import torch

    from fastbert import backend
    from fastbert.cpu.machine import amx_unused, lane
    from fastbert.tasks.loading import default_dtype

    print("versions")
    _row("python", platform.python_version())
    for package in ("fastbert", "torch", "triton", "llvmlite", "numpy", "tokenizers", "safetensors", "transformers"):
        _row(package, _version(package))
    print("devices")
    name, instructions = _cpu()
    _row("cpu", f"{name}, {torch.get_num_threads()} threads, {instructions}")
    if (taken := lane()) is not None:
        _row("", f"FASTBERT_CPU={taken} is set; torch computes with {torch.backends.cpu.get_cpu_capability()}")
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        _row(f"cuda:{i}", f"{properties.name}, {memory:.0f} GiB, {properties.multi_processor_count} multiprocessors")
        devices.append(torch.device("cuda", i))
    if len(devices) == 1:
        _row("gpu", f"none that this torch ({torch.__version__}) can use")
    print("paths")
    for device in devices:
        decision = backend.decide(device)
        _row(str(device), f"{decision.path}, because {decision.reason}")
        if device.type == "cpu" and (unused := amx_unused()) is not None:
            _row("", f"AMX is left alone, because {unused}")
        _row("", f"--dtype {default_dtype(device)} by default")
        for name, unserved, instead in (
            ("bf16", backend.bfloat16_unserved(device), "computes in float32"),
            ("fp16", backend.float16_unserved(device), "computes in float32"),
            ("int8", backend.int8_unserved(device), "is slower than fp32"),
        ):
            if device.type == "cuda" and name == "int8":
                _row("", "--dtype int8 is for CPUs")
            elif unserved is None:
                _row("", f"--dtype {name} multiplies in {name} here")
            else:
                _row("", f"--dtype {name} {instead} here, because {unserved}")

    from fastbert.ops.fastest import KINDS, choice

    print("products of floats on the CPU: by fastbert's own kernels, or by the oneDNN or the BLAS that torch brings")
    for kind in KINDS:
        chosen = choice(kind)
        times = ", ".join(f"{way} {ms:.3g} ms" for way, ms in chosen.milliseconds.items())
        _row(chosen.way, f"{kind.name}: {chosen.source}{times and f' ({times})'}")

    if model is not None:
        from fastbert.tasks.encode import TextEncoder

        loaded = TextEncoder.from_folder(model, dtype=dtype).model
        print(f"model {model}: the first of these that is not refused computes it, without a gradient")
        for name, reason in loaded.executors().items():
            _row(name, "serves" if reason is None else f"does not serve {reason}")


def _answer(
    input: Path, output: Path | None, load: Callable[[], Model], records: Callable[[Model, list[str]], _Records]
) -> None:
    """Write a JSON line for each text, as they come."""
    end_on_signals()
    output = check_output(output)
    check_ending(output)
    lines = Lines(input)
    model = load()
    with results(output) as file:
        for texts in filter(None, lines.parts(file)):
            file.write("".join(json.dumps(record) + "\n" for record in records(model, texts)).encode())
            file.flush()
    _report(lines)


def _write_npy(file: IO[bytes], hidden: int, parts: _Parts) -> None:
    """One array of all parts; numpy leaves room in its header for any number of rows, which are counted at the end."""
    import numpy as np

    def write_header(rows: int) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, hidden)}
        np.lib.format.write_array_header_1_0(file, header)

    write_header(rows := 0)
    for _, embeddings in parts:
        file.write(np.ascontiguousarray(embeddings, "<f4").data)
        rows += len(embeddings)
    file.seek(0)
    write_header(rows)


def _write_jsonl(file: IO[bytes], parts: _Parts) -> None:
    for texts, embeddings in parts:
        for text, embedding in zip(texts, embeddings, strict=True):
            # 9 digits give a float32 back exactly
            numbers = ", ".join([f"{number:.9g}" for number in embedding.tolist()])
            file.write(f'{{"text": {json.dumps(text)}, "embedding": [{numbers}]}}\n'.encode())
        file.flush()


def _pairs(lines: list[str]) -> list[tuple[str, str]]:
    found = []
    for line in lines:
        first, tab, second = line.partition("\t")
        if not tab or "\t" in second:
            raise ArgumentError("INPUT", f"the line {line!r:.80}", "two texts with one tab between them")
        found.append((first, second))
    return found


def _word_lists(lines: list[str]) -> list[list[str]]:
    found = []
    for line in lines:
        try:
            words = json.loads(line)
        except (ValueError, RecursionError):
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
            raise ArgumentError("INPUT", f"the line {line!r:.80}", 'a JSON list of words, such as ["Ada", "met"]')
        found.append(words)
    return found


def _cpu() -> tuple[str, str]:
    """Its model and those of its instruction sets that matter to bf16 and int8."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), "instruction sets unknown (no /proc/cpuinfo)"
    fields = dict(_cpuinfo_fields(cpuinfo))
    flags = fields.get("flags", fields.get("Features", "")).split()
    relevant = (
        "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
        "asimd", "bf16", "i8mm", "sve",
    )  # fmt: skip
    return fields.get("model name", platform.machine()), " ".join(flag for flag in relevant if flag in flags)


def _cpuinfo_fields(cpuinfo: str) -> Iterator[tuple[str, str]]:
    for line in io.StringIO(cpuinfo):
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def _version(package: str) -> str:
    return installed.version(package) or "not installed"


def _row(name: str, value: str) -> None:
    print(f"  {name:<14}{value}")


def _report(lines: Lines) -> None:
    for sentence in lines.odd():
        say(sentence)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}")
