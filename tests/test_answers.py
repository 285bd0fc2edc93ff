"""`classify`, `score`, `tag` and `fill-mask`: formats in and out; what they answer is tested with their tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
from command_line import Run

import fastbert
from fastbert.cli import piping
from fastbert.config import HeadConfig
from fastbert.errors import UntrainedWarning
from fastbert.model.heads import HeadModel

TEXTS = ["the film was [MASK]", "[MASK] met [MASK]", "a [MASK]"]
MASKED = "".join(f"{text}\n" for text in TEXTS).encode()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each command; the heads' weights are random."""
    folder = tmp_path_factory.mktemp("answers")
    body = tiny_bert.make(folder / "body")
    kinds: dict[str, tuple[type[HeadModel], HeadConfig | None]] = {
        "classify": (fastbert.BertForSequenceClassification, HeadConfig(("neg", "pos"))),
        "score": (fastbert.BertForSequenceClassification, HeadConfig(("relevant",))),
        "tag": (fastbert.BertForTokenClassification, HeadConfig(("O", "B-PER", "I-PER"))),
        "fill-mask": (fastbert.BertForMaskedLM, None),
    }
    for command, (kind, head) in kinds.items():
        with pytest.warns(UntrainedWarning):
            model = fastbert.load(body, kind, head=head)
        fastbert.save(model, folder / command)
        shutil.copy(body / "vocab.txt", folder / command)
    return {command: folder / command for command in kinds}


def test_fill_mask(run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piping, "LINES_AT_ONCE", 2)
    result = run("fill-mask", "--model", folders["fill-mask"], "--top-k", 3, stdin=MASKED)
    assert (result.code, result.err) == (0, "")
    assert [row["text"] for row in result.rows] == TEXTS
    expected = fastbert.fill_mask(TEXTS, folders["fill-mask"], top_k=3)
    for row, masks in zip(result.rows, expected, strict=True):
        got: Any = row["masks"]
        assert [[one["id"] for one in mask] for mask in got] == [[one.id for one in mask] for mask in masks]
        assert [[one["token"] for one in mask] for mask in got] == [[one.token for one in mask] for mask in masks]
    asked = ("fill-mask", "--model", folders["fill-mask"], "--target", "great", "--target", "dull")
    only: Any = run(*asked, stdin=MASKED).rows[0]["masks"]
    assert {one["token"] for one in only[0]} == {"great", "dull"}
    refused = run("fill-mask", "--model", folders["fill-mask"], stdin=b"a [MASK]\nnone\n")
    assert refused.code == 2 and "texts[1]: got no [MASK] in it" in refused.err


@pytest.mark.parametrize("ending", ["csv", "jsonl", "tsv"])
@pytest.mark.parametrize("command", ["classify", "score"])
def test_pairs_of_any_file(command: str, ending: str, run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    pairs = [("the film", "was fine"), ("a", "dull plot"), ("", "music")]
    path = tmp_path / f"pairs.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps({"q": a, "text": b}) + "\n" for a, b in pairs))
    else:
        between = "," if ending == "csv" else "\t"
        path.write_text("".join(f"{a}{between}{b}\n" for a, b in [("q", "text"), *pairs]))
    arguments = (command, path, "--model", folders[command], "--pairs")
    for columns, expected in (((), pairs), (("--column", "text", "--column", "q"), [(b, a) for a, b in pairs])):
        result = run(*arguments, *columns)
        assert (result.code, result.err) == (0, "")
        assert [row["text"] for row in result.rows] == [list(pair) for pair in expected]
        if command == "score":
            scores = fastbert.score(expected, folders[command]).tolist()
            assert [row["score"] for row in result.rows] == pytest.approx(scores)
        else:
            labels = [one.label for one in fastbert.classify(expected, folders[command])]
            assert [row["label"] for row in result.rows] == labels


def test_scores_are_an_array(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    assert run("score", "--model", folders["score"], "--output", out, stdin=b"the film\na\n").code == 0
    np.testing.assert_allclose(np.load(out), fastbert.score(["the film", "a"], folders["score"]), atol=1e-6)
    refused = run("classify", "--model", folders["classify"], "--output", out, stdin=b"a\n")
    assert refused.code == 2 and ".npy holds an array, and this is none" in refused.err


def test_words_of_objects(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    words = [["Ada", "met", "Alan"], ["music"]]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"id": 1, "tokens": one}) + "\n" for one in words))
    result = run("tag", tmp_path / "words.jsonl", "--model", folders["tag"], "--words", "json")
    assert (result.code, [row["words"] for row in result.rows]) == (0, words)


@pytest.mark.parametrize("command", ["classify", "score", "tag", "fill-mask"])
def test_parquet_in_and_out(command: str, run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="reads and writes Parquet")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"n": [1, 2, 3], "text": TEXTS}), tmp_path / "texts.parquet")
    out = tmp_path / "out.parquet"
    for given in ([tmp_path / "texts.parquet"], []):
        result = run(command, *given, "--model", folders[command], "--output", out, stdin=MASKED)
        assert (result.code, result.out, result.err) == (0, b"", "")
        rows = parquet.read_table(out).to_pylist()
        expected = run(command, "--model", folders[command], stdin=MASKED).rows
        for row, one in zip(rows, expected, strict=True):
            assert row.keys() == one.keys() and row["text"] == one["text"]
            assert row.get("label") == one.get("label")
            if command == "score":
                assert row["score"] == pytest.approx(one["score"])
            if command == "fill-mask":
                assert [[token["id"] for token in mask] for mask in row["masks"]] == [
                    [token["id"] for token in mask]
                    for mask in one["masks"]  # type: ignore[attr-defined]
                ]
    piped = run(command, "--model", folders[command], "--format", "parquet", stdin=MASKED)
    assert piped.out == out.read_bytes()
