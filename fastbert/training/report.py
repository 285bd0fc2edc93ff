"""What a run writes down and says: losses and metrics in files, a bar or lines on a terminal, a curve."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from fastbert.training.resume import State
from fastbert.writing import replacing

METRICS, LOSSES, CURVE = "metrics.json", "losses.jsonl", "losses.png"
SAID_EVERY = 30.0  # seconds between lines on how far the training is, where there is no bar


class Report:
    """What a run tells as it goes on, in the one process that writes; the others only remember it.

    Args:
        out: the folder of the run.
        task: for metrics.json.
        state: of the run; its history grows by what is recorded.
        steps: of the whole run.
        writes: whether this process is the one that writes files.
        progress: show a bar on stderr.
        say: takes a line.
    """

    def __init__(
        self,
        out: Path,
        task: str,
        state: State,
        steps: int,
        writes: bool,
        progress: bool,
        say: Callable[[str], None],
    ) -> None:
        self.out, self.task, self.state, self.steps, self.writes = out, task, state, steps, writes
        self.progress, self.say = progress, say
        self._losses: IO[str]
        self._show: Callable[[float, int], None]
        self._said, self._step_said = 0.0, 0  # the time and the step of the last line

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """losses.jsonl is open to be continued, and the bar is shown."""
        path = Path(os.devnull)
        if self.writes:
            path = self.out / LOSSES
            with replacing(path) as temporary:
                temporary.write_text("".join(map(_line, self.state.history)), encoding="utf-8")
        self._said, self._step_said = time.monotonic(), self.state.step
        bar = _bar(self.progress, self.steps, self.state.step)
        with path.open("a", encoding="utf-8") as self._losses, bar as self._show:
            yield

    def record(self, record: dict[str, Any]) -> None:
        """Remember a record, and write it to losses.jsonl."""
        self.state.history.append(record)
        self._losses.write(_line(record))
        self._losses.flush()

    def step(self, record: dict[str, Any], tokens: int) -> None:
        """Record a step of so many tokens, and say how far the training is."""
        self.record(record)
        self._show(record["loss"], tokens)
        step, now = record["step"], time.monotonic()
        if not self.progress and now - self._said > SAID_EVERY:
            left = (now - self._said) / (step - self._step_said) * (self.steps - step)
            speed = self.state.tokens / self.state.seconds
            self.say(
                f"step {step} of {self.steps}, epoch {record['epoch']}, loss {record['loss']:.4f}, "
                f"{speed:,.0f} tokens/s, about {timedelta(seconds=round(left))} left"
            )
            self._said, self._step_said = now, step

    def measured(self, metrics: dict[str, Any]) -> None:
        """Say what was measured."""
        self.say(", ".join(f"{name} {_shown(value)}" for name, value in metrics.items()))

    def metrics(self, finished: bool) -> dict[str, Any]:
        """What metrics.json has from now on."""
        state = self.state
        metrics = {"task": self.task, **state.metrics, "best": state.best, "seconds": round(state.seconds, 1)}
        metrics |= {"tokens_per_second": round(state.tokens / state.seconds, 1), "finished": finished}
        if self.writes:
            with replacing(self.out / METRICS) as temporary:
                temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        return metrics


def draw(path: Path, history: list[dict[str, Any]]) -> None:
    """The losses as a picture, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn(
            f"no {path.name}, because matplotlib is not installed (it is in fastbert's extra `train`)", stacklevel=2
        )
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    trained = [record for record in history if "loss" in record]
    axes.plot([record["step"] for record in trained], [record["loss"] for record in trained], label="training")
    measured = [record for record in history if "loss" in record.get("valid", {})]
    if measured:
        steps = [record["step"] for record in measured]
        axes.plot(steps, [record["valid"]["loss"] for record in measured], "o-", label="validation")
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


@contextmanager
def _bar(wanted: bool, steps: int, done: int) -> Iterator[Callable[[float, int], None]]:
    """A bar on stderr; what it gives is called with the loss and the tokens of each step."""
    if not wanted:
        yield lambda loss, tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("loss {task.fields[loss]:.4f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=steps, completed=done, loss=math.nan, speed=0.0)
        begun, seen = time.monotonic(), 0

        def show(loss: float, tokens: int) -> None:
            nonlocal seen
            seen += tokens
            progress.update(bar, advance=1, loss=loss, speed=seen / (time.monotonic() - begun))

        yield show


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
