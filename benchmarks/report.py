"""Render what was measured as Markdown and pictures: docs/performance.md, docs/performance/*.png, docs/kernels/*.md and
README.md.

    make report                              # or python benchmarks/report.py

It reads results.json and cpu.json in benchmarks/results/<machine> of every machine, which `pytest benchmarks` and
`pytest benchmarks/bench_cpu.py --full` write with --benchmark-json, and benchmarks/baselines/static.json. In the
documents only what stands between the markers is replaced. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

sys.path.append(str(Path(__file__).parent))
from folders import RESULTS
from roofline import DTYPES

from fastbert.errors import ArgumentError, FastbertError
from fastbert.kernels import cost

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "benchmarks" / "baselines" / "static.json"
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"

# The files of a machine, and what the titles of their sections end in.
FILES = {"cpu.json": ", what is promised of a CPU", "results.json": ""}
DRAWN = "results.json"  # has pictures
HEADLINES = 3  # machines in the README
READMES = ("README.md", "README.zh-CN.md")
# Titles of the ops, in the order of the report.
OPS = {
    "text": "Real text to embeddings",
    "family": "A model of each shape",
    "encoder": "Encoder",
    "training": "Training",
    "latency": "Latency of one sequence",
    "attention": "Attention",
    "layer_norm": "Bias, residual and LayerNorm",
    "bias_gelu": "Bias and GELU",
    "embedding": "Embedding and LayerNorm",
}
# The pages of docs/kernels, and how the names of their calls begin in the evidence.
PAGES = {
    "attention": "attention (?!backward)",
    "attention_backward": "attention backward",
    "layer_norm": "layer_norm",
    "bias_gelu": "bias_gelu",
    "linear_gelu": "linear_gelu",
    "embedding": "embedding",
    "pooling": "pool",
    "rotary": "rotary",
}
NOT_MEASURED = (
    "Not measured yet: nobody has run `make gpu` on a machine with a GPU. It measures all of the above there, beside "
    "the rivals that are installed, and puts the figures here."
)
COLOURS = pyplot.get_cmap("tab10").colors


@dataclass(frozen=True)
class Result:
    """One provider on one workload: the `extra_info` of one benchmark."""

    op: str
    passes: str
    workload: str
    provider: str
    dtype: str
    device: str
    tokens: int
    padded_tokens: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float | None = None
    bound: str | None = None
    percent_of_ceiling: float | None = None
    mode: str = "eager"

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, whatever the provider padded them to."""
        return 1000 * self.tokens / self.median_ms

    @property
    def ours(self) -> bool:
        """Whether it is fastbert, on some path."""
        return self.provider.split()[0] == "fastbert"


@dataclass(frozen=True)
class Promise:
    """A figure that is asked for, alone or by its ratio to a rival's: the `extra_info` of a test of bench_cpu.py."""

    promise: str
    ours: float
    unit: str
    asked: float
    at_most: bool
    rival: str | None = None
    theirs: float | None = None

    @property
    def ratio(self) -> float | None:
        """None where no rival's figure stands beside it."""
        return None if self.theirs is None else self.ours / self.theirs

    @property
    def kept(self) -> bool:
        """Whether it is what was asked for."""
        held = self.ours if self.ratio is None else self.ratio
        return held <= self.asked if self.at_most else held >= self.asked


@dataclass(frozen=True)
class Run:
    """A file of results.

    Attributes:
        folder: its machine's name under benchmarks/results.
        file: a key of `FILES`.
        date: of its end, "2026-11-28".
        info: what `environment()` said of the machine.
        results, promises: in the order of the run.
    """

    folder: str
    file: str
    date: str
    info: dict[str, Any]
    results: list[Result]
    promises: list[Promise]

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU ran it."""
        return any(result.device != "cpu" for result in self.results)

    @property
    def title(self) -> str:
        """The name of what ran it."""
        return str(self.info["device"] if self.has_gpu else self.info["cpu name"])

    @property
    def commit(self) -> str:
        """As much of it as git needs, and "+" where files had changed since."""
        commit = str(self.info["commit"])
        return commit[:10] + "+" * commit.endswith("+")


def read_json(path: Path) -> Any:
    """The file's content.

    Raises:
        ArgumentError: it is not there, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArgumentError(str(path), "no such file", "results in JSON", "See docs/benchmarks.md.") from error
    except ValueError as error:
        raise ArgumentError(str(path), f"no JSON ({error})", "results in JSON", "Run the benchmarks again.") from error


