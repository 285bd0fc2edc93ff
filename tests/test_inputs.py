"""Texts of plain lines, JSON lines, CSV and Parquet."""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from fastbert.cli import piping
from fastbert.cli.inputs import Kind, Texts
from fastbert.errors import ArgumentError, MissingError


@pytest.fixture
def out(tmp_path: Path) -> Iterator[IO[bytes]]:
    with (tmp_path / "out").open("wb") as file:
        yield file


@pytest.fixture
def read(tmp_path: Path, out: IO[bytes]) -> Any:
    def read(name: str, content: str | bytes, kind: Kind = "text", **options: Any) -> list[Any]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        options = {"file_format": None, "columns": None, **options}
        return Texts(tmp_path / name, kind=kind, **options).all(out)

    return read


def test_plain_lines(read: Any) -> None:
    assert read("a.txt", 'one\r\n\n{"text": 3}\n') == ["one", "", '{"text": 3}']
    assert read("a", "x\ty\n", "pair") == [("x", "y")]
    assert read("a", '["Ada", "met"]\n', "words") == [["Ada", "met"]]


def test_json_lines(read: Any) -> None:
    content = '{"id": 1, "text": "one"}\n\n"two"\r\n{"text": "thr\\u00e9e", "n": [1]}'
    for name in ("a.jsonl", "a.ndjson", "a.json"):
        assert read(name, content) == ["one", "two", "thrée"]
    assert read("a", content, file_format="jsonl") == ["one", "two", "thrée"]
    assert read("a.jsonl", '{"sentence": "the only key"}') == ["the only key"]
    assert read("a.jsonl", '{"q": "b", "text": "a"}', columns=["q"]) == ["b"]
    pairs = '["a", "b"]\n{"text": "c", "text_pair": "d"}\n{"x": "e", "y": "f"}'
    assert read("a.jsonl", pairs, "pair") == [("a", "b"), ("c", "d"), ("e", "f")]
    assert read("a.jsonl", '{"a": "1", "b": "2", "c": "3"}', "pair", columns=["c", "a"]) == [("3", "1")]
    assert read("a.jsonl", '["Ada"]\n{"tokens": ["met"], "tags": ["O"]}', "words") == [["Ada"], ["met"]]
    assert read("a.jsonl", '{"query": "q", "documents": ["a", "b"]}', "ranking") == [("q", ["a", "b"])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"a"\n{"text": 3}', r"INPUT, line 2: got 3; expected a string"),
        ('{"text": null}', r"INPUT, line 1: got None"),
        ("a\n", r"INPUT, line 1: got 'a', which is no JSON"),
        ("[\n", r"make JSON lines of it: jq -c '\.\[\]'"),
        ('[{"text": "a"},\n{"text": "b"}]', r"which is no JSON; .* make JSON lines of it: jq -c '\.\[\]'"),
        ('{\n"text": "a"\n}', r"which is no JSON; .* make one of them: jq -c \."),
        ('["a"]', r"INPUT, line 1: got \['a'\]; expected a string.* make JSON lines of it"),
        ('[{"text": "a"}, {"text": "b"}]', r"INPUT, line 1: got .* make JSON lines of it"),
        ('{"a": "x", "b": "y"}', r"got the columns a, b; expected text among them\. Name others by --column"),
        ("{}", r"got the columns \(none\)"),
    ],
)
def test_json_lines_that_are_wrong(content: str, message: str, read: Any) -> None:
    with pytest.raises(ArgumentError, match=message):
        read("a.jsonl", content)


def test_an_empty_line_where_json_is_expected(read: Any) -> None:
    with pytest.raises(ArgumentError, match=r"INPUT, line 1: got '', which is no JSON"):
        read("a", "\n", "words")


def test_csv(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = 'id, text ,label\r\n1,"one, with\na ""quote"" and\r\n\r\nlines",x\r\n\n2,5" pipe,y\n3,"",z'
    expected = ['one, with\na "quote" and\r\n\r\nlines', '5" pipe', ""]
    for at_once in (8192, 2, 1):  # a part may end anywhere in a row
        monkeypatch.setattr(piping, "LINES_AT_ONCE", at_once)
        assert read("a.csv", content) == expected
    assert read("a.csv", "\ufeffreview\nfine\n") == ["fine"]
    assert read("a.tsv", 'text\tn\n"a\tb"\t1\n') == ["a\tb"]
    assert read("a.csv", "a,b\n1,2\n", columns=["b"]) == ["2"]
    assert read("a.csv", "a,b\n1,2\n", "pair") == [("1", "2")]
    assert read("a.csv", "text_pair,text,n\n1,2,3\n", "pair") == [("2", "1")]
    assert read("a.csv", f"text\n{'word ' * 100_000}\n") == ["word " * 100_000]
    assert read("a.csv", "text\n") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,n\na,1\nb\n", r"INPUT, line 3: got 1 fields; expected 2, as the header has"),
        ("text,n\na,1,2\n", r"INPUT, line 2: got 3 fields"),
        ("a,b\n1,2\n", r"INPUT, line 1: got the columns a, b; expected text among them"),
        ("text,text\n1,2\n", r"two columns 'text'"),
        ('text\nfine\n"open\nand\non', r"INPUT, line 3: got unexpected end of data"),
        ("text;label\ngood;pos\n", r"INPUT, line 1: got one column 'text;label'; .* If ';' parts its columns"),
        ("text\tlabel\ngood\tpos\n", r"got one column 'text\\tlabel'"),
        ('text,n\n"a"b,1\n', r"INPUT, line 2: got .* expected a row of CSV"),
    ],
)
@pytest.mark.parametrize("at_once", [8192, 1])
def test_csv_that_is_wrong(
    content: str, message: str, at_once: int, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piping, "LINES_AT_ONCE", at_once)
    with pytest.raises(ArgumentError, match=message):
        read("a.csv", content)


