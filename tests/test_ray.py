"""A corpus through a model on Ray. What needs no Ray is tested without; the rest is long, and skips where it is not."""

from __future__ import annotations

import csv
import datetime
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from processes import PYTHON, heed_signals

import fastbert
from fastbert.checkpoints.load import load, save
from fastbert.config import HeadConfig
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.model.heads import BertForSequenceClassification
from fastbert.ray import inputs, worker
from fastbert.ray.inputs import Shard, columns_of, files_of, paths_of, read, shards_of
from fastbert.ray.manifest import MANIFEST, Manifest, checksum_of_files
from fastbert.ray.run import shares
from fastbert.ray.worker import Job
from fastbert.tasks.encode import TextEncoder

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = dict.fromkeys(
    ("pooling", "normalize", "max_length", "prompt", "prompt_name", "truncate_dim", "batch_tokens"), None
)


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(tiny_bert.PLAIN, k=draw.randrange(30))) for _ in range(count)]


def json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.make(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def classifier(model: Path) -> Path:
    folder = model.parent / "classifier"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = HeadConfig(labels=("bad", "good"))
        save(BertForSequenceClassification(load(model).config, head), folder)
    shutil.copy(model / "vocab.txt", folder)
    return folder


@pytest.fixture
def write(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the first shard of a file, as a worker would; the file that it wrote."""

    def write(
        path: Path, form: Any, keep: list[str] | None = None, change: Callable[[], object] = bool, **other: Any
    ) -> Path:
        (tmp_path / "out").mkdir(exist_ok=True)
        root, _, files = files_of([path])
        columns = columns_of(files)
        kept = columns if keep is None else {name: columns[name] for name in keep}
        job = Job(
            "encode", str(model), checksum_of_files(str(model)), "fp32", OPTIONS, "text", keep, kept, form,
            str(tmp_path / "out"), torch.get_num_threads(), "cpu",
        )  # fmt: skip
        job = replace(job, **other)
        shard = shards_of(root, files, 2**20)[0]
        change()
        rows, size = worker.write(shard, job, worker.load(job))
        written = tmp_path / "out" / f"{shard.output}.{form}"
        assert size == written.stat().st_size and rows == sum(len(part.texts) for part in read(shard, "text", None))
        assert list(written.parent.glob(".*")) == []
        return written

    return write


def rows_of(shard: Shard) -> list[tuple[str, dict[str, Any]]]:
    parts = read(shard, "text", None)
    return [(part.place(i), row) for part in parts for i, row in enumerate(part.rows)]


def test_each_line_is_in_one_shard(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "i": i}) for i, text in enumerate(["", "a", "b" * 90, "ü\u2028", "c", "d" * 7])]
    content = "\ufeff" + lines[0] + "\n\n" + lines[1] + "\r\n" + "\n".join(lines[2:5]) + "\n \n" + lines[5]
    path = tmp_path / "a.jsonl"
    for end in ("", "\n", "\n\n"):
        path.write_bytes((content + end).encode())
        numbered = [(f"{path}, line {n}", i) for i, n in enumerate((1, 3, 4, 5, 6, 8))]
        for size in range(1, 300):
            shards = shards_of(tmp_path, [path], size)
            assert len({shard.output for shard in shards}) == len(shards) == -(-path.stat().st_size // size)
            found = [(place, row["i"]) for shard in shards for place, row in rows_of(shard)]
            assert found == numbered, (size, end)


def test_shards_of_files_that_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "part=1").mkdir()
    table = tmp_path / "part=1" / "a.csv"
    table.write_text('text,n\n"two\nlines",1\n\nb\n')
    (shard,) = shards_of(tmp_path, [table], 4)
    assert shard.output == "part=1/a.csv-00000"
    assert rows_of(shard) == [
        (f"{table}, line 3", {"text": "two\nlines", "n": "1"}),
        (f"{table}, line 5", {"text": "b", "n": None}),
    ]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "a"}\n' * 9))
    (shard,) = shards_of(tmp_path, [packed], 4)
    assert len(rows_of(shard)) == 9
    (tmp_path / "empty.jsonl").touch()
    (shard,) = shards_of(tmp_path, [tmp_path / "empty.jsonl"], 4)
    assert rows_of(shard) == []


def test_shards_of_row_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra ray")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra ray")
    path = tmp_path / "a.parquet"
    given = [{"text": text, "i": i} for i, text in enumerate(texts(100))]
    parquet.write_table(pyarrow.Table.from_pylist(given), path, row_group_size=7)
    group = parquet.ParquetFile(path).metadata.row_group(0).total_byte_size
    for size, count in ((1, 15), (group + 1, None), (10**9, 1)):
        shards = shards_of(tmp_path, [path], size)
        assert count is None or len(shards) == count
        parts = [part for shard in shards for part in read(shard, "text", None)]
        assert [row for part in parts for row in part.rows.to_pylist()] == given
        places = [part.place(i) for part in parts for i in range(len(part.texts))]
        assert places == [f"{path}, row {i}" for i in range(1, 101)]
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    (shard,) = shards_of(tmp_path, [path], 1)
    assert sum(len(part.texts) for part in read(shard, "text", None)) == 0


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.JSONL", "a/d.json.gz", "_SUCCESS", ".a.crc", "_old/e.jsonl", "a/.f/g.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    root, form, files = files_of(paths_of(tmp_path))
    assert (root, form) == (tmp_path, "jsonl")
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a/c.JSONL", "a/d.json.gz", "b.jsonl"]
    assert files_of(paths_of([tmp_path / "b.jsonl", tmp_path / "a"])) == (root, form, files)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.txt"], "a.txt; expected files that end with one of .parquet, .json, .jsonl"),
        (["a.parquet.gz"], "a.parquet.gz; expected files that end"),
        (["a.csv", "b.jsonl"], "a.csv and .*b.jsonl; expected files of one format"),
        (["a.csv", "a.csv"], "a.csv twice; expected each file once"),
        (["empty"], "expected files, or folders of files"),
        ([], "got nothing; expected files, or folders of files"),
        (["gone.csv"], "gone.csv, where nothing is"),
        (["s3://bucket/a.csv"], "a file system that all machines share. Mount the store"),
    ],
)
def test_files_that_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    for name in ("a.txt", "a.csv", "b.jsonl", "a.parquet.gz"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=f"^dataset: .*{message}"):
        files_of(paths_of([name if "://" in name else tmp_path / name for name in names]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', ", line 3: got Expecting ',' delimiter"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r", line 2: got \[1\]; expected a JSON object a line"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', ", line 2: got None as 'text'; expected a text"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "a"}\n', ", line 2: got None as 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ", line 2: got the byte 0xff"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), ", line 1: got the byte 0xff"),
        ("a.csv", b"text,n\na,1\nb,2,3\n", ", line 3: got 3 fields; expected 2"),
        ("a.csv", b'text,n\na,1\n"b,2\n', ", after line 2: got unexpected end of data"),
        ("a.csv", b"text,n\na,1\n\xff,2\n", ", line 3: got the byte 0xff"),
        ("a.csv", b"txt,n\na,1\n", ": got no column 'text'"),
        ("a.csv.gz", gzip.compress(b"text\na\n" * 99, mtime=0)[:-9], ": got .*; expected a whole gzip file"),
        ("a.jsonl.gz", b'{"text": "a"}\n', ": got Not a gzipped file"),
    ],
)
def test_a_damaged_row_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (shard,) = shards_of(tmp_path, [tmp_path / name], 2**20)
    with pytest.raises(ArgumentError, match=f"^{tmp_path / name}{message}"):
        list(read(shard, "text", None))


def test_a_damaged_row_of_parquet_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra ray")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra ray")
    path = tmp_path / "a.parquet"
    not_utf8 = pyarrow.array([b"a", b"b", b"\xff"]).view(pyarrow.string())
    for column, message in (
        (["a", "b", None], r", row 3: got None as 'text'; expected a text\."),
        ([b"a", b"b"], ", row 1: got b'a' as 'text'; expected a text"),
        (not_utf8, ", row 3: got the byte 0xff"),
    ):
        parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=2)
        shard = shards_of(tmp_path, [path], 1)[-1]
        with pytest.raises(ArgumentError, match=f"^{path}{message}"):
            list(read(shard, "text", None))
    with pytest.raises(ArgumentError, match=f"^{path}: got no column 'other'"):
        list(read(shard, "other", None))
    content = path.read_bytes()
    for damaged in (content[:-20], b"", content[:4] + bytes(60) + content[64:]):
        path.write_bytes(damaged)
        with pytest.raises(ArgumentError, match=f"^{path}: .* expected a whole Parquet file"):
            [list(read(shard, "text", None)) for shard in shards_of(tmp_path, [path], 1)]


def test_a_result_that_is_not_finite_is_named(
    write: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "ROWS_AT_ONCE", 8)
    broken = load(model)  # a row that overflows, since weights that are not finite are refused
    with torch.no_grad():
        broken.embeddings.word.weight[tiny_bert.VOCABULARY.index("awful"), ::2] = 3e38
    save(broken, tmp_path / "broken")
    shutil.copy(model / "vocab.txt", tmp_path / "broken")
    rows = [{"text": text} for text in [*texts(21), "an awful film", *texts(20)]]
    folder = str(tmp_path / "broken")
    with pytest.raises(BackendError, match=f"^{tmp_path}/a.jsonl, line 22: got a result of NaN or infinity"):
        write(json_lines(tmp_path / "a.jsonl", rows), "jsonl", model=folder, checksum=checksum_of_files(folder))
    assert list((tmp_path / "out").iterdir()) == []


def test_json_lines_keep_what_they_hold(write: Any, model: Path, tmp_path: Path) -> None:
    odd = {"n": 2**70, "nested": [{"a": 1.5}, None], "ü": "\ud800", "": True}
    rows = [{"text": text, "i": i, **(odd if i % 3 else {})} for i, text in enumerate(texts(50))]
    found = [json.loads(line) for line in write(json_lines(tmp_path / "a.jsonl", rows), "jsonl").open()]
    embeddings = np.array([row.pop("embedding") for row in found], np.float32)
    assert found == rows
    np.testing.assert_array_equal(embeddings, TextEncoder.from_folder(model).encode(texts(50)))


def test_tables_give_texts_back(write: Any, model: Path, tmp_path: Path) -> None:
    odd = ["a\rb", 'quo"te', "two\r\nlines", "", ",", " x ", "007", "null"]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "id"], *([text, "01"] for text in odd)])
    with write(tmp_path / "a.csv", "csv").open(newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    assert header == ["text", "id", "embedding"] and [row[:2] for row in rows] == [[text, "01"] for text in odd]
    embeddings = np.array([json.loads(row[2]) for row in rows], np.float32)
    np.testing.assert_array_equal(embeddings, TextEncoder.from_folder(model).encode(odd))
    given = [{"text": "a", "n": 1, "more": {"b": [None]}, "no": None}, {"text": "b", "n": True}]
    with write(json_lines(tmp_path / "b.jsonl", given), "csv").open(newline="") as file:
        rows = [row[:4] for row in csv.reader(file, strict=True)]
    assert rows == [["text", "n", "more", "no"], ["a", "1", '{"b": [null]}', ""], ["b", "true", "", ""]]


def test_parquet_from_json(write: Any, model: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra ray")
    rows = [
        {"text": text, "i": i, "x": i if i % 2 else i / 3, "odd": [i] if i else None, "no": None}
        for i, text in enumerate(texts(20))
    ]
    table = parquet.read_table(write(json_lines(tmp_path / "a.jsonl", rows), "parquet"))
    types = ["string", "int64", "double", "string", "string", "fixed_size_list<element: float>[32]"]
    assert [str(field.type) for field in table.schema] == types
    found = table.to_pylist()
    embeddings = np.array([row.pop("embedding") for row in found], np.float32)
    np.testing.assert_array_equal(embeddings, TextEncoder.from_folder(model).encode(texts(20)))
    assert found == [row | {"odd": row["odd"] and json.dumps(row["odd"])} for row in rows]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_nothing_after_the_first_rows_is_dropped(
    form: str, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key first seen behind the sampled rows (DuckDB 25826, Polars 29330, ClickHouse 120348)."""
    pytest.importorskip("pyarrow", reason="the extra ray")
    monkeypatch.setattr(inputs, "SAMPLE", 2)
    path = json_lines(tmp_path / "a.jsonl", [{"text": "a", "n": 1}, {"text": "b"}, {"text": "c", "late": 1}])
    with pytest.raises(ArgumentError, match=r"line 3: got a column 'late'; expected .*text, n\. Leave the column out"):
        write(path, form)
    write(path, form, keep=["n"])
    write(path, "jsonl")


@pytest.mark.parametrize("value", ["x", 1.5, True, 2**63, [1], {"a": 1}])
def test_values_of_another_type_are_named(value: Any, write: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra ray")
    rows = [{"text": "a", "n": 1}] * inputs.SAMPLE + [{"text": "a", "n": value}]
    with pytest.raises(ArgumentError, match=r"line 1001: got .* as 'n'; expected a value of type int, as the first"):
        write(json_lines(tmp_path / "a.jsonl", rows), "parquet")


@pytest.mark.filterwarnings("ignore:1 lone surrogates")
def test_what_a_format_can_not_hold_is_named(write: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra ray")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra ray")
    path = tmp_path / "a.parquet"
    for value in (float("nan"), datetime.date(2026, 1, 1), b"x"):
        parquet.write_table(pyarrow.table({"text": ["a"], "n": [value]}), path)
        for form in ("jsonl", "csv"):
            with pytest.raises(ArgumentError, match=r"row 1: got .* as 'n'; expected a value that JSON has"):
                write(path, form)
        assert parquet.read_table(write(path, "parquet")).column("n").type == pyarrow.array([value]).type
    path = json_lines(tmp_path / "b.jsonl", [{"text": "\ud800"}])
    for form in ("parquet", "csv"):
        with pytest.raises(ArgumentError, match=r"line 1: got .*ud800' as 'text'"):
            write(path, form)
    with pytest.raises(ArgumentError, match="line 1: got a column 'embedding'; expected other columns"):
        write(json_lines(tmp_path / "c.jsonl", [{"text": "a", "embedding": 1}]), "jsonl")


def test_parquet_of_other_columns_than_the_first_is_named(write: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra ray")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra ray")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "n": [1]}), path)
    for columns in ({"text": pyarrow.string(), "n": pyarrow.int32()}, {"text": pyarrow.string()}):
        with pytest.raises(ArgumentError, match=r"a.parquet, row 1: got 'n' of type int64; expected (int32|None), as"):
            write(path, "parquet", columns=columns)
        write(path, "jsonl", columns=columns)


