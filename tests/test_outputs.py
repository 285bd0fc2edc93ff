"""JSON lines, .npy and Parquet that commands write."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.cli import piping
from fastbert.cli.outputs import OutputFormat, output_format, writing
from fastbert.errors import ArgumentError, MissingError

RECORD = {
    "text": ["", ""],
    "label": "",
    "probabilities": {"pos": 0.0, "n e g": 0.0},
    "entities": [{"start": 0, "type": ""}],
}
COLUMNS: dict[str, Any] = {
    "text": [("a", "é"), ("b\ud800", "\n")],
    "label": ["pos", "n e g"],
    "probabilities": [{"pos": 0.75, "n e g": 0.25}, {"n e g": 0.9, "pos": 0.1}],
    "entities": [[], [{"start": 3, "type": "PER"}]],
}
VECTORS = np.array([[0.1, -1e-30], [3.0, 1 / 3], [1e20, 0.0]], np.float32)


def written(path: Path, how: OutputFormat, example: dict[str, Any], *parts: dict[str, Any]) -> Path:
    with path.open("wb") as file, writing(file, how, example) as write:
        for part in parts:
            write(part)
    return path


def test_json_lines(tmp_path: Path) -> None:
    rows = list(map(json.loads, written(tmp_path / "x", "jsonl", RECORD, COLUMNS, COLUMNS).read_text().splitlines()))
    assert len(rows) == 4 and rows[:2] == rows[2:]
    for i, row in enumerate(rows[:2]):
        assert row == {name: list(column[i]) if name == "text" else column[i] for name, column in COLUMNS.items()}
    example = {"text": "", "embedding": VECTORS[0]}
    lines = written(tmp_path / "x", "jsonl", example, {"text": ["a", "b", "c"], "embedding": VECTORS}).read_text()
    got = np.array([json.loads(line)["embedding"] for line in lines.splitlines()], np.float32)
    np.testing.assert_array_equal(got, VECTORS)
    one = written(tmp_path / "x", "jsonl", {"score": np.float32(0)}, {"score": VECTORS[:, 1]}).read_text()
    np.testing.assert_array_equal([np.float32(json.loads(line)["score"]) for line in one.splitlines()], VECTORS[:, 1])


def test_npy(tmp_path: Path) -> None:
    for example, column in ((VECTORS[0], VECTORS), (np.float32(0), VECTORS[:, 1])):
        part = {"text": ["a"] * 3, "it": column}
        path = written(tmp_path / "x.npy", "npy", {"text": "", "it": example}, part, part)
        np.testing.assert_array_equal(np.load(path), np.concatenate([column, column]))
        empty = np.load(written(tmp_path / "x.npy", "npy", {"text": "", "it": example}))
        assert empty.shape == (0, *np.shape(example)) and empty.dtype == np.float32


def test_npy_is_for_what_can_be_written_twice() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "wb") as file, pytest.raises(ArgumentError, match=r"a pipe; expected a file for \.npy"):
        writing(file, "npy", {"it": VECTORS[0]}).__enter__()
    os.close(read)


@pytest.mark.parametrize("at_once", [8192, 2])
def test_parquet(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="writes Parquet")
    from pyarrow import parquet

    monkeypatch.setattr(piping, "LINES_AT_ONCE", at_once)
    path = written(tmp_path / "x", "parquet", RECORD, COLUMNS, COLUMNS, COLUMNS)
    rows = parquet.read_table(path).to_pylist()
    expected = {**COLUMNS, "text": [["a", "é"], ["b\ufffd", "\n"]]}
    assert rows == 3 * [{name: column[i] for name, column in expected.items()} for i in range(2)]
    assert parquet.ParquetFile(path).num_row_groups == (1 if at_once > 6 else 3)
    example = {"text": "", "embedding": VECTORS[0], "score": np.float32(0)}
    part = {"text": ["a", "b", "c"], "embedding": VECTORS, "score": VECTORS[:, 0]}
    table = parquet.read_table(written(tmp_path / "x", "parquet", example, part))
    assert table.schema.field("embedding").type == arrow.list_(arrow.float32(), 2)
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), VECTORS)
    np.testing.assert_array_equal(table["score"].to_numpy(), VECTORS[:, 0])
    nothing = parquet.read_table(written(tmp_path / "x", "parquet", example))
    assert nothing.num_rows == 0 and nothing.schema == table.schema


def test_the_ending_says_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ending in ("npz", "csv", "CSV", "gz", "onnx"):
        with pytest.raises(ArgumentError, match=r"--output: got .*; expected another ending"):
            output_format(tmp_path / f"x.{ending}", None)
        assert output_format(tmp_path / f"x.{ending}", "jsonl") == "jsonl"
    for name in ("x.jsonl", "x.json", "x.txt", "x", "x.v2"):
        assert output_format(tmp_path / name, None) == "jsonl"
    assert output_format(None, None) == "jsonl"
    assert output_format(tmp_path / "x.NPY", None, npy=True) == output_format(tmp_path / "x", "npy", npy=True) == "npy"
    with pytest.raises(ArgumentError, match="Add --output FILE"):
        output_format(None, "npy", npy=True)
    for path, given, name in ((tmp_path / "x.npy", None, "--output"), (tmp_path / "x", "npy", "--format")):
        with pytest.raises(ArgumentError, match=rf"{name}: got .*; expected jsonl or parquet"):
            output_format(path, given)  # type: ignore[arg-type]
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingError, match=r"pip install pyarrow"):
        output_format(tmp_path / "x.parquet", None)