def test_a_row_of_csv_is_given_when_it_is_whole(out: IO[bytes]) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "wb", buffering=0) as file:
        parts = Texts(Path(f"/dev/fd/{read}"), "csv", None).parts(out)
        file.write(b'text\n"one\n')
        assert [next(parts), next(parts)] == [[], []]
        file.write(b'more"\ntwo\n')
        assert next(parts) == ["one\nmore", "two"]
    os.close(read)


def test_columns_are_of_files_that_have_some(read: Any) -> None:
    with pytest.raises(ArgumentError, match=r"--column: got b; expected none: lines of text have no columns"):
        read("a.txt", "x\n", columns=["b"])
    with pytest.raises(ArgumentError, match=r"--column: got 1 columns; expected 2 of them, as for text, text_pair"):
        read("a.csv", "x\n", "pair", columns=["b"])
    with pytest.raises(ArgumentError, match=r"--column: got 2 columns; expected 1"):
        read("a.csv", "x\n", columns=["a", "b"])


def test_what_is_odd_is_said(tmp_path: Path, out: IO[bytes], capsys: pytest.CaptureFixture[str]) -> None:
    for name, content, said in (
        ("a.txt", b"a\n\n\r\n\xff", ["not UTF-8: 1 (first: line 4)", "taken as empty texts: 2 (first: line 2)"]),
        ("a.jsonl", b'"a"\n\n""\n \n', ["empty lines, left out: 2 (first: line 2)"]),
        ("a.csv", b'text\n\na\n""\n\n', ["empty lines, left out: 2 (first: line 2)"]),
        ("b.csv", b"text\n", ["the input is empty"]),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        texts = Texts(tmp_path / name, None, None)
        texts.all(out)
        texts.report()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(said) and all(one in line for one, line in zip(said, lines, strict=True)), lines


def test_parquet(tmp_path: Path, out: IO[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="reads Parquet")
    from pyarrow import parquet

    monkeypatch.setattr(piping, "LINES_AT_ONCE", 2)
    columns = {
        "n": [1, 2, 3],
        "text": ["a", "é", ""],
        "text_pair": ["x", "y", "z"],
        "tokens": [["A", "b"], ["c"], ["d"]],
        "label": arrow.array(["p", "q", "p"]).dictionary_encode(),
    }
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    assert list(Texts(tmp_path / "a.parquet", None, None).parts(out)) == [["a", "é"], [""]]
    assert Texts(tmp_path / "a.parquet", None, ["label"]).all(out) == ["p", "q", "p"]
    assert Texts(tmp_path / "a.parquet", None, None, "pair").all(out) == [("a", "x"), ("é", "y"), ("", "z")]
    assert Texts(tmp_path / "a.parquet", None, None, "words").all(out) == [["A", "b"], ["c"], ["d"]]
    for column, kind, message in (
        (["n"], "text", r"INPUT, row 1: got 1; expected a string in n\.$"),
        (["text", "n"], "pair", r"INPUT, row 1: got \['a', 1\]; expected two strings in text, n"),
        (["x"], "text", r"got the columns n, text.*; expected x among them"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Texts(tmp_path / "a.parquet", None, column, kind).all(out)  # type: ignore[arg-type]
    parquet.write_table(arrow.table({"text": ["a", "b", None]}), tmp_path / "a.parquet")
    with pytest.raises(ArgumentError, match=r"INPUT, row 3: got None; expected a string in text\.$"):
        Texts(tmp_path / "a.parquet", None, None).all(out)
    damaged = arrow.py_buffer(b"finecaf\xe9")
    places = arrow.py_buffer(np.array([0, 4, 8], np.int32).tobytes())
    texts = arrow.Array.from_buffers(arrow.string(), 2, [None, places, damaged])
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "c.parquet")
    with pytest.raises(ArgumentError, match=r"c\.parquet: 'utf-8' codec can't decode"):
        Texts(tmp_path / "c.parquet", None, None).all(out)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    for path, message in ((tmp_path / "b.parquet", "whole Parquet file"), (Path("-"), "Parquet from stdin")):
        with pytest.raises(ArgumentError, match=message):
            Texts(path, "parquet", None)


def test_parquet_names_the_library_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MissingError, match=r"pyarrow: got a library that is not installed.*pip install pyarrow.*the extra `parquet`"
    ):
        Texts(tmp_path / "a.parquet", None, None)


@pytest.mark.parametrize("at_once", [8192, 7])
def test_any_csv_is_read_as_it_was_written(
    at_once: int, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piping, "LINES_AT_ONCE", at_once)
    draw = random.Random(0)
    texts = ["".join(draw.choices('ab ,"\n\t;é', k=draw.randrange(12))) for _ in range(500)]
    with (tmp_path / "made.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["n", "text"])
        writer.writerows(enumerate(texts))
    assert read("a.csv", (tmp_path / "made.csv").read_bytes()) == texts
    assert read("a.jsonl", "\n".join(json.dumps({"n": 1, "text": text}) for text in texts)) == texts
