"""A model and texts of the user's on their machine: fastbert and other libraries, checked, and timed in turns."""

from __future__ import annotations

import os
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fastbert.backend import first_device, usable_device
from fastbert.cpu.machine import Machine, host
from fastbert.errors import ArgumentError, BackendError
from fastbert.installed import version
from fastbert.rivals import SENTENCES
from fastbert.rivals.contenders import BATCH, Answers, Contender, Entry, Job, Kind, entries
from fastbert.rivals.runtimes import INT8_COSINE, UnservedError, failures, quiet_transformers
from fastbert.rivals.turns import Spread, interleaved
from fastbert.tasks.loading import unserved
from fastbert.text.checks import Text, check_texts

if TYPE_CHECKING:
    from rich.console import RenderableType

# Without `full`: seconds of a call of the reference, which say how many texts are taken, and of all rounds together.
CALL_SECONDS, QUICK_SECONDS = 0.7, 20.0
FULL_SECONDS = 60.0  # of all rounds together, with `full`; three rounds at least
MOST_DRAWN = 4096  # texts that are looked at without `full`

# What is wrong, and no rounding: the least cosine of an embedding with the reference's, and the largest mean difference
# of probabilities or scores, as a share of the largest score above 1. In float32 they would show half precision.
LEAST_COSINE = {"fp32": 0.999999, "bf16": 0.99, "fp16": 0.99, "int8": INT8_COSINE}
MOST_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.03, "int8": 0.15}


@dataclass(frozen=True)
class Row:
    """A contender that was timed.

    Attributes:
        name: of the library.
        dtype: what it computed in.
        seconds: of a call on all texts that were taken, one sample a round.
        tokens_per_s: real tokens, no padding, by the median.
        times: its speed, as a multiple of the reference's.
        accuracy: beside the reference. Of embeddings the worst and the mean cosine; of labels the share of texts with
            the same one, and the largest difference of a probability; of scores the largest and the mean difference.
    """

    name: str
    dtype: str
    seconds: list[float]
    tokens_per_s: float
    times: float
    accuracy: dict[str, float]