def read_run(path: Path) -> Run:
    """A file of a machine.

    Raises:
        ArgumentError: it is missing, or not what `pytest benchmarks --benchmark-json` writes; it says where.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ArgumentError(str(path), "JSON without a list of benchmarks", "a file of --benchmark-json")
    info = content.get("machine_info", {})
    for key in ("cpu name", "device", "threads", "torch", "commit"):
        if not isinstance(info.get(key), str):
            raise ArgumentError(f"{path}: machine_info", f"no text for {key!r}", "what environment.py stamps")
    date = content.get("datetime")
    if not isinstance(date, str):
        raise ArgumentError(f"{path}: datetime", repr(date), "when it was measured, as pytest-benchmark stamps it")
    results, promises = [], []
    for benchmark in content["benchmarks"]:
        name = benchmark.get("name", "?") if isinstance(benchmark, dict) else repr(benchmark)
        facts = benchmark.get("extra_info", {}) if isinstance(benchmark, dict) else {}
        if "promise" in facts:
            promises.append(_read(Promise, f"{path}: {name}", facts))
        else:
            results.append(_result(f"{path}: {name}", facts))
    return Run(path.parent.name, path.name, date.partition("T")[0], info, results, promises)


def _result(where: str, facts: Any) -> Result:
    result = _read(Result, where, facts)
    if result.op not in OPS or not result.median_ms > 0:
        raise ArgumentError(where, f"{result.op!r} in {result.median_ms} ms", f"one of {sorted(OPS)} in some time")
    return result


_Kind = TypeVar("_Kind", Result, Promise)


def _read(kind: type[_Kind], where: str, facts: Any) -> _Kind:
    values: dict[str, Any] = {}
    for field in fields(kind):
        optional = field.default is not MISSING
        value = facts.get(field.name, field.default if optional else None)
        kinds = (str,) if field.type in ("str", "str | None") else (int, float)
        if not isinstance(value, kinds) and not (optional and value is None):
            raise ArgumentError(
                f"{where}: extra_info[{field.name!r}]", repr(value), field.type, "Run the benchmarks again."
            )
        values[field.name] = value
    return kind(**values)


Row = tuple[str, str, str]  # workload, dtype, mode


def grouped(results: Iterable[Result]) -> dict[tuple[str, str], dict[Row, list[Result]]]:
    """By (op, passes), in the order of the report, and then by row."""
    groups: dict[tuple[str, str], dict[Row, list[Result]]] = {}
    for result in sorted(results, key=lambda result: (list(OPS).index(result.op), result.passes)):
        rows = groups.setdefault((result.op, result.passes), {})
        rows.setdefault((result.workload, result.dtype, result.mode), []).append(result)
    return groups


def ratio(row: Sequence[Result]) -> float | None:
    """How many times as fast the fastest of ours is as the fastest rival; None where one of them is missing."""
    ours = [result.median_ms for result in row if result.ours]
    rivals = [result.median_ms for result in row if not result.ours]
    return min(rivals) / min(ours) if ours and rivals else None


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def performance_table(rows: dict[Row, list[Result]], *, latency: bool) -> str:
    """Rows of workloads, a column for each provider."""
    providers = sorted({result.provider for row in rows.values() for result in row}, key=_ours_first)
    header = ["workload", "dtype", *providers, "fastbert / best rival", "% of ceiling", "fastbert ms (p20 to p80)"]
    return table(header, [_line(*key, row, providers, latency) for key, row in rows.items()])


def _ours_first(provider: str) -> tuple[bool, str]:
    return provider.split()[0] != "fastbert", provider


def _line(workload: str, dtype: str, mode: str, row: list[Result], providers: list[str], latency: bool) -> list[str]:
    by_provider = {result.provider: result for result in row}
    show: Callable[[Result], str] = (lambda result: f"{result.median_ms:.3g} ms") if latency else _throughput
    best = min((result for result in row if result.ours), key=lambda result: result.median_ms, default=None)
    times = ratio(row)
    return [
        workload,
        dtype + (f", {mode}" if mode != "eager" else ""),
        *(show(by_provider[name]) if name in by_provider else "" for name in providers),
        "" if times is None else f"{times:.2f}",
        "" if best is None or best.percent_of_ceiling is None else f"{best.percent_of_ceiling:.0f} ({best.bound})",
        "" if best is None else f"{best.median_ms:.3g} ({best.p20_ms:.3g} to {best.p80_ms:.3g})",
    ]


def _throughput(result: Result) -> str:
    if result.padded_tokens == result.tokens:
        return f"{result.tokens_per_second:,.0f}"
    padded = result.tokens_per_second * result.padded_tokens / result.tokens
    return f"{result.tokens_per_second:,.0f} ({padded:,.0f} padded)"


def promise_table(promises: Iterable[Promise]) -> str:
    """What is asked for, and what there is."""
    lines = []
    for one in promises:
        ratio = "" if one.ratio is None else f"{one.ratio:.3g}"
        rival = "" if one.theirs is None else f"{one.rival} {_figure(one.theirs)}"
        asked = f"{'at most' if one.at_most else 'at least'} {one.asked:g}"
        lines.append(
            [one.promise, f"{_figure(one.ours)} {one.unit}".strip(), rival, ratio, asked, "yes" if one.kept else "no"]
        )
    return table(["work", "fastbert", "best rival", "ratio", "asked", "kept"], lines)


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def run_section(run: Run, level: str, pictures: str) -> str:
    """All tables of one run; `pictures` is where a link finds its pictures."""
    facts = [f"{run.info['threads']} threads", f"torch {run.info['torch']}", f"commit {run.commit}", run.date]
    text = f"{level} {run.title}{FILES[run.file]}\n\n{', '.join(facts)}.\n"
    if run.promises:
        text += f"\n{promise_table(run.promises)}"
    for name, caption in PICTURES.items():
        if _drawable(run, name):
            text += f"\n![{caption}]({pictures}/{run.folder}-{name}.png)\n"
    for (op, passes), rows in grouped(run.results).items():
        unit = "median milliseconds" if op == "latency" else "real tokens/s"
        text += f"\n{level}# {OPS[op]}, {passes}: {unit}\n\n{performance_table(rows, latency=op == 'latency')}"
    return text


def summary(runs: Sequence[Run]) -> str:
    """For the READMEs: texts to embeddings on the machines that were measured last, a line each, and a picture."""
    most: dict[str, tuple[int, Run]] = {}  # of each machine the run with the most text
    for run in runs:
        tokens = max((result.tokens for result in run.results if result.op == "text"), default=0)
        if tokens > most.get(run.folder, (0, run))[0]:
            most[run.folder] = tokens, run
    newest = sorted(most.values(), key=lambda found: found[1].date, reverse=True)[:HEADLINES]
    text = "".join(f"{_headline(run, tokens)}\n" for tokens, run in newest)
    drawn = [run for _, one in newest for run in runs if run.folder == one.folder and _drawable(run, "throughput")]
    for run in drawn[:1]:
        text += f"\n![{PICTURES['throughput']}, {run.title}](docs/performance/{run.folder}-throughput.png)\n"
    if not any(run.has_gpu for run in runs):
        text += "\nNo GPU was measured yet.\n" if runs else "Nothing was measured yet.\n"
    return text


def _headline(run: Run, tokens: int) -> str:
    texts = [result for result in run.results if result.op == "text" and result.tokens == tokens]
    order = (*DTYPES, "int8")
    rows = sorted(grouped(texts)["text", "forward"].items(), key=lambda found: order.index(found[0][1]))
    figures = []
    for (_, dtype, mode), row in rows:
        ours = [one for one in row if one.ours]
        if ours:
            figure = f"{dtype}{', graph' if mode == 'graph' else ''} {max(one.tokens_per_second for one in ours):,.0f}"
            if (times := ratio(row)) is not None:
                rival = min((one for one in row if not one.ours), key=lambda one: one.median_ms)
                figure += f" ({times:.2f} times {rival.provider})"
            figures.append(figure)
    return (
        f"- {run.title}, {run.info['threads']} threads: {texts[0].workload} to embeddings by MiniLM, in tokens/s: "
        f"{'; '.join(figures)}. Commit {run.commit}, {run.date}."
    )


def static_section(evidence: Any) -> str:
    """Kernels by targets, ours and rivals', from what static/evidence.py writes."""
    text = (
        "## Machine code, without a GPU\n\nCompiled offline. Each cell: instructions a lane runs for a unit of work in "
        "the main loop, registers a lane, and the **predicted** picoseconds a unit with what bounds them, were the "
        "whole GPU kept at that bound. A unit is a score of attention, else an element of the result. "
        "Nothing here was timed.\n"
    )
    text += f"\n### All kernels\n\n{_by_target(evidence['kernels'])}"
    if "rivals" in evidence:
        versions = ", ".join(f"{name} {version}" for name, version in evidence["rivals"]["versions"].items())
        text += f"\n### Beside rivals' Triton kernels\n\n{versions}.\n\n{_by_target(evidence['rivals']['kernels'])}"
    return text


