"""One process of a run: it holds the model, and writes shards."""

from __future__ import annotations

import os
import pickle
import re
import socket
import warnings
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastbert.errors import BackendError, CheckpointError, FastbertError
from fastbert.ray.inputs import Format, Part, Shard, read
from fastbert.ray.manifest import checksum_of_files
from fastbert.ray.outputs import Write, writing
from fastbert.writing import check_replaceable, replacing

if TYPE_CHECKING:
    from fastbert.ray.findings import Embeddings, Labels

Task = Literal["encode", "classify"]

TRIES = 4  # of a shard whose workers die; Ray itself would never give up
_TEXT = re.compile(r"texts\[(\d+)\]")


@dataclass(frozen=True)
class Job:
    """What all workers of a run do.

    Attributes:
        task: what is found.
        model: the checkpoint folder.
        checksum: of its files; the folder may be another one on another machine.
        dtype: what the model computes in.
        options: of `TextEncoder.encode` or `TextClassifier.classify`.
        column: the one of the texts.
        keep: the columns to keep, None for all.
        columns: those that are kept, as `inputs.columns_of` gives them.
        form: what to write.
        out: the folder to write to.
        cpus: threads of a worker.
        device: where it computes.
    """

    task: Task
    model: str
    checksum: str
    dtype: Any
    options: dict[str, Any]
    column: str
    keep: list[str] | None
    columns: dict[str, Any]
    form: Format
    out: str
    cpus: int
    device: str


class Worker:
    """What Ray makes an actor of: called with a shard as a dict, it writes it and gives a record of it.

    A FastbertError or OSError is given back in the record, pickled: Ray would wrap it and keep its text only.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._said: list[str] = []
        self._findings: Embeddings | Labels | None = None
        # Before torch and the tokenizer are loaded, which read them then.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ["RAYON_NUM_THREADS"] = str(job.cpus)
        warnings.simplefilter("always", UserWarning)  # each shard has its own
        warnings.showwarning = self._hear

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the shard whose fields are in `row`."""
        shard = Shard(**row)
        self._said.clear()
        record: dict[str, Any] = {
            "shard": shard.output,
            "input": shard.name,
            "size": shard.size,
            "changed": shard.changed,
        }
        try:
            if self._findings is None:
                self._findings = load(self._job)
            rows, size = write(shard, self._job, self._findings)
        except (FastbertError, OSError) as error:
            return record | {"rows": 0, "bytes": 0, "warnings": "", "error": pickle.dumps(error)}
        return record | {"rows": rows, "bytes": size, "warnings": "\n".join(self._said), "error": b""}

    def _hear(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self._said.append(str(message))


def load(job: Job) -> Embeddings | Labels:
    """The model, on the job's threads.

    Raises:
        CheckpointError: its folder is another one than that of the job, or is not read.
    """
    if checksum_of_files(job.model) != job.checksum:
        where = f"{job.model} on {socket.gethostname()}"
        raise CheckpointError(where, "other files than on the machine that started the run", "the same on all machines")
    import torch

    from fastbert.ray.findings import Embeddings, Labels

    torch.set_num_threads(job.cpus)
    return (Embeddings if job.task == "encode" else Labels)(job.model, job.dtype, job.device, job.options)


def write(shard: Shard, job: Job, findings: Embeddings | Labels) -> tuple[int, int]:
    """Write the file of a shard, whole or not at all; how many rows and bytes it has.

    Raises:
        ArgumentError: the input, a row of it or an option is not as it should be.
        BackendError: a result is NaN or infinite; or one worker after the other has died of this shard.
    """
    path = Path(job.out) / f"{shard.output}.{job.form}"
    check_replaceable(path)
    begun = path.with_name(f".{path.name}.begun")  # a byte for each worker that began and did not end
    with begun.open("ab") as file:
        deaths = file.tell()
        file.write(b".")
    try:
        if deaths == TRIES:
            mend = "Look at Ray's logs. Where memory ran out, lower batch_tokens, or have fewer workers."
            got = f"{deaths} workers that died while they wrote {shard.output}"
            raise BackendError(shard.input, got, "one that ends", mend)
        with replacing(path) as temporary, temporary.open("wb") as file:
            with writing(job.form, file, job.columns, findings) as put:
                rows = _found(shard, job, findings, put)
            shard.check_unchanged()
            file.flush()
            os.fsync(file.fileno())
            return rows, file.tell()
    finally:
        begun.unlink(missing_ok=True)


def _found(shard: Shard, job: Job, findings: Embeddings | Labels, put: Write) -> int:
    taken: deque[Part] = deque()  # the first is the one that is computed

    def parts() -> Generator[list[str], None, None]:
        for part in read(shard, job.column, job.keep):
            taken.append(part)
            yield part.texts

    rows = 0
    try:
        for found in findings.of(parts()):
            part = taken.popleft()
            put(part, found)
            rows += len(part.texts)
    except FastbertError as error:
        text = _TEXT.match(error.argument)
        if text is None:
            raise
        raise type(error)(taken[0].place(int(text[1])), error.got, error.expected, error.mend) from error
    return rows
