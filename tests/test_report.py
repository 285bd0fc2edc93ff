"""report: tables and pictures of made-up results, and what it says of files that are not results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report
from report import BEGIN, END, between_markers, read_run

from fastbert.errors import ArgumentError

CPU = {
    "cpu name": "Made-up CPU 9000",
    "device": "cpu",
    "threads": "2",
    "torch": "2.13.0",
    "commit": "0123456789abcdef",
}
HEAD = {"machine_info": CPU, "datetime": "2026-01-02T03:04:05+00:00"}
GPU = CPU | {"device": "Made-up GPU"}
FACTS = {
    "op": "encoder",
    "passes": "forward",
    "workload": "minilm b2 s8 uniform",
    "provider": "fastbert",
    "mode": "eager",
    "dtype": "fp32",
    "device": "cpu",
    "tokens": 1000,
    "padded_tokens": 1000,
    "median_ms": 100.0,
    "p20_ms": 90.0,
    "p80_ms": 120.0,
    "floor_ms": 50.0,
    "bound": "compute",
    "percent_of_ceiling": 50.0,
}


def benchmark(**changes: Any) -> dict[str, Any]:
    return {"name": "test_made_up", "extra_info": FACTS | changes}


def promise(**changes: Any) -> dict[str, Any]:
    figures = {
        "promise": "texts, fp32", "ours": 12300.0, "unit": "tokens/s", "asked": 1.25, "at_most": False,
        "rival": "OpenVINO", "theirs": 10000.0,
    }  # fmt: skip
    return {"name": "test_made_up", "extra_info": figures | changes}


ENCODER = [
    benchmark(),
    benchmark(provider="transformers", padded_tokens=2500, median_ms=200.0, percent_of_ceiling=25.0),
    benchmark(provider="onnxruntime", padded_tokens=2500, median_ms=160.0, percent_of_ceiling=31.0),
    benchmark(workload="minilm b4 s8 full", median_ms=400.0, bound="memory", percent_of_ceiling=12.4),
    benchmark(workload="minilm b4 s8 full", provider="transformers", median_ms=200.0),
]
LATENCY = [
    benchmark(op="latency", workload="minilm b1 s16 full", median_ms=2.0, p20_ms=1.5, p80_ms=3.0, tokens=16),
    benchmark(
        op="latency", workload="minilm b1 s16 full", provider="transformers", median_ms=5.0, p20_ms=4.5, p80_ms=6.0
    ),
]
PAGES = [f"docs/kernels/{page}.md" for page in report.PAGES]
FIGURES = {"registers": 40, "spills": 0, "per_unit": {"all": 1.2345}}
PREDICTED = {"predicted": {"bound": "issue", "picoseconds_per_unit": 0.5}}
OURS, THEIRS = "layer_norm 768 float16: layer_norm_forward", "liger-kernel: layer_norm: _layer_norm_forward_kernel"
TRAFFIC = {"launches": 1, "loaded_once": 1234, "stored_once": 100, "minimum": 1000, "over_minimum": 1.334}
ROW = {
    "fastbert": {"instructions": 17.5, "bytes": 1500, "minimum": 1000},
    "liger-kernel": {
        "instructions": 35.2, "bytes": 1400, "minimum": 1000, "lower": "instructions", "reason": "It is small."
    },
}  # fmt: skip
STATIC = {
    "kernels": {"sm_80": {OURS: FIGURES | PREDICTED}, "gfx942": {OURS: FIGURES | {"spills": 3}}},
    "traffic": {
        "attention backward long": TRAFFIC | {"loaded_once": 700},
        "attention long": TRAFFIC,
        "bias_gelu": TRAFFIC,
    },
    "rivals": {
        "versions": {"liger-kernel": "1.2.3"},
        "kernels": {"sm_80": {THEIRS: FIGURES}},
        "rows": {
            "sm_80": {"layer_norm 768": ROW, "bias_gelu 3072": {"fastbert": ROW["fastbert"]}},
            "gfx942": {"layer_norm 768": ROW},
        },
    },
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the two documents."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "kernels").mkdir()
    for name in (*report.READMES, "docs/performance.md", *PAGES):
        (tmp_path / name).write_text(f"# By hand\n\n{BEGIN}\nold\n{END}\n\nAlso by hand.\n")
    return tmp_path


def put(
    root: Path, machine: str, info: dict[str, str], benchmarks: list[dict[str, Any]], *,
    file: str = "results.json", date: str = "2026-01-02",
) -> Path:  # fmt: skip
    path = root / "benchmarks" / "results" / machine / file
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = {"machine_info": info, "datetime": f"{date}T03:04:05+00:00"}
    path.write_text(json.dumps(stamped | {"benchmarks": benchmarks}))
    return path


def render(root: Path, static: dict[str, Any] | None = None) -> str:
    path = root / "static.json"
    if static is not None:
        path.write_text(json.dumps(static))
    report.report(root / "benchmarks" / "results", path, root)
    return (root / "docs" / "performance.md").read_text()


def test_tables(root: Path) -> None:
    put(root, "cpu", CPU, ENCODER + LATENCY)
    text = render(root)
    assert "## Made-up CPU 9000\n\n2 threads, torch 2.13.0, commit 0123456789, 2026-01-02.\n" in text
    assert (
        "### Encoder, forward: real tokens/s\n\n"
        "| workload | dtype | fastbert | onnxruntime | transformers | fastbert / best rival | % of ceiling | "
        "fastbert ms (p20 to p80) |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| minilm b2 s8 uniform | fp32 | 10,000 | 6,250 (15,625 padded) | 5,000 (12,500 padded) | 1.60 | "
        "50 (compute) | 100 (90 to 120) |\n"
        "| minilm b4 s8 full | fp32 | 2,500 |  | 5,000 | 0.50 | 12 (memory) | 400 (90 to 120) |\n"
    ) in text
    assert (
        "### Latency of one sequence, forward: median milliseconds\n\n"
        "| workload | dtype | fastbert | transformers | fastbert / best rival | % of ceiling | "
        "fastbert ms (p20 to p80) |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| minilm b1 s16 full | fp32 | 2 ms | 5 ms | 2.50 | 50 (compute) | 2 (1.5 to 3) |\n"
    ) in text
    assert text.index("### Encoder") < text.index("### Latency")
    assert text.startswith("# By hand\n\n") and text.endswith("\n\nAlso by hand.\n") and "old" not in text


def test_gpus_are_not_measured_until_one_is(root: Path) -> None:
    put(root, "cpu", CPU, ENCODER)
    assert "## GPUs\n\nNot measured yet" in render(root)
    assert "No GPU was measured yet." in (root / "README.md").read_text()
    put(root, "a-gpu", GPU, [benchmark(device="Made-up GPU", mode="graph", dtype="fp16")])
    text = render(root)
    assert "Not measured yet" not in text and "No GPU" not in (root / "README.md").read_text()
    assert text.index("## Made-up CPU 9000") < text.index("## Made-up GPU")
    assert "| minilm b2 s8 uniform | fp16, graph | 10,000 |  | 50 (compute) |" in text


def test_nothing_measured_at_all(root: Path) -> None:
    text = render(root)
    assert "## GPUs\n\nNot measured yet" in text and "tokens/s" not in text
    assert "Nothing was measured yet." in (root / "README.md").read_text()


def texts(tokens: int, **median_ms: float) -> list[dict[str, Any]]:
    """Rows of a contest of texts, in fp32 but for "fastbert_int8"."""
    return [
        benchmark(
            op="text", workload=f"{tokens} reviews", tokens=tokens, provider=name.replace("_", " "), median_ms=median,
            dtype="int8" if "int8" in name else "fp32",
        )
        for name, median in median_ms.items()
    ]  # fmt: skip


def test_the_readme_has_a_line_of_texts_for_each_machine(root: Path) -> None:
    put(root, "cpu", CPU, ENCODER + texts(100, fastbert=10.0, transformers=20.0))
    promised = texts(1000, fastbert_int8=50.0, fastbert=100.0, OpenVINO=123.0, transformers=150.0)
    put(root, "cpu", CPU, promised, file="cpu.json", date="2026-01-03")
    dirty = GPU | {"commit": f"{CPU['commit']}+"}
    put(root, "gpu", dirty, [benchmark(op="text", dtype="fp16", device="Made-up GPU")], date="2026-01-04")
    put(root, "silent", CPU | {"cpu name": "No texts"}, ENCODER)
    render(root)
    text = (root / "README.md").read_text()
    assert text == (
        f"# By hand\n\n{BEGIN}\n\n"
        "- Made-up GPU, 2 threads: minilm b2 s8 uniform to embeddings by MiniLM, in tokens/s: fp16 10,000. "
        "Commit 0123456789+, 2026-01-04.\n"
        "- Made-up CPU 9000, 2 threads: 1000 reviews to embeddings by MiniLM, in tokens/s: "
        "fp32 10,000 (1.23 times OpenVINO); int8 20,000. Commit 0123456789, 2026-01-03.\n\n"
        "![Real tokens/s of the encoder's forward by workload, Made-up CPU 9000](docs/performance/cpu-throughput.png)"
        f"\n\n{END}\n\nAlso by hand.\n"
    )


def test_the_readme_has_no_more_than_three_machines(root: Path) -> None:
    for day in range(1, 6):
        put(root, f"cpu-{day}", CPU, texts(100, fastbert=10.0), date=f"2026-01-0{day}")
    render(root)
    lines = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("- ")]
    assert [line[-11:] for line in lines] == ["2026-01-05.", "2026-01-04.", "2026-01-03."]


def test_what_is_promised_of_a_cpu(root: Path) -> None:
    kept = [
        promise(),
        promise(asked=1.2),
        promise(promise="16 tokens", ours=1.0825, unit="ms", asked=0.8, at_most=True, theirs=1.75),
        promise(promise="cosine", ours=0.98764, unit="", asked=0.985, rival=None, theirs=None),
    ]
    put(root, "cpu", CPU, kept + texts(1000, fastbert=100.0, transformers=200.0), file="cpu.json")
    put(root, "cpu", CPU, ENCODER)
    text = render(root)
    assert (
        "## Made-up CPU 9000, what is promised of a CPU\n\n"
        "2 threads, torch 2.13.0, commit 0123456789, 2026-01-02.\n\n"
        "| work | fastbert | best rival | ratio | asked | kept |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| texts, fp32 | 12,300 tokens/s | OpenVINO 10,000 | 1.23 | at least 1.25 | no |\n"
        "| texts, fp32 | 12,300 tokens/s | OpenVINO 10,000 | 1.23 | at least 1.2 | yes |\n"
        "| 16 tokens | 1.083 ms | OpenVINO 1.75 | 0.619 | at most 0.8 | yes |\n"
        "| cosine | 0.9876 |  |  | at least 0.985 | yes |\n\n"
        "### Real text to embeddings, forward: real tokens/s\n"
    ) in text
    assert text.index("what is promised") < text.index("### Encoder"), "both files of a machine are there"
    own = (root / "benchmarks" / "results" / "cpu" / "report.md").read_text()
    assert own.startswith("# Made-up CPU 9000, what is promised of a CPU\n") and "## Encoder, forward" in own


def test_the_repository_s_documents_are_those_of_its_results() -> None:
    """`make report` was run after the last change of a file of results."""
    results = report.RESULTS
    for path, text in report.documents(report.read_runs(results), results, report.STATIC, report.ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make report"


def test_a_machine_s_own_report_finds_the_pictures(root: Path) -> None:
    path = put(root, "cpu", CPU, ENCODER + LATENCY)
    render(root)
    own = path.with_name("report.md").read_text()
    links = [line.partition("](")[2].rstrip(")") for line in own.splitlines() if line.startswith("![")]
    assert len(links) == 3
    for link in links:
        assert (path.parent / link).read_bytes().startswith(b"\x89PNG")
    document = (root / "docs" / "performance.md").read_text()
    assert "](performance/cpu-throughput.png)" in document and "](performance/cpu-latency.png)" in document


def test_a_picture_of_nothing_is_not_drawn(root: Path) -> None:
    put(root, "cpu", CPU, LATENCY)
    text = render(root)
    assert "throughput.png" not in text
    assert {path.name for path in (root / "docs" / "performance").iterdir()} == {"cpu-ceiling.png", "cpu-latency.png"}


def test_the_same_results_give_the_same_bytes(root: Path) -> None:
    put(root, "cpu", CPU, ENCODER + LATENCY)

    def everything() -> dict[str, bytes]:
        render(root, STATIC)
        return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    first = everything()
    pictures = [content for name, content in first.items() if name.endswith(".png")]
    assert len(pictures) == 3 and not any(b"Software" in picture for picture in pictures), "matplotlib's version is in"
    assert everything() == first


def test_machine_code_by_kernel_and_target(root: Path) -> None:
    text = render(root, STATIC)
    assert (
        "### All kernels\n\n| kernel | sm_80 | gfx942 |\n| --- | ---: | ---: |\n"
        f"| {OURS} | 1.23, 40 registers, 0.5 ps (issue) | 1.23, 40 registers, 3 spills |\n"
    ) in text
    assert f"liger-kernel 1.2.3.\n\n| kernel | sm_80 |\n| --- | ---: |\n| {THEIRS} | 1.23, 40 registers |\n" in text
    assert "Beside rivals" not in render(root, {key: STATIC[key] for key in ("kernels", "traffic")})
    assert "**predicted** picoseconds" in text and "Nothing here was timed." in text


def test_a_page_of_a_kernel(root: Path) -> None:
    render(root, STATIC)
    pages = {path.stem: path.read_text() for path in (root / "docs" / "kernels").iterdir()}
    assert pages.keys() == set(report.PAGES)
    for text in pages.values():
        assert text.startswith("# By hand\n\n") and text.endswith("\n\nAlso by hand.\n") and "old" not in text
    assert "| forward, 1001 x 3072 | 3,075,072 | 12,306,432 | 4 | 6 |\n" in pages["bias_gelu"]
    assert "| attention long | 1 | 1,234 | 100 | 1,000 | 1.334 |\n" in pages["attention"]
    assert "backward" not in pages["attention"]
    assert "| attention backward long | 1 | 700 | 100 |" in pages["attention_backward"]
    assert f"| {OURS} | 1.23, 40 registers, 0.5 ps (issue) | 1.23, 40 registers, 3 spills |\n" in pages["layer_norm"]
    assert (
        "### Beside rivals\n\n| call | whose | sm_80 | gfx942 | bytes / minimum | where ours is not lower |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| layer_norm 768 | fastbert | 17.5 | 17.5 | 1.500 |  |\n"
        "| layer_norm 768 | liger-kernel | 35.2 | 35.2 | 1.400 | sm_80, gfx942 in bytes: It is small. |\n"
    ) in pages["layer_norm"]
    assert "fastbert" not in pages["bias_gelu"], "a row without a rival"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "got no JSON"),
        ("[]", "got JSON without a list of benchmarks"),
        ('{"benchmarks": {}}', "got JSON without a list of benchmarks"),
        ('{"benchmarks": []}', "machine_info: got no text for 'cpu name'"),
        (json.dumps({"machine_info": CPU, "benchmarks": []}), "datetime: got None; expected when it was measured"),
        (json.dumps(HEAD | {"benchmarks": [promise(ours="much")]}), "extra_info['ours']: got 'much'; expected float"),
        (json.dumps(HEAD | {"benchmarks": [3]}), "3: extra_info['op']: got None"),
        (
            json.dumps(HEAD | {"benchmarks": [{"name": "test_a"}]}),
            "test_a: extra_info['op']: got None; expected str. Run the benchmarks again.",
        ),
        (
            json.dumps(HEAD | {"benchmarks": [benchmark(median_ms="fast")]}),
            "test_made_up: extra_info['median_ms']: got 'fast'; expected float",
        ),
        (json.dumps(HEAD | {"benchmarks": [benchmark(op="dance")]}), "got 'dance' in 100.0 ms"),
        (json.dumps(HEAD | {"benchmarks": [benchmark(median_ms=0.0)]}), "got 'encoder' in 0.0 ms"),
    ],
)
def test_a_file_that_is_no_results(content: str, says: str, root: Path) -> None:
    path = put(root, "cpu", CPU, [])
    path.write_text(content)
    with pytest.raises(ArgumentError) as error:
        render(root)
    assert str(path) in str(error.value) and says in str(error.value)
    assert "old" in (root / "README.md").read_text(), "something was written"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="got no such file"):
        read_run(tmp_path / "results.json")


@pytest.mark.parametrize("content", ["{", '{"kernels": {"sm_80": {"a": {"spills": 0}}}}', '{"kernels": []}'])
def test_corrupt_evidence(content: str, root: Path) -> None:
    (root / "static.json").write_text(content)
    with pytest.raises(ArgumentError, match=r"static.json: got (no JSON|evidence that lacks)"):
        render(root)


@pytest.mark.parametrize("change", [lambda text: text.replace(BEGIN, ""), lambda text: text.replace(END, "")])
def test_a_document_without_markers(change: Callable[[str], str], root: Path) -> None:
    path = root / "README.md"
    path.write_text(change(path.read_text()))
    with pytest.raises(ArgumentError, match=r"README.md: got no pair of markers; expected <!-- report: begin -->"):
        render(root)


def test_the_repository_s_documents_have_markers() -> None:
    for name in (*report.READMES, "docs/performance.md", *PAGES):
        assert between_markers(report.ROOT / name, "text")


def test_text_and_training_need_no_floor(root: Path) -> None:
    put(root, "cpu", CPU, [benchmark(op="text", floor_ms=None, bound=None, percent_of_ceiling=None)])
    assert "| minilm b2 s8 uniform | fp32 | 10,000 |  |  | 100 (90 to 120) |\n" in render(root)


def test_the_readmes_say_the_same() -> None:
    """The figures are those of the files of results, and commands, code and links to pages are the same in both."""
    here, there = ((report.ROOT / name).read_text(encoding="utf-8") for name in report.READMES)
    wanted = report.summary(report.read_runs(report.RESULTS))
    for text in (here, there):
        assert text.split(report.BEGIN)[1].split(report.END)[0].strip() == wanted.strip()
    blocks = [re.findall(r"```.*?```", text, flags=re.DOTALL) for text in (here, there)]
    assert len(blocks[0]) == 3 and set(blocks[0]) <= set(blocks[1])
    linked = [set(re.findall(r"\]\(([^)]+)\)", text)) for text in (here, there)]
    assert linked[0] ^ linked[1] == set(report.READMES)