def floors() -> dict[str, list[tuple[str, cost.Cost, int]]]:
    """For each page calls of BERT-base in float16, what they cost at least, and their units of work."""
    lengths, half = (300, 300, 300, 101), torch.float16
    tokens, scores = sum(lengths), 12 * sum(length**2 for length in lengths)
    ragged = "12 heads of 64, sequences of 300, 300, 300 and 101 tokens"
    state, ffn = tokens * 768, tokens * 3072
    options = {"residual": True, "x_bias": True}
    entries = {"entries": 512 + 300 + 2}  # different words, positions and types
    return {
        "attention": [(f"forward, {ragged}", cost.attention(lengths, 12, 64, half, lse=True), scores)],
        "attention_backward": [(f"backward, {ragged}", cost.attention_backward(lengths, 12, 64, half), scores)],
        "layer_norm": [
            ("forward, 1001 x 768", cost.layer_norm(tokens, 768, half, statistics=True, **options), state),
            ("backward, 1001 x 768", cost.layer_norm_backward(tokens, 768, half, **options), state),
        ],
        "bias_gelu": [
            ("forward, 1001 x 3072", cost.bias_gelu(tokens, 3072, half), ffn),
            ("backward, 1001 x 3072", cost.bias_gelu_backward(tokens, 3072, half), ffn),
        ],
        "linear_gelu": [("forward, 1001 x 3072 of depth 768", cost.linear_gelu(tokens, 768, 3072, half), ffn)],
        "pooling": [
            (f"{how}, {len(lengths)} sequences, 768 columns", cost.pool(lengths, 768, half, how=how), state)
            for how in ("cls", "mean", "max")
        ],
        "rotary": [(f"{tokens} tokens, 12 heads of 64", cost.rotary(tokens, 12, 64, half), 3 * state)],
        "embedding": [
            ("forward, 1001 x 768", cost.embedding(tokens, 768, half, **entries), state),
            (
                "backward, 1001 x 768, BERT's tables",
                cost.embedding_backward(tokens, 768, half, table_entries=30522 + 512 + 2, **entries),
                state,
            ),
        ],
    }