@dataclass(frozen=True)
class Report:
    """What `bench` found.

    Attributes:
        model: the folder.
        kind: what the model makes of texts.
        given: how many texts there were; 0 for those that come with fastbert.
        texts: how many were taken.
        tokens: of these, cut at `max_length`, special ones included.
        max_length: most tokens of a text.
        cut: how many of these texts are that long, and so may have lost their end.
        machine: what computed.
        threads: of torch, and of every rival.
        versions: of the libraries that were timed; None where pip does not know one.
        reference: whose answers the others were held to, and whose speed is 1.
        rows: the fastest first.
        wrong: who was not timed because its answers are others, and how far off they are.
        left_out: who could not take part, and why.
        code: the line that gets the fastest of fastbert's precisions; None if none was timed.
    """

    model: str
    kind: Kind
    given: int
    texts: int
    tokens: int
    max_length: int
    cut: int
    machine: str
    threads: int
    versions: dict[str, str | None]
    reference: str
    rows: list[Row]
    wrong: dict[str, str]
    left_out: dict[str, str]
    code: str | None

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def best(self, name: str | None = None) -> Row | None:
        """The fastest row, or that of a library; None where there is none."""
        return next((row for row in self.rows if name in (None, row.name)), None)

    def __rich__(self) -> RenderableType:
        """A table and a few sentences, for rich."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        whose = f"your {self.given} texts" if self.given else "fastbert's own sentences"
        lengths = f"{self.tokens:,} tokens, at most {self.max_length} a text, {self.cut} texts that long"
        head = [
            f"{self.kind.capitalize()} by {self.model} on a {self.machine} with {self.threads} threads.",
            f"{self.texts} of {whose}: {lengths}.",
        ]
        table = Table(box=None)
        measures = list(self.rows[0].accuracy)
        table.add_column("")
        for name in ("tokens/s", "times", *measures):
            table.add_column(name, justify="right")
        for row in self.rows:
            numbers = f"{row.tokens_per_s:,.0f}", f"{row.times:.2f}", *(f"{row.accuracy[one]:.6f}" for one in measures)
            table.add_row(f"{row.name} {row.dtype}", *numbers, style="bold" if row.name == "fastbert" else "")
        lines = [f"Tokenising is part of every time. Times and accuracy are beside {self.reference}."]
        lines += [f"[red]not timed, because wrong[/red]: {name}: {escape(how)}" for name, how in self.wrong.items()]
        lines += [f"left out: {name}: {escape(why)}" for name, why in self.left_out.items()]
        fastest, ours = self.best(), self.best("fastbert")
        if fastest is not None and fastest is not ours:
            lines.append(f"The fastest is {fastest.name} {fastest.dtype}.")
        if ours is not None and self.code is not None:
            lines.append(f"The fastest of fastbert is {ours.dtype}, {ours.times:.2f} times {self.reference}:")
            lines.append(f"  [bold]{escape(self.code)}[/bold]")
        return Group(*map(escape, head), "", table, "", *lines)


def bench(
    model: str | os.PathLike[str],
    texts: Iterable[Text] | None = None,
    *,
    full: bool = False,
    device: torch.device | str | None = None,
    max_length: int | None = None,
    progress: bool = False,
) -> Report:
    """Time fastbert in each precision beside transformers, sentence-transformers, onnxruntime and OpenVINO.

    Each is called as its users do: strings in, numpy out; batches of 32 sorted by length where the user makes them. Its
    answers are held to the reference's first, those of transformers in float32 (or of the next one that is there), and
    it is not timed if they are others. Then all take turns, so that what slows a machine down slows down all. The texts
    are taken as they are, without prompts of the folder. All models are in memory at once.

    Args:
        model: a Hugging Face checkpoint folder, of a classifier, a cross-encoder, or an encoder for embeddings.
        texts: strings, or pairs of strings; by default 300 English sentences that come with fastbert.
        full: take all texts; otherwise as many batches of them as make it about a minute with a small model.
        device: where all compute; the first GPU, or the CPU where there is none.
        max_length: most tokens of a text; by default as for `TextEncoder.encode`.
        progress: show a bar on stderr.

    Raises:
        ArgumentError: an argument is not as described; `texts[i]` names the item.
        CheckpointError: the folder is not a checkpoint fastbert reads.
        BackendError: nothing could be timed, fastbert in float32 neither.
    """
    own = texts is None
    texts = SENTENCES.read_text(encoding="utf-8").splitlines() if texts is None else _listed(texts)
    order = random.Random(0).sample(range(len(texts)), len(texts) if full else min(len(texts), MOST_DRAWN))
    drawn = [texts[i] for i in order]
    device = first_device() if device is None else usable_device(device)
    with (
        tempfile.TemporaryDirectory(prefix="fastbert-") as scratch,
        quiet_transformers(),
        warnings.catch_warnings(),
        _bar(progress) as show,
    ):
        warnings.simplefilter("ignore")  # each call would count the texts that are cut; the report does
        job = Job.of(model, device, max_length, pairs=not isinstance(drawn[0], str), scratch=Path(scratch))
        lengths = job.tokenizer.encode(drawn, job.max_length).lengths
        if job.lower_case:
            drawn = [text.lower() if isinstance(text, str) else (text[0].lower(), text[1].lower()) for text in drawn]
        left_out = {str(dtype): reason for dtype, reason in unserved(device).items()}
        accuracy: dict[Entry, dict[str, float]] = {}
        runs: dict[Entry, Callable[[], Any]] = {}
        wrong: dict[str, str] = {}
        wanted: Answers | None = None
        known = list(entries(device))
        for done, entry in enumerate(known):
            show(f"checking {entry}", done, len(known))
            try:
                contender = entry.make(job)
                if wanted is None and not full:
                    taken = _taken(contender, drawn, lengths)
                    drawn, lengths = [drawn[i] for i in taken], lengths[taken]
                answers = contender.array(contender.run(drawn))
            except failures() as error:
                left_out[str(entry)] = _reason(error)
                continue
            accuracy[entry], flaw = _compare(job.kind, entry.dtype, answers, answers if wanted is None else wanted)
            if flaw is not None:
                wrong[str(entry)] = flaw
                continue
            wanted = answers if wanted is None else wanted
            runs[entry] = partial(contender.run, drawn)
        if not runs:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in {**left_out, **wrong}.items())
            raise BackendError("model", f"nobody who computes it ({reasons})", "one library that does")
        budget = FULL_SECONDS if full else QUICK_SECONDS
        seconds = interleaved(runs, budget=budget, watch=partial(show, "timing"))
    tokens, medians = int(lengths.sum()), {entry: Spread.of(seconds[entry]).median for entry in runs}
    reference = next(iter(runs))
    rows = [
        Row(entry.name, entry.dtype, seconds[entry], tokens / took, medians[reference] / took, accuracy[entry])
        for entry, took in sorted(medians.items(), key=lambda pair: pair[1])
    ]
    best = next((row for row in rows if row.name == "fastbert"), None)
    return Report(
        model=str(job.folder),
        kind=job.kind,
        given=0 if own else len(texts),
        texts=len(drawn),
        tokens=tokens,
        max_length=job.max_length,
        cut=int((lengths == job.max_length).sum()),
        machine=_machine(device),
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in sorted({"torch", *(row.name for row in rows)})},
        reference=str(reference),
        rows=rows,
        wrong=wrong,
        left_out=left_out,
        code=None if best is None else _code(job, best.dtype, max_length),
    )


def _listed(texts: Iterable[Text]) -> list[Text]:
    check_texts(texts)
    found = list(texts)
    if not found:
        raise ArgumentError("texts", "none", "one text or more", "Leave it out for sentences that come with fastbert.")
    return found


def _taken(contender: Contender, texts: Sequence[Text], lengths: npt.NDArray[np.int64]) -> list[int]:
    """Of these texts some that take the reference `CALL_SECONDS`, one batch at least.

    They are batches of all texts sorted by length, evenly spread, so that whoever pads has no more padding in them than
    among all texts.
    """
    order = np.argsort(-lengths, kind="stable")  # as contenders.by_length
    batches = [order[begin : begin + BATCH].tolist() for begin in range(0, len(order), BATCH)]
    middle = batches[len(batches) // 2]
    pilot = [texts[i] for i in middle]
    contender.run(pilot)  # the first call is slow
    begin = time.perf_counter()
    contender.run(pilot)
    speed = int(lengths[middle].sum()) / (time.perf_counter() - begin)
    tokens = CALL_SECONDS * speed
    count = min(max(1, round(tokens / lengths.sum() * len(batches))), len(batches))
    return sorted(i for k in range(count) for i in batches[(2 * k + 1) * len(batches) // (2 * count)])


def _compare(kind: Kind, dtype: str, got: Answers, wanted: Answers) -> tuple[dict[str, float], str | None]:
    """How near answers are to the reference's, and what is wrong with them; None for no more than rounding."""
    if got.shape != wanted.shape:
        return {}, f"answers of shape {got.shape}, and not {wanted.shape}"
    if not np.isfinite(got).all():
        return {}, "answers of NaN or infinity"
    if kind == "embeddings":
        a, b = got.astype(np.float64), wanted.astype(np.float64)
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines = (a * b).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)
        worst, least = float(cosines.min()), LEAST_COSINE[dtype]
        flaw = None if worst >= least else f"worst cosine {worst:.4f}, and not {least}"
        return {"worst cosine": worst, "mean cosine": float(cosines.mean())}, flaw
    differences = np.abs(got - wanted)
    mean, most = float(differences.mean()), MOST_DIFFERENCE[dtype] * max(1.0, float(np.abs(wanted).max()))
    flaw = None if mean <= most else f"mean difference {mean:.4f}, and not {most:.4f} at most"
    largest = {"largest difference": float(differences.max())}
    if kind == "scores":
        return {**largest, "mean difference": mean}, flaw
    return {"same label": float((got.argmax(1) == wanted.argmax(1)).mean()), **largest}, flaw


def _reason(error: Exception) -> str:
    if isinstance(error, UnservedError):
        return str(error)
    return f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    machine = host()
    return f"CPU ({machine.cpu if isinstance(machine, Machine) else platform.machine()})"


def _code(job: Job, dtype: str, max_length: int | None) -> str:
    kind, method = {
        "embeddings": ("TextEncoder", "encode"),
        "labels": ("TextClassifier", "classify"),
        "scores": ("TextScorer", "score"),
    }[job.kind]
    length = "" if max_length is None else f", max_length={max_length}"
    return f"fastbert.{kind}.from_folder({str(job.folder)!r}, dtype={dtype!r}).{method}(texts{length})"


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows what is done, how much of it, and of how much."""
    if not shown:
        yield lambda what, done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("")
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)
