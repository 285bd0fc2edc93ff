"""The run: the corpus is cut into shards, Ray's workers write them, and the manifest notes which are done."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.errors import ArgumentError
from fastbert.installed import optional
from fastbert.lock import locked
from fastbert.ray.inputs import ENDINGS, Dataset, Format, Shard, columns_of, files_of, paths_of, shards_of
from fastbert.ray.manifest import MANIFEST, Manifest, checksum_of_files
from fastbert.ray.worker import Job, Task, Worker
from fastbert.text.checks import check_whole
from fastbert.writing import remove

if TYPE_CHECKING:
    from fastbert.model.sentence import Mode
    from fastbert.tasks.loading import DTypeName

SHARD_BYTES = 2**24
LOCK = ".writing.lock"


@dataclass(frozen=True)
class Written:
    """What is in the output folder when a run has ended.

    Attributes:
        rows: of all shards.
        shards: how many there are.
        before: how many of them an earlier call had written.
    """

    rows: int
    shards: int
    before: int


def encode(
    dataset: Dataset,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    column: str = "text",
    keep: Sequence[str] | None = None,
    format: Format | None = None,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: DTypeName | None = None,
    pooling: Mode | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    truncate_dim: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Written:
    """Embed the texts of files on a Ray cluster: the column "embedding", float32 [width], beside the input's.

    Each shard of the input becomes one file in `output` of the same rows in the same order. It appears when it is
    whole. If a worker dies, another one writes its shard; if the run is stopped, the same call goes on with the shards
    that are not done, and with those of inputs that are new or have changed. docs/ray.md has formats and names.

    Ray is started on this machine if there is no cluster to join: call `ray.init` before for another way.

    Args:
        dataset: Parquet, JSON lines or CSV: a file, a folder with all files in it, or a list of these.
        model: a Hugging Face checkpoint folder, the same one on all machines.
        output: a folder that all machines share; new or empty, or that of this run.
        column: the one of the texts.
        keep: which columns of the input the output has, by default all.
        format: what to write, by default what is read.
        workers: how many processes, by default one a GPU, or one a machine where there are none. Each has an equal
            share of the cores.
        shard_bytes: of Parquet, decoded, and of JSON lines: how much of a file a shard is, at least. A row group, a
            file of CSV and a compressed one are not cut.
        progress: show Ray's bars on stderr; they count shards.

    See `TextEncoder.encode` and `TextEncoder.from_folder` for the other arguments.

    Raises:
        ArgumentError: an argument is not as described; a file or row of the input is not, and is named; the output
            folder is that of another run, or of one that is under way.
        BackendError: a result is NaN or infinite, and its row is named; or workers died of one shard, time and again.
        CheckpointError: the folder is not a checkpoint fastbert reads, or differs between machines.
        MissingError: Ray Data is not installed.
    """
    options = {
        "pooling": pooling,
        "normalize": normalize,
        "max_length": max_length,
        "prompt": prompt,
        "prompt_name": prompt_name,
        "truncate_dim": truncate_dim,
        "batch_tokens": batch_tokens,
    }
    ordered = _Order(dataset, model, output, column, keep, format, workers, shard_bytes, dtype, progress)
    return _run("encode", ("embedding",), options, ordered)


def classify(
    dataset: Dataset,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    column: str = "text",
    keep: Sequence[str] | None = None,
    format: Format | None = None,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: DTypeName | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Written:
    """Label the texts of files on a Ray cluster: the columns "label" and "probabilities", float32 of every label.

    See `encode` for how and for the arguments, and `TextClassifier.classify` for `max_length` and `batch_tokens`.

    Raises:
        ArgumentError, BackendError, CheckpointError, MissingError: as `encode`.
    """
    options = {"max_length": max_length, "batch_tokens": batch_tokens}
    ordered = _Order(dataset, model, output, column, keep, format, workers, shard_bytes, dtype, progress)
    return _run("classify", ("label", "probabilities"), options, ordered)


@dataclass(frozen=True)
class _Order:
    """The arguments that `encode` and `classify` share."""

    dataset: Dataset
    model: str | os.PathLike[str]
    output: str | os.PathLike[str]
    column: str
    keep: Sequence[str] | None
    format: Format | None
    workers: int | None
    shard_bytes: int
    dtype: DTypeName | None
    progress: bool


def _run(task: Task, names: Sequence[str], options: dict[str, Any], ordered: _Order) -> Written:
    _data()
    import torch

    from fastbert.checkpoints.files import checkpoint_folder
    from fastbert.tasks.loading import default_dtype

    for argument, number in (("workers", ordered.workers), ("shard_bytes", ordered.shard_bytes)):
        if number is not None:
            check_whole(argument, number)
            if number < 1:
                raise ArgumentError(argument, number, "a positive number")
    given = paths_of(ordered.dataset)
    root, read, files = files_of(given)
    form = read if ordered.format is None else ordered.format
    if form not in ENDINGS:
        raise ArgumentError("format", repr(form), f"one of {', '.join(ENDINGS)}")
    keep = None if ordered.keep is None else _names(ordered.keep)
    columns = _kept(columns_of(files), ordered.column, keep, names)
    model = str(checkpoint_folder(ordered.model).absolute())
    out = Path(ordered.output).absolute()
    _check_out(out, given)
    shards = shards_of(root, files, ordered.shard_bytes)
    workers, cpus, gpus = shares(_machines(), ordered.workers)
    device = "cuda" if gpus else "cpu"
    job = Job(
        task=task,
        model=model,
        checksum=checksum_of_files(model),
        dtype=ordered.dtype or default_dtype(torch.device(device)),
        options=options,
        column=ordered.column,
        keep=keep,
        columns=columns,
        form=form,
        out=str(out),
        cpus=cpus,
        device=device,
    )
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK, "writing"):
        manifest = Manifest(out / MANIFEST, _identity(job, ordered.shard_bytes), form, shards)
        for leftover in (*out.rglob(".*.tmp"), *out.rglob(".*.begun")):  # of a run that was killed
            remove(leftover)
        for folder in {(out / shard.output).parent for shard in shards}:
            folder.mkdir(parents=True, exist_ok=True)
        before = len(manifest.done)
        todo = [shard for shard in shards if shard.output not in manifest.done]
        if todo:
            _write(todo, job, min(workers, len(todo)), gpus, manifest, ordered.progress)
            _check_seen(out, form, [manifest.done[shard.output] for shard in todo])
    _warn(out / MANIFEST, [manifest.done[shard.output] for shard in todo])
    return Written(sum(record["rows"] for record in manifest.done.values()), len(shards), before)


def _names(keep: Sequence[str]) -> list[str]:
    if isinstance(keep, str) or not all(isinstance(name, str) for name in keep):
        raise ArgumentError("keep", repr(keep), "a list of names of columns")
    return list(dict.fromkeys(keep))


def _kept(columns: dict[str, Any], column: str, keep: list[str] | None, found: Sequence[str]) -> dict[str, Any]:
    for argument, names in (("column", [column]), ("keep", keep or [])):
        for name in names:
            if name not in columns:
                raise ArgumentError(argument, repr(name), f"one of the columns: {', '.join(columns)}")
    kept = columns if keep is None else {name: columns[name] for name in keep}
    for name in found:
        if name in kept:
            expected = "columns of other names than what is found"
            raise ArgumentError("keep", f"a column {name!r}", expected, "Name the others in keep.")
    return kept


def _check_out(out: Path, given: Sequence[Path]) -> None:
    if any(path in (out, *out.parents) for path in given):
        raise ArgumentError("output", out, "a folder that is not one of the dataset, nor in one")
    if out.exists() and not out.is_dir():
        raise ArgumentError("output", f"{out}, a file", "a folder, or nothing there yet")
    held = {path.name for path in out.iterdir()} - {LOCK} if out.exists() else set()
    if held and MANIFEST not in held:
        raise ArgumentError("output", f"{out}, a folder with files in it", "a new or empty one, or that of this run")


def _identity(job: Job, shard_bytes: int) -> dict[str, Any]:
    """What has to be the same for a run to go on. The size of batches and the number of workers may change."""
    return {
        "task": job.task,
        "model": job.checksum,
        "dtype": job.dtype,
        **{name: value for name, value in job.options.items() if name != "batch_tokens"},
        "column": job.column,
        "keep": job.keep,
        "format": job.form,
        "columns": None if job.form == "jsonl" else {name: _said(kind) for name, kind in job.columns.items()},
        "shard_bytes": shard_bytes,
    }


def _said(kind: Any) -> str:
    """The type of a column, as the manifest names it."""
    if kind is None:
        return "json"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _data() -> Any:
    """Ray Data."""
    return optional("ray.data", "ray", "on this machine and on all of the cluster", "ray[data]")


def connect() -> None:
    """Join a cluster, as Ray finds it, or start one on this machine, unless that was done before.

    Raises:
        MissingError: Ray Data is not installed.
    """
    _data()
    import ray

    if not ray.is_initialized():
        ray.init()


def _machines() -> list[tuple[int, int]]:
    """Of each machine of the cluster its cores and GPUs."""
    connect()
    import ray

    sizes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(size.get("CPU", 0)), int(size.get("GPU", 0))) for size in sizes]


def shares(machines: Sequence[tuple[int, int]], workers: int | None) -> tuple[int, int, int]:
    """How many workers there are, and how many cores and GPUs each has.

    Args:
        machines: of each its cores and GPUs.
        workers: how many are wanted; None for one a GPU. Where there is none, None is for workers as large as the
            smallest machine, which are one a machine where all are alike.

    Raises:
        ArgumentError: there are not as many GPUs, or cores where there is no GPU.
    """
    gpus = sum(gpu for _, gpu in machines)
    if workers is None:
        smallest = min((cpu for cpu, _ in machines if cpu), default=1)
        workers = gpus or sum(cpu // smallest for cpu, _ in machines)
    for cpus in range(max((cpu for cpu, _ in machines), default=0), 0, -1):
        if workers and workers <= sum(min(cpu // cpus, gpu) if gpus else cpu // cpus for cpu, gpu in machines):
            return workers, cpus, int(gpus > 0)
    most = f"at most one a {'GPU' if gpus else 'core'} of the cluster, which has {machines} as cores and GPUs"
    raise ArgumentError("workers", workers, most)


def _write(shards: Sequence[Shard], job: Job, workers: int, gpus: int, manifest: Manifest, progress: bool) -> None:
    """Have Ray's workers write the shards, and note each in the manifest."""
    data = _data()
    written = data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards)).map(
        Worker,
        fn_constructor_args=(job,),
        compute=data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=None if gpus else job.cpus,  # to ask for both is experimental, and a GPU is enough
        num_gpus=gpus or None,
    )
    written.context.enable_progress_bars = progress
    written.context.print_on_execution_start = False
    failed = b""
    for row in written.iter_rows():
        if failed := row.pop("error"):
            break  # which ends the workers
        manifest.add(row | {"warnings": row["warnings"].splitlines()})
    if failed:
        raise pickle.loads(failed)


def _check_seen(out: Path, form: str, records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        path = out / f"{record['shard']}.{form}"
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            got = f"{out}, where {path.name} is not, although a worker has written it"
            raise ArgumentError("output", got, "a folder that all machines share")


def _warn(manifest: Path, records: Sequence[dict[str, Any]]) -> None:
    """Say once what workers warned of."""
    heard = [record for record in records if record["warnings"]]
    if heard:
        first = f"of {heard[0]['shard']}: {heard[0]['warnings'][0]}"
        counted = f"{len(heard)} of {len(records)} shards gave warnings"
        warnings.warn(f"{counted}, which {manifest} has; the first one is {first}", stacklevel=4)