def kernel_page(page: str, evidence: Any) -> str:
    """Floor, traffic, machine code and rivals of one page of docs/kernels."""
    mine = re.compile(PAGES[page])
    text = "### The floor\n\nFrom `kernels/cost.py`. A unit is a score of attention, else an element of the result.\n\n"
    text += table(
        ["call", "units", "bytes", "bytes / unit", "FLOPs / unit"],
        (
            [call, f"{units:,}", f"{floor.min_bytes:,}", f"{floor.min_bytes / units:.3g}", f"{floor.flops / units:.3g}"]
            for call, floor, units in floors()[page]
        ),
    )
    moved = {name: found for name, found in evidence["traffic"].items() if mine.match(name + " ")}
    text += "\n### Traffic\n\nBytes of different addresses on a small batch, counted by Triton's interpreter.\n\n"
    text += table(
        ["call", "launches", "read", "written", "minimum", "both / minimum"],
        (
            [name, str(found["launches"]), *(f"{found[key]:,}" for key in ("loaded_once", "stored_once", "minimum")),
             f"{found['over_minimum']:.3f}"]
            for name, found in moved.items()
        ),
    )  # fmt: skip
    kernels = {
        arch: {name: found for name, found in by_name.items() if mine.match(name)}
        for arch, by_name in evidence["kernels"].items()
    }
    text += (
        f"\n### Machine code\n\nThe cells are those of [performance.md](../performance.md).\n\n{_by_target(kernels)}"
    )
    by_arch = evidence.get("rivals", {}).get("rows", {})
    if by_arch:
        text += f"\n### Beside rivals\n\n{_rivals_table(by_arch, mine)}"
    return text


