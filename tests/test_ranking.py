"""`rerank` and `similar` on the command line; what they find is tested with their tasks."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import tiny_bert
from command_line import COMMAND, ENVIRONMENT, Run
from processes import heed_signals

import fastbert
from fastbert.config import HeadConfig
from fastbert.errors import UntrainedWarning
from fastbert.tasks.hits import Hit

DOCUMENTS = ["was fine", "dull plot , with a very lovely scene", "music", "", "the film"]
LINES = "".join(f"{document}\n" for document in DOCUMENTS).encode()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.make(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def reranker(encoder: Path) -> Path:
    folder = encoder.parent / "reranker"
    with pytest.warns(UntrainedWarning):
        model = fastbert.load(encoder, fastbert.BertForSequenceClassification, head=HeadConfig(("relevant",)))
    fastbert.save(model, folder)
    shutil.copy(encoder / "vocab.txt", folder)
    return folder


def check(rows: list[dict[str, object]], query: str, expected: list[Hit]) -> None:
    assert [(row["query"], row["row"], row["text"]) for row in rows] == [(query, hit.row, hit.text) for hit in expected]
    assert [row["score"] for row in rows] == pytest.approx([hit.score for hit in expected])


def test_rerank(run: Run, reranker: Path, tmp_path: Path) -> None:
    result = run("rerank", "--model", reranker, "--query", "the film", stdin=LINES)
    assert result.code == 0 and "empty lines, taken as empty texts: 1" in result.err
    check(result.rows, "the film", fastbert.rerank("the film", DOCUMENTS, reranker))
    (tmp_path / "texts.csv").write_text("id,body\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(DOCUMENTS)))
    asked = ("rerank", tmp_path / "texts.csv", "--column", "body", "--model", reranker, "--query", "a", "--top-k", 2)
    result = run(*asked)
    assert (result.code, result.err) == (0, "")
    check(result.rows, "a", fastbert.rerank("a", DOCUMENTS, reranker, top_k=2))


def test_rerank_of_many_queries(run: Run, reranker: Path) -> None:
    given = [("the film", DOCUMENTS), ("a", []), ("b", ["music"])]
    lines = "".join(json.dumps({"query": query, "documents": documents}) + "\n" for query, documents in given)
    result = run("rerank", "--model", reranker, "--top-k", 3, stdin=lines.encode())
    assert (result.code, result.err) == (0, "")
    check(result.rows[:3], "the film", fastbert.rerank("the film", DOCUMENTS, reranker, top_k=3))
    check(result.rows[3:], "b", fastbert.rerank("b", ["music"], reranker))
    for line in ('{"query": "a"}', '{"query": "a", "documents": "b"}', '"a"', "a"):
        refused = run("rerank", "--model", reranker, stdin=line.encode())
        assert refused.code == 2 and "INPUT, line 1: got " in refused.err and refused.out == b""


def test_similar(run: Run, encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes(LINES)
    asked = ("similar", tmp_path / "texts.txt", "--model", encoder, "--top-k", 2, "--embeddings", tmp_path / "kept")
    for _ in range(2):  # the file is made, and then read
        result = run(*asked, "--query", "the film", "--query", "music")
        assert result.code == 0 and result.err == "fastbert: empty lines, taken as empty texts: 1 (first: line 4)\n"
        for rows, query in ((result.rows[:2], "the film"), (result.rows[2:], "music")):
            check(rows, query, fastbert.similar(query, DOCUMENTS, encoder, top_k=2))
    piped = run(*asked, stdin=b"the film\nmusic\n")
    assert (piped.code, piped.rows) == (0, result.rows)
    (tmp_path / "texts.txt").write_bytes(LINES + b"another\n")
    refused = run(*asked, "--query", "the film")
    assert (
        refused.code == 2
        and refused.err.startswith("fastbert: error: embeddings: got ")
        and "other texts" in refused.err
    )
    alone = run("similar", "-", "--model", encoder, stdin=LINES)
    assert alone.code == 2 and "--query: got nothing, and stdin holds the texts" in alone.err
    texts = run("similar", "-", "--model", encoder, "--query", "music", stdin=LINES)
    check(texts.rows, "music", fastbert.similar("music", DOCUMENTS, encoder))


def test_hits_in_parquet(run: Run, encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="writes Parquet")
    from pyarrow import parquet

    out = tmp_path / "hits.parquet"
    asked = ("similar", "-", "--model", encoder, "--query", "music", "--output", out)
    assert run(*asked, stdin=LINES).code == 0
    check(parquet.read_table(out).to_pylist(), "music", fastbert.similar("music", DOCUMENTS, encoder))


def test_queries_are_answered_as_they_come_until_interrupted(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(LINES)
    process = subprocess.Popen(
        [*COMMAND, "similar", str(tmp_path / "texts"), "--model", str(encoder), "--top-k", "1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=tmp_path,
        preexec_fn=heed_signals,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    for query in ("the film", "music"):
        process.stdin.write(f"{query}\n".encode())
        process.stdin.flush()
        row = json.loads(process.stdout.readline())
        assert row["query"] == row["text"] == query
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert b"Traceback" not in process.stderr.read()
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


@pytest.mark.parametrize("command", ["encode", "classify", "score", "tag", "fill-mask", "rerank", "similar", "bench"])
def test_results_never_take_the_place_of_the_texts(command: str, run: Run, encoder: Path, tmp_path: Path) -> None:
    texts, link = tmp_path / "texts", tmp_path / "link"
    texts.write_bytes(LINES)
    link.symlink_to(texts)
    query = ("--query", "music") if command in ("rerank", "similar") else ()
    asked = (command, encoder, texts) if command == "bench" else (command, texts, "--model", encoder, *query)
    for output in (texts, link):
        refused = run(*asked, "--output", output)
        assert refused.code == 2 and "which is INPUT too; expected another file" in refused.err
    assert texts.read_bytes() == LINES and link.is_symlink()


def test_embeddings_have_a_file_of_their_own(run: Run, encoder: Path, tmp_path: Path) -> None:
    texts, kept = tmp_path / "texts", tmp_path / "kept"
    texts.write_bytes(LINES)
    asked = ("similar", texts, "--model", encoder, "--query", "music", "--embeddings")
    refused = run(*asked, texts)
    assert refused.code == 2 and "--embeddings: got" in refused.err and "which is INPUT too" in refused.err
    refused = run(*asked, kept, "--output", kept)
    assert refused.code == 2 and "which is --output too" in refused.err
    assert texts.read_bytes() == LINES and not kept.exists()