def test_a_shard_that_workers_die_of_ends(write: Any, tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    begun = tmp_path / "out" / ".a.jsonl-00000.jsonl.begun"
    write(path, "jsonl").unlink()
    begun.write_bytes(b"." * (worker.TRIES - 1))
    write(path, "jsonl").unlink()
    begun.write_bytes(b"." * worker.TRIES)
    with pytest.raises(BackendError, match=f"{path}: got 4 workers that died while they wrote a.jsonl-00000"):
        write(path, "jsonl")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_worker_has_its_share_of_threads(model: Path, tmp_path: Path) -> None:
    """Ray's own worker has loaded no torch yet either, when it makes its Worker."""
    code = f"""
import os, sys
from fastbert.ray import worker
from fastbert.ray.manifest import checksum_of_files
model, text = {str(model)!r}, {{"text": str}}
files = checksum_of_files(model)
job = worker.Job("encode", model, files, "fp32", {OPTIONS}, "text", None, text, "csv", "", 3, "cpu")
worker.Worker(job)
assert "torch" not in sys.modules and "tokenizers" not in sys.modules
worker.load(job)
import torch
print(torch.get_num_threads(), os.environ["RAYON_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "9"}
    done = subprocess.run([*PYTHON, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "3", "PASSIVE"], done.stderr


def test_a_model_that_differs_between_machines(write: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="other files than on the machine that started the run"):
        write(json_lines(tmp_path / "a.jsonl", [{"text": "a"}]), "jsonl", checksum="0")


def test_the_checksum_is_of_what_a_model_is(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").touch()
    (copy / ".cache").mkdir()
    (copy / ".cache" / "a.json").touch()
    assert checksum_of_files(str(copy)) == checksum_of_files(str(model))
    (copy / "vocab.txt").write_text((copy / "vocab.txt").read_text().replace("film", "fill"))
    assert checksum_of_files(str(copy)) != checksum_of_files(str(model))


RUN = {"task": "encode", "pooling": None, "columns": {"text": "str"}}


def planned(*names: str, changed: int = 5) -> list[Shard]:
    return [Shard(f"/in/{name[:1]}", 9, changed, 0, 1, f"{name[:1]}-0000{name[1:]}") for name in names]


def record(shard: Shard, out: Path) -> dict[str, Any]:
    (out / f"{shard.output}.csv").write_text("text")
    return {"shard": shard.output, "input": shard.name, "size": 9, "changed": shard.changed, "rows": 1, "bytes": 4}


def test_a_manifest_goes_on(tmp_path: Path) -> None:
    path, shards = tmp_path / MANIFEST, planned("a0", "a1", "b0", "c0")
    manifest = Manifest(path, RUN, "csv", shards)
    for shard in shards[:3]:
        manifest.add(record(shard, tmp_path))
    with path.open("a") as file:
        file.write('{"shard": "c-00000", "ro')  # killed here
    record(shards[3], tmp_path)  # renamed, but not noted
    (tmp_path / "a-00001.csv").write_text("damaged")
    again = Manifest(path, RUN, "csv", shards)
    assert list(again.done) == ["a-00000", "b-00000"]
    again.add(record(shards[3], tmp_path))
    (tmp_path / "b-00000.csv").unlink()
    assert list(Manifest(path, RUN, "csv", shards).done) == ["a-00000", "c-00000"]
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], "nonsense", *lines[1:]]))
    with pytest.raises(ArgumentError, match=f"{path}, line 2: got 'nonsense'; expected a JSON object. Remove this"):
        Manifest(path, RUN, "csv", shards)
    path.write_bytes(f"{lines[0]}\n\xff{'[' * 100_000}\n".encode("latin-1"))
    with pytest.raises(ArgumentError, match=f"{path}, line 2: got .*; expected a JSON object"):
        Manifest(path, RUN, "csv", shards)
    path.write_text("")
    with pytest.raises(ArgumentError, match="a file without a line"):
        Manifest(path, RUN, "csv", shards)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shard": "../kept"},
        {"shard": "a-/../../kept"},
        {"shard": "a-00000/../../kept"},
        {"shard": "b-00000"},
        {"shard": 5},
        {"input": None},
        {"bytes": "4"},
        {"rows": True},
    ],
)
def test_a_manifest_names_no_files_but_its_own(wrong: dict[str, Any], tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept.csv"
    out.mkdir()
    kept.write_text("text")
    path, shards = out / MANIFEST, planned("a0", "b0")
    manifest = Manifest(path, RUN, "csv", shards)
    manifest.add(record(shards[0], out) | wrong)
    with pytest.raises(ArgumentError, match=f"{path}, line 2: got .*; expected the record of a shard. Remove this"):
        Manifest(path, RUN, "csv", shards)
    assert kept.read_text() == "text"


def test_inputs_that_come_change_and_go(tmp_path: Path) -> None:
    path, shards = tmp_path / MANIFEST, planned("a0", "a1", "a2", "b0")
    manifest = Manifest(path, RUN, "csv", shards)
    for shard in shards:
        manifest.add(record(shard, tmp_path))
    assert len(Manifest(path, RUN, "csv", [*shards, *planned("c0")]).done) == 4
    before = path.read_bytes()
    with pytest.raises(
        ArgumentError, match=f"dataset: got no b, of which shards are in {tmp_path}; expected all files"
    ):
        Manifest(path, RUN, "csv", planned("a0", "a1", changed=6))
    assert path.read_bytes() == before and len(list(tmp_path.glob("*.csv"))) == 4
    assert list(Manifest(path, RUN, "csv", [*planned("a0", "a1", changed=6), *planned("b0")]).done) == ["b-00000"]
    assert [file.name for file in tmp_path.glob("*.csv")] == ["b-00000.csv"]
    (tmp_path / "b-00000.csv").unlink()
    assert list(Manifest(path, RUN, "csv", planned("a0")).done) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"task": "classify"}, "task: got 'classify' where the run began with 'encode'; expected what it was"),
        ({"pooling": "cls", "new": 1}, "pooling, new: got 'cls', 1 where the run began with None, None"),
        ({"columns": {"text": "json"}}, "columns: got .*json.* began with .*str"),
    ],
)
def test_another_run_is_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    Manifest(path, RUN, "csv", [])
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match=message):
        Manifest(path, RUN | other, "csv", [])
    assert path.read_bytes() == before


def test_an_input_that_changes_meanwhile_is_refused(write: Any, tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    line = path.read_text()
    for change in (lambda: os.utime(path, ns=(0, 1)), lambda: path.write_text(line * 2), path.unlink):
        with pytest.raises(ArgumentError, match=f"{path}: got (a file that was changed while|No such file .* on )"):
            write(path, "jsonl", change=change)
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("machines", "workers", "expected"),
    [
        ([(2, 0)], None, (1, 2, 0)),
        ([(2, 0)], 2, (2, 1, 0)),
        ([(16, 0), (48, 0)], None, (4, 16, 0)),
        ([(8, 0), (8, 0), (0, 0)], None, (2, 8, 0)),
        ([(16, 0), (48, 0)], 4, (4, 16, 0)),
        ([(0, 0), (8, 0)], 3, (3, 2, 0)),
        ([(64, 8), (64, 8), (8, 0)], None, (16, 8, 1)),
        ([(64, 8), (64, 8)], 4, (4, 32, 1)),
    ],
)
def test_shares(machines: list[tuple[int, int]], workers: int | None, expected: tuple[int, int, int]) -> None:
    assert shares(machines, workers) == expected


@pytest.mark.parametrize(("machines", "workers"), [([(2, 0)], 3), ([(64, 2)], 3), ([(0, 0)], None), ([(1, 4)], None)])
def test_more_workers_than_there_is_room_for(machines: list[tuple[int, int]], workers: int | None) -> None:
    with pytest.raises(ArgumentError, match=r"^workers: got .* at most one a (core|GPU) of the cluster"):
        shares(machines, workers)


def test_nothing_heavy_is_loaded_and_absent_ray_is_said(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import fastbert.ray\n"
        "print([name for name in ('torch', 'pyarrow', 'tokenizers') if name in sys.modules])\n"
        "try: fastbert.ray.encode('a', 'b', 'c')\n"
        "except fastbert.FastbertError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [*PYTHON, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    loaded, error = done.stdout.splitlines()
    assert loaded == "[]", done.stderr
    assert error.startswith("MissingError ray: ") and "pip install ray[data] (it is what the extra `ray`" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["encode", "--keep=id"], r"--keep: got \['id'\]; expected no such option without --ray"),
        (["encode", "--workers=0"], "--workers: got 0; expected no such option without --ray"),
        (["classify", "--keep=id"], "--keep: .* without --ray"),
        (["classify", "--workers=1"], "--workers: .* without --ray"),
        (["encode", "--ray"], "--output: got nothing; expected a folder to write to"),
        (["encode", "--ray", "--device=cpu"], "--device: got cpu; expected no such option with --ray"),
        (["encode", "--ray", "--input-format=csv"], "--input-format: .* with --ray"),
        (["classify", "--ray", "--pairs"], "--pairs: .* with --ray"),
        (["classify", "--ray", "--column=a", "--column=b", "--output=x"], "--column: got a, b; expected one column"),
    ],
)
def test_options_that_mean_nothing(options: list[str], message: str, model: Path, tmp_path: Path) -> None:
    from fastbert import cli

    command, *others = options
    path = json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ArgumentError, match=message):
        cli.app([command, str(path), "--model", str(model), *others], standalone_mode=False)


# Here Ray begins.

RUN_ON_RAY = """
import ctypes, signal
import ray
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it goes with the test, and Ray's processes with it
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
import fastbert.ray
"""


class Cluster:
    """Programs on a local Ray of two cores, told from all else by a variable of their environment."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fbray"))  # a path of pytest is too long for Ray's sockets
        self.mark = f"FASTBERT_TEST_RAY={uuid.uuid4()}"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Python, with these arguments."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        environment |= {"RAY_TMPDIR": str(self.folder), self.mark.partition("=")[0]: self.mark.partition("=")[2]}
        return subprocess.Popen(
            [*PYTHON, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_signals,
        )

    def begin(self, code: str) -> subprocess.Popen[str]:
        return self.start("-c", RUN_ON_RAY + code)

    def run(self, code: str) -> str:
        out, err = (process := self.begin(code)).communicate(timeout=300)
        assert process.returncode == 0, err[-4000:]
        return out

    def processes(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                pass
        return found

    def kill(self) -> None:
        while processes := self.processes():
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray.data", reason="Ray, the extra ray")
    cluster = Cluster()
    yield cluster
    cluster.kill()
    shutil.rmtree(cluster.folder)


def writer(out: Path, process: subprocess.Popen[str], name: str = "") -> int:
    """The worker that is writing a shard now, once there is one."""
    for _ in range(6000):
        for path in out.glob(f".{name}*.tmp"):
            if path.stat().st_size or name:
                return int(path.name.split(".")[-3])
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no worker began")


def done(out: Path) -> list[str]:
    return (out / MANIFEST).read_text().splitlines()[1:] if (out / MANIFEST).exists() else []


def rows_in(out: Path, form: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """All rows of all shards, in the order of the input, with their embeddings."""
    for path in sorted(out.glob(f"*-?????.{form}")):
        if form == "jsonl":
            rows = list(map(json.loads, path.open()))
        elif form == "csv":
            with path.open(newline="") as file:
                rows = [row | {"embedding": json.loads(row["embedding"])} for row in csv.DictReader(file, strict=True)]
        else:
            from pyarrow.parquet import read_table

            rows = read_table(path).to_pylist()
        for row in rows:
            yield row, np.array(row.pop("embedding"), np.float32)


def checksum(rows: Iterable[tuple[dict[str, Any], Any]]) -> str:
    digest = hashlib.sha256()
    for row, embedding in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + embedding.tobytes())
    return digest.hexdigest()


@pytest.mark.long
@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv"])
def test_no_row_is_lost_or_doubled_whoever_is_killed(form: str, cluster: Cluster, model: Path, tmp_path: Path) -> None:
    rows = [[{"id": f"{i}-{j}", "text": text} for j, text in enumerate(texts(4000, i))] for i in range(6)]
    (tmp_path / "in").mkdir()
    for i, some in enumerate(rows):
        path = tmp_path / "in" / f"{i}.{form}"
        if form == "jsonl":
            json_lines(path, some)
        elif form == "csv":
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, ["id", "text"])
                table.writeheader()
                table.writerows(some)
        else:
            import pyarrow
            from pyarrow.parquet import write_table

            write_table(pyarrow.Table.from_pylist(some), path, row_group_size=2000)
    out = tmp_path / "out"
    given = ", ".join(repr(str(path)) for path in (tmp_path / "in", model, out))
    code = f"print(fastbert.ray.encode({given}, workers=2, shard_bytes={50_000 if form == 'parquet' else 200_000}))"

    process = cluster.begin(code)
    os.kill(writer(out, process), signal.SIGKILL)
    while len(done(out)) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    writer(out, process)
    cluster.kill()
    process.communicate()
    before = done(out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.*") if path.name != MANIFEST}
    assert 4 <= len(before) <= len(kept) and list(out.glob(".*.tmp"))

    said = cluster.run(code)
    shards = len(done(out))
    assert f"rows=24000, shards={shards}, before={len(before)})" in said
    assert [path for path in out.iterdir() if path.name.startswith(".")] == []
    for record in map(json.loads, before):  # what was done stays
        path = out / f"{record['shard']}.{form}"
        assert path.stat().st_mtime_ns == kept[path]

    embeddings = TextEncoder.from_folder(model).encode([row["text"] for some in rows for row in some])
    plain = zip((row for some in rows for row in some), embeddings, strict=True)
    assert checksum(rows_in(out, form)) == checksum(plain)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*fill max_length=8")
def test_a_bad_row_ends_a_run_and_what_was_done_stays(cluster: Cluster, classifier: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra ray")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra ray")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    given = texts(40)
    for i in range(4):
        column = [*given[10 * i : 10 * i + 9], None if i == 2 else given[10 * i + 9]]
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in" / "deep" / f"{i}.parquet")
    (tmp_path / "in" / "deep" / "0.parquet").rename(tmp_path / "in" / "0.parquet")
    out = tmp_path / "out"
    paths = ", ".join(repr(str(path)) for path in (tmp_path / "in", classifier, out))
    code = f"""
import os, time, warnings
from fastbert import FastbertError
from fastbert.lock import locked
from fastbert.ray.run import LOCK, Path
out = Path({str(out)!r})
def go(**more):
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            print(fastbert.ray.classify({paths}, workers=1, max_length=8, **more))
            print([str(one.message) for one in heard if "shards" in str(one.message)])
    except FastbertError as error:
        print(type(error).__name__, error)
out.mkdir(exist_ok=True)
with locked(out / LOCK, "writing"):
    go()
go()
for _ in range(100):
    if ray.available_resources().get("CPU") == 2:
        break
    time.sleep(0.1)
print(ray.available_resources().get("CPU"), "cores are free again")
go(dtype="bf16")
"""
    locked, *said = cluster.run(code).splitlines()
    assert locked.startswith(f"ArgumentError {out}: got a folder that process ") and " is writing in;" in locked
    assert said[0] == f"ArgumentError {tmp_path}/in/deep/2.parquet, row 10: got None as 'text'; expected a text."
    assert said[1] == "2.0 cores are free again"
    assert said[2].startswith("ArgumentError dtype: got 'bf16' where the run began with 'fp32'")
    before = [out / f"{json.loads(line)['shard']}.parquet" for line in done(out)]
    assert {out / "0.parquet-00000.parquet", out / "deep" / "1.parquet-00000.parquet"} <= set(before)
    written = {path: path.stat().st_mtime_ns for path in before}

    parquet.write_table(pyarrow.table({"text": given[20:30]}), tmp_path / "in" / "deep" / "2.parquet")
    locked, *said = cluster.run(code.partition("for _")[0]).splitlines()
    assert said[0] == f"Written(rows=40, shards=4, before={len(before)})"
    assert "shards gave warnings, which" in said[1] and "of deep/2.parquet-00000: " in said[1]
    assert "max_length=8 tokens; what is beyond was not read" in said[1]
    assert all(path.stat().st_mtime_ns == changed for path, changed in written.items())
    tables = [parquet.read_table(path) for path in (out / "0.parquet-00000.parquet", *sorted((out / "deep").iterdir()))]
    table = pyarrow.concat_tables(tables)
    assert parquet.read_table(out).num_rows == 40 and table.column("text").to_pylist() == given
    plain = fastbert.classify(given, classifier, max_length=8)
    assert table.column("label").to_pylist() == [one.label for one in plain]
    assert table.column("probabilities").to_pylist() == [one.probabilities for one in plain]


@pytest.mark.long
def test_a_shard_that_kills_its_workers_ends_the_run(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        json_lines(tmp_path / "in" / f"{i}.jsonl", [{"text": text} for text in texts(20_000 if i == 1 else 10, i)])
    out = tmp_path / "out"
    given = ", ".join(repr(str(path)) for path in (tmp_path / "in", model, out))
    process = cluster.begin(f"fastbert.ray.encode({given}, workers=2)")
    for _ in range(worker.TRIES):
        killed = writer(out, process, "1.jsonl-00000")
        os.kill(killed, signal.SIGKILL)
        while list(out.glob(f".*.{killed}.*.tmp")) and process.poll() is None:
            time.sleep(0.01)
    _, err = process.communicate(timeout=300)
    message = f"{tmp_path}/in/1.jsonl: got 4 workers that died while they wrote 1.jsonl-00000; expected one that ends"
    assert process.returncode == 1 and f"BackendError: {message}" in err, err[-4000:]
    assert sorted(json.loads(line)["shard"] for line in done(out)) == ["0.jsonl-00000", "2.jsonl-00000"]
    assert "before=2" in cluster.run(f"print(fastbert.ray.encode({given}, workers=2))")


@pytest.mark.long
def test_on_the_command_line(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    rows = [{"id": i, "text": text, "more": [i]} for i, text in enumerate(texts(100_000))]
    options = ("--ray", "--model", str(model), "--keep", "id", "--workers", "1")
    few, many = json_lines(tmp_path / "few.jsonl", rows[:10]), json_lines(tmp_path / "many.jsonl", rows)
    out = tmp_path / "out"
    command = ("-m", "fastbert", "encode", str(few), *options, "--output", str(out), "--format", "parquet")
    process = cluster.start(*command)
    said, err = process.communicate(timeout=300)
    assert process.returncode == 0 and json.loads(said) == {"rows": 10, "shards": 1, "before": 0}, err[-4000:]
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra ray")
    assert parquet.read_table(out / "few.jsonl-00000.parquet").schema.names == ["id", "embedding"]
    process = cluster.start("-m", "fastbert", "encode", str(few), *options, "--output", str(out))
    _, err = process.communicate(timeout=300)
    assert (
        process.returncode == 2
        and "error: format, columns: got 'jsonl', None where the run began with 'parquet'" in err
    )

    process = cluster.start("-m", "fastbert", "encode", str(many), *options, "--output", str(tmp_path / "other"))
    writer(tmp_path / "other", process)
    process.send_signal(signal.SIGTERM)
    said, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM and said == "" and "Traceback" not in err, err[-4000:]
    for _ in range(300):
        if not cluster.processes():
            break
        time.sleep(0.1)
    assert cluster.processes() == []
