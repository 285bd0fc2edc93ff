"""The examples do what they say, on little data; a library that one needs and that is absent skips it."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from real_weights import fetched

from fastbert.rivals import bench

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

Example = Callable[..., str]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], minilm: Path) -> Example:
    """Runs one in this process, with arguments as on the command line; what it prints."""

    def run(name: str, *arguments: object, needs: tuple[str, ...] = (), data: str = "movie_reviews") -> str:
        for library in needs:
            pytest.importorskip(library, reason="the example is about it")
        fetched(data)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(EXAMPLES)
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
        return capsys.readouterr().out

    return run


def percentages(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d+\.\d)%", text)]


@pytest.mark.heavy
@pytest.mark.long
def test_demo(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.1)
    printed = example("demo")
    assert "(300, 384)" in printed and "fastbert fp32" in printed
    assert ".encode(texts)" in printed.splitlines()[-1]


@pytest.mark.heavy
@pytest.mark.long
def test_text_classification_and_its_probabilities(example: Example, tmp_path: Path) -> None:
    printed = example("text_classification", tmp_path, "--small")
    assert percentages(printed)[-1] > 60
    assert re.search(r"positive +0\.\d\d +A warm and funny", printed)
    assert re.search(r"negative +0\.\d\d +Two hours", printed)
    (tmp_path / "texts.txt").write_text("A masterpiece.\nA total failure, dull and stupid.\n")
    printed = example("sentiment", tmp_path / "model", tmp_path / "texts.txt")
    shares = {line.split("  ")[-1]: int(re.findall(r"(\d+)% positive", line)[0]) for line in printed.splitlines()}
    assert shares["A masterpiece."] > 50 > shares["A total failure, dull and stupid."]


@pytest.mark.heavy
@pytest.mark.long
def test_named_entities(example: Example, tmp_path: Path) -> None:
    printed = example("named_entities", tmp_path, "--small", data="conll2003")
    found = re.search(r"entity F1 (0\.\d+)", printed)
    assert found is not None and float(found[1]) > 0.5
    assert re.search(r"PER .*Merkel", printed)


@pytest.mark.heavy
def test_semantic_search(example: Example) -> None:
    printed = example("semantic_search", "--small", "a thriller that kept me guessing")
    assert "thriller" in printed.splitlines()[1]


@pytest.mark.heavy
def test_zero_shot(example: Example) -> None:
    assert percentages(example("zero_shot", "--small"))[0] > 57  # of 400, 2.8 deviations from chance


@pytest.mark.heavy
def test_deduplication(example: Example, tmp_path: Path) -> None:
    assert "405 texts, 400 without" in example("deduplication", "--small")
    texts = ["The cat slept.", "Shares fell.", "THE CAT SLEPT.", "the cat  slept."]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert "4 texts, 2 without" in example("deduplication", tmp_path / "texts.txt")


@pytest.mark.heavy
@pytest.mark.long
def test_pretraining_from_scratch(example: Example, tmp_path: Path) -> None:
    printed = example("from_scratch", tmp_path, "--small")
    below = re.search(r"(-?\d+\.\d+) below", printed)
    assert below is not None and float(below[1]) > 0


@pytest.mark.heavy
@pytest.mark.long
def test_corpus_on_ray(example: Example, tmp_path: Path) -> None:
    printed = example("corpus_on_ray", tmp_path, "--small", needs=("ray", "pyarrow"))
    assert "400 rows written in 4 shards, 0 shards were there" in printed
    assert "embedding: fixed_size_list<element: float>[384]" in printed
    again = example("corpus_on_ray", tmp_path, "--small", needs=("ray", "pyarrow"))
    assert "0 rows written in 0 shards, 4 shards were there" in again


@pytest.mark.heavy
@pytest.mark.long
def test_transformers_trainer(example: Example) -> None:
    printed = example("transformers_trainer", "--small", needs=("transformers", "accelerate"))
    assert percentages(printed)[-1] > 60


@pytest.mark.heavy
@pytest.mark.long
def test_sentence_transformers_training(example: Example, tmp_path: Path) -> None:
    needs = ("sentence_transformers", "accelerate", "datasets")
    before, after = percentages(example("sentence_transformers_training", tmp_path, "--small", needs=needs))
    assert after > before > 30


@pytest.mark.heavy
@pytest.mark.long
def test_lora(example: Example, tmp_path: Path) -> None:
    """huggingface/sentence-transformers#3936: an example left its new head untrained, and out of what it saved."""
    before, after, again = percentages(example("lora", tmp_path, "--small", needs=("transformers", "peft")))[-3:]
    assert after > 60 and after > before and again == after


def notebook() -> dict[str, object]:
    read: dict[str, object] = json.loads((EXAMPLES / "quick_start.ipynb").read_text(encoding="utf-8"))
    return read


def test_the_notebook_has_no_outputs() -> None:
    cells = notebook()["cells"]
    assert isinstance(cells, list) and len(cells) > 6
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.heavy
@pytest.mark.long
def test_the_notebook_runs(minilm: Path) -> None:
    client = pytest.importorskip("nbclient", reason="it runs notebooks")
    pytest.importorskip("ipykernel", reason="nbclient runs them in it")
    pytest.importorskip("transformers", reason="a cell is about it")
    import nbformat

    ran = nbformat.read(EXAMPLES / "quick_start.ipynb", as_version=4)
    client.NotebookClient(ran, timeout=300, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}}).execute()
    printed = "\n".join(output.get("text", "") for cell in ran.cells for output in cell.get("outputs", []))
    assert printed.index("Shares fell") < printed.index("central bank")


def test_every_example_is_listed_and_tested() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        if path.stem != "reviews":
            assert f"({path.name})" in listed, path
            assert f'"{path.stem}"' in tests, path