def _rivals_table(by_arch: Any, mine: re.Pattern[str]) -> str:
    """Contenders by row: instructions a unit for each target, bytes, and where ours are not fewer."""
    lines = []
    names = {(row, whose): None for rows in by_arch.values() for row, by_whose in rows.items() for whose in by_whose}
    for row, whose in sorted(names, key=lambda name: (name[0], name[1] != "fastbert", name[1])):
        found = {arch: rows[row][whose] for arch, rows in by_arch.items() if whose in rows.get(row, {})}
        if not mine.match(row + " ") or set().union(*(by_arch[arch][row] for arch in found)) == {"fastbert"}:
            continue
        not_lower: dict[str, list[str]] = {}
        for arch, figures in found.items():
            if "reason" in figures:
                what = [name for name in ("instructions", "bytes") if name not in figures["lower"]]
                not_lower.setdefault(f"in {' and '.join(what)}: {figures['reason']}", []).append(arch)
        some = next(iter(found.values()))
        lines.append(
            [row, whose, *(f"{found[arch]['instructions']:.3g}" if arch in found else "" for arch in by_arch),
             f"{some['bytes'] / some['minimum']:.3f}",
             " ".join(f"{', '.join(archs)} {reason}" for reason, archs in not_lower.items())]
        )  # fmt: skip
    return table(["call", "whose", *by_arch, "bytes / minimum", "where ours is not lower"], lines)


def _by_target(kernels: Any) -> str:
    names = sorted({name for by_name in kernels.values() for name in by_name})
    rows = [[name, *(_cell(by_name.get(name)) for by_name in kernels.values())] for name in names]
    return table(["kernel", *kernels], rows)


def _cell(figures: Any) -> str:
    if figures is None:
        return ""
    spills = f", {figures['spills']} spills" if figures["spills"] else ""
    predicted = figures.get("predicted")
    time = f", {predicted['picoseconds_per_unit']:.3g} ps ({predicted['bound']})" if predicted else ""
    return f"{figures['per_unit']['all']:.3g}, {figures['registers']} registers{spills}{time}"


def read_static(path: Path) -> tuple[str, dict[str, str]]:
    """The section of a static.json, and what it says on each page of docs/kernels.

    Raises:
        ArgumentError: it is no JSON, or not what evidence.py writes.
    """
    try:
        evidence = read_json(path)
        return static_section(evidence), {page: kernel_page(page, evidence) for page in PAGES}
    except (KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            str(path), f"evidence that lacks {error}", "what benchmarks/static/evidence.py writes", "Write it again."
        ) from error


PICTURES = {
    "throughput": "Real tokens/s of the encoder's forward by workload",
    "ceiling": "Per cent of the machine's ceiling that fastbert reaches, a dot for each workload",
    "latency": "Latency of one sequence, p20 to p80",
}


def _drawable(run: Run, picture: str) -> list[Result]:
    """The results that a picture shows; none where the file has no pictures."""
    chosen: dict[str, Callable[[Result], bool]] = {
        "throughput": lambda result: (result.op, result.passes) == ("encoder", "forward"),
        "ceiling": lambda result: result.ours and result.percent_of_ceiling is not None,
        "latency": lambda result: result.op == "latency",
    }
    return [result for result in run.results if run.file == DRAWN and chosen[picture](result)]


def draw(run: Run, folder: Path) -> None:
    """Write the pictures of a run, `<machine>-<picture>.png`."""
    for picture, caption in PICTURES.items():
        results = _drawable(run, picture)
        if results:
            figure = _dots(results) if picture == "ceiling" else _bars(results, seconds=picture == "latency")
            figure.suptitle(f"{caption}\n{run.title}", fontsize=10)
            path = folder / f"{run.folder}-{picture}.png"
            temporary = path.with_suffix(".tmp")
            # Without the name of matplotlib's version the same results give the same bytes.
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
            temporary.replace(path)
            pyplot.close(figure)


def _bars(results: list[Result], *, seconds: bool) -> Any:
    """A row of bars for each dtype: workloads, and in each a bar for each provider."""
    panels: dict[str, list[Result]] = {}
    for result in results:
        panels.setdefault(f"{result.dtype}, {result.mode}", []).append(result)
    providers = sorted({result.provider for result in results}, key=_ours_first)
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 1 + 3 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
        workloads = list(dict.fromkeys(result.workload for result in panel))
        width = 0.8 / len(providers)
        for i, provider in enumerate(providers):
            mine = [result for result in panel if result.provider == provider]
            places = [workloads.index(result.workload) - 0.4 + (i + 0.5) * width for result in mine]
            if seconds:
                errors = [
                    [result.median_ms - result.p20_ms for result in mine],
                    [result.p80_ms - result.median_ms for result in mine],
                ]
                heights = [result.median_ms for result in mine]
            else:
                errors, heights = None, [result.tokens_per_second for result in mine]
            axis.bar(places, heights, width, yerr=errors, label=provider, color=COLOURS[i % len(COLOURS)])
        axis.set_xticks(range(len(workloads)), workloads, rotation=20, ha="right", fontsize=8)
        axis.set_ylabel("ms" if seconds else "real tokens/s")
        axis.set_title(title, fontsize=9)
    axes[0, 0].legend(fontsize=8)
    return figure


def _dots(results: list[Result]) -> Any:
    rows = list(dict.fromkeys(f"{result.op} {result.passes}, {result.dtype}" for result in results))
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.35 * len(rows)), layout="constrained")
    for i, bound in enumerate(("memory", "compute")):
        mine = [result for result in results if result.bound == bound]
        heights = [rows.index(f"{result.op} {result.passes}, {result.dtype}") for result in mine]
        percents = [result.percent_of_ceiling for result in mine]
        axis.scatter(percents, heights, label=f"{bound}-bound", color=COLOURS[i], alpha=0.7)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("% of ceiling")
    axis.legend(fontsize=8)
    return figure


def between_markers(path: Path, text: str) -> str:
    """The document with `text` between its markers.

    Raises:
        ArgumentError: it has not one of each marker, in order.
    """
    document = path.read_text(encoding="utf-8")
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ArgumentError(str(path), "no pair of markers", f"{BEGIN} and, below, {END}", "Put them where it goes.")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_runs(results: Path) -> list[Run]:
    """The files of all machines in the folder, those of GPUs last.

    Raises:
        ArgumentError: as `read_run`.
    """
    paths = sorted(path for file in FILES for path in results.glob(f"*/{file}"))
    return sorted((read_run(path) for path in paths), key=lambda run: run.has_gpu)


def documents(runs: Sequence[Run], results: Path, static: Path, root: Path) -> dict[Path, str]:
    """What `report` writes but the pictures, by file.

    Raises:
        ArgumentError: a document has no markers, or the evidence can't be read.
    """
    performance = root / "docs" / "performance.md"
    sections = [run_section(run, "##", "performance") for run in runs]
    if not any(run.has_gpu for run in runs):
        sections.append(f"## GPUs\n\n{NOT_MEASURED}\n")
    pages: dict[str, str] = {}
    if static.exists():
        section, pages = read_static(static)
        sections.append(section)
    found = {
        performance: between_markers(performance, "\n".join(sections)),
        **{root / name: between_markers(root / name, summary(runs)) for name in READMES},
    }
    for page, text in pages.items():
        path = root / "docs" / "kernels" / f"{page}.md"
        found[path] = between_markers(path, text)
    for folder in dict.fromkeys(run.folder for run in runs):
        up = Path(*[".."] * len((results / folder).relative_to(root).parts)) / "docs" / "performance"
        own = [run_section(run, "#", up.as_posix()) for run in runs if run.folder == folder]
        found[results / folder / "report.md"] = "\n".join(own)
    return found


def report(results: Path, static: Path, root: Path) -> list[Run]:
    """Render everything; nothing is written where something can't be read.

    Args:
        results: the folder of machines.
        static: the evidence about machine code; the section is left out where there is no such file.
        root: of the repository whose documents are written.
    """
    runs = read_runs(results)
    rendered = documents(runs, results, static, root)
    pictures = root / "docs" / "performance"
    pictures.mkdir(exist_ok=True)
    for run in runs:
        draw(run, pictures)
    for path, text in rendered.items():
        write(path, text)
    return runs


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    try:
        runs = report(RESULTS, STATIC, ROOT)
    except FastbertError as error:
        parser.exit(2, f"{error}\n")
    for run in runs:
        print(f"{run.title}, {run.file}: {len(run.results)} results, {len(run.promises)} promises")
    print(f"docs/performance.md, docs/kernels and the READMEs are written, of {len(runs)} files of results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
