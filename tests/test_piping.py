"""What goes into a command and comes out of it: slow and closed pipes, devices, signals, files that are no text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import tiny_bert
from processes import PYTHON, heed_signals

from fastbert.checkpoints.load import load, save
from fastbert.cli import piping
from fastbert.cli.piping import READER_GONE, Lines, check_output, results
from fastbert.errors import ArgumentError, UntrainedWarning
from fastbert.model.heads import BertForSequenceClassification, BertForTokenClassification

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
COMMAND = [*PYTHON, "-m", "fastbert"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each command; the heads' weights are random."""
    folder = tmp_path_factory.mktemp("models")
    found = {"encode": tiny_bert.make(folder / "encode")}
    for command, kind in (("classify", BertForSequenceClassification), ("tag", BertForTokenClassification)):
        with pytest.warns(UntrainedWarning):
            model = load(found["encode"], kind)
        save(model, folder / command)
        (folder / command / "vocab.txt").write_bytes((found["encode"] / "vocab.txt").read_bytes())
        found[command] = folder / command
    config = json.loads((found["tag"] / "config.json").read_text())
    config |= {"id2label": {"0": "O", "1": "B-PER"}, "label2id": {"O": 0, "B-PER": 1}}
    (found["tag"] / "config.json").write_text(json.dumps(config))
    return found


def start(*arguments: object, **streams: object) -> subprocess.Popen[bytes]:
    options: dict[str, object] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(  # type: ignore[call-overload]
        [*COMMAND, *map(str, arguments)],
        env=ENVIRONMENT,
        preexec_fn=heed_signals,
        **options | streams,
    )


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of bash, in which `fastbert` is ours."""
    function = f'fastbert() {{ "{COMMAND[0]}" {" ".join(COMMAND[1:])} "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", function + line], cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, timeout=120
    )


# ------------------------------------------------------------------------------------ lines


@pytest.fixture
def pipe() -> Iterator[tuple[Lines, IO[bytes]]]:
    """Lines of a pipe, and its other end."""
    read, write = os.pipe()
    with os.fdopen(write, "wb", buffering=0) as file:
        lines = Lines(Path(f"/dev/fd/{read}"))
        yield lines, file
    os.close(read)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[IO[bytes]]:
    with (tmp_path / "out").open("wb") as file:
        yield file


def test_what_has_come_is_given_when_nothing_more_is_there(pipe: tuple[Lines, IO[bytes]], out: IO[bytes]) -> None:
    lines, write = pipe
    parts = lines.parts(out)
    write.write(b"one\ntwo\nthr")
    assert next(parts) == ["one", "two"] and next(parts) == []
    write.write(b"ee\n")
    assert next(parts) == ["three"] and next(parts) == []
    write.write(b"last")
    write.close()
    assert list(parts) == [["last"]]


def test_lines_that_drip_are_not_held_back_for_ever(
    pipe: tuple[Lines, IO[bytes]], out: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One every hundredth of a second: something has always just come, but the first ones are not to wait for it."""
    monkeypatch.setattr(piping, "PATIENCE", 0.05)
    lines, write = pipe
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.01):
            write.write(b"a\n")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        begun = time.monotonic()
        assert next(lines.parts(out))
        assert time.monotonic() - begun < 5
    finally:
        stop.set()
        thread.join()


def test_lines_are_cut_at_newlines_wherever_blocks_end(
    tmp_path: Path, out: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piping, "BLOCK", 3)
    monkeypatch.setattr(piping, "LINES_AT_ONCE", 2)
    content = "\ufeffä\nlonger than a block\r\n\nx\r\n\r".encode()
    (tmp_path / "texts").write_bytes(content)
    lines = Lines(tmp_path / "texts")
    assert list(lines.parts(out)) == [["ä", "longer than a block\r"], ["", "x\r"], ["\r"]]


def test_a_line_of_many_blocks_takes_time_in_proportion(
    tmp_path: Path, out: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piping, "BLOCK", 256)  # 80,000 of them: 800 GB would be copied if each were added to the last
    (tmp_path / "texts").write_bytes(b"word " * 4_000_000)
    [[text]] = Lines(tmp_path / "texts").parts(out)
    assert len(text) == 20_000_000


def test_waiting_ends_when_the_reader_of_the_results_goes(pipe: tuple[Lines, IO[bytes]]) -> None:
    lines, write = pipe
    theirs, ours = os.pipe()
    with os.fdopen(ours, "wb", buffering=0) as file:
        parts = lines.parts(file)
        write.write(b"a\n")
        assert next(parts) == ["a"] and next(parts) == []
        threading.Timer(0.2, os.close, [theirs]).start()
        with pytest.raises(BrokenPipeError):
            next(parts)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("the film\n".encode("utf-16"), "UTF-16"),
        ("the film\n".encode("utf-16-le"), "UTF-16"),
        ("the film\n".encode("utf-16-be"), "UTF-16"),
        ("the film\n".encode("utf-32"), "UTF-16 or UTF-32"),
        (b"\x1f\x8b\x08\x08\xd3\x00\xe5\n", "no text"),
        (b"PK\x03\x04\x14\x00\x00\x00\x08\x9c\xff\n", "no text"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes, got: str, tmp_path: Path, out: IO[bytes]) -> None:
    (tmp_path / "texts").write_bytes(content)
    with pytest.raises(ArgumentError, match=f"INPUT: got .*texts, which is .*{got}"):
        list(Lines(tmp_path / "texts").parts(out))


def test_texts_with_zeros_or_damage_are_no_other_encoding(tmp_path: Path, out: IO[bytes]) -> None:
    for content in (b"a\0b\n", b"\0\n", b"a\0\n", b"caf\xe9\n", b"nul \0 here\n", b"\0\0\0\0\n"):
        (tmp_path / "texts").write_bytes(content)
        assert list(Lines(tmp_path / "texts").parts(out)) == [[content[:-1].decode(errors="replace")]]


# ------------------------------------------------------------------------------------ results


def test_results_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")

    def half(error: BaseException) -> None:
        with results(path) as file:
            file.write(b"half")
            file.flush()
            raise error

    for error in (OSError("disk"), SystemExit(143), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            half(error)
        assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["out.jsonl"]
    with results(path) as file:
        file.write(b"new")
    assert path.read_text() == "new" and [one.name for one in tmp_path.iterdir()] == ["out.jsonl"]


def test_devices_and_pipes_are_written_as_they_are(tmp_path: Path) -> None:
    with results(Path(os.devnull)) as file:
        file.write(b"a")
    assert Path(os.devnull).is_char_device()
    os.mkfifo(tmp_path / "pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    assert check_output(tmp_path / "pipe") == tmp_path / "pipe"
    with results(tmp_path / "pipe") as file:
        file.write(b"through a pipe")
    reader.join()
    assert found == [b"through a pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_reader_that_has_gone_is_an_exit_code(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: (tmp_path / "pipe").open("rb").close())
    reader.start()
    with pytest.raises(SystemExit) as stop, results(tmp_path / "pipe") as file:
        file.write(b"a" * 1_000_000)
    assert stop.value.code == READER_GONE == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_device_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left"), results(Path("/dev/full")) as file:
        file.write(b"a")


def test_what_is_checked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stdout in (None, Path("-"), Path("/dev/stdout")):
        assert check_output(stdout) is None
    for path, got in ((tmp_path, "a folder"), (tmp_path / "no" / "x", "no folder")):
        with pytest.raises(ArgumentError, match=got):
            check_output(path)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ArgumentError, match="standard output is closed"):
        check_output(None)


# ------------------------------------------------------------------------------------ whole commands


def test_encode_answers_line_by_line_and_ends_with_its_reader(models: dict[str, Path]) -> None:
    process = start("encode", "--model", models["encode"], "--max-length", 48)
    assert process.stdin and process.stdout and process.stderr
    for text in ("the film", "a plot"):
        process.stdin.write(f"{text}\n".encode())
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == text
    process.stdout.close()
    assert process.wait(60) == READER_GONE  # while stdin is open
    assert process.stderr.read() == b""
    process.stdin.close()
    process.stderr.close()


@pytest.mark.parametrize(
    ("command", "number"),
    [("encode", signal.SIGINT), ("encode", signal.SIGHUP), ("classify", signal.SIGTERM), ("tag", signal.SIGINT)],
)
def test_a_signal_ends_a_command_that_waits_for_input(
    command: str, number: signal.Signals, models: dict[str, Path], tmp_path: Path
) -> None:
    process = start(command, "--model", models[command], "--max-length", 48, "--output", tmp_path / "out")
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(b"the film\n")
    process.stdin.flush()
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.iterdir()), process)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert process.stderr.read() == b"" and not list(tmp_path.iterdir())
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not what() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert what() and process.poll() is None


@pytest.mark.parametrize("command", ["encode", "tag"])
def test_closed_standard_streams(command: str, models: dict[str, Path], tmp_path: Path) -> None:
    line = f"fastbert {command} --model {models[command]} --max-length 48"
    done = shell(f"{line} <&-", tmp_path)
    assert done.returncode == 2 and b"standard input that is closed" in done.stderr and not done.stdout
    done = shell(f"echo a | {line} >&-", tmp_path)
    assert done.returncode == 2 and b"standard output is closed" in done.stderr
    # What is for stderr goes nowhere, and not into the results, or into the file that got its number.
    done = shell(f"printf 'a\\n\\n' | {line} --output out 2>&-", tmp_path)
    assert done.returncode == 0 and not done.stdout
    assert [json.loads(row)["text"] for row in (tmp_path / "out").read_text().splitlines()] == ["a", ""]


def test_user_case_39_cli_files(models: dict[str, Path], tmp_path: Path) -> None:
    """UTF-16 was embedded as nonsense; an --output of .csv got JSON lines."""
    (tmp_path / "u16.txt").write_bytes("the film\r\nthe plot\r\n".encode("utf-16"))
    (tmp_path / "ok.txt").write_text("the film\n")
    line = f"fastbert encode --model {models['encode']} --max-length 48"
    done = shell(f"{line} u16.txt --output x.npy", tmp_path)
    assert done.returncode == 2 and b"which is in UTF-16" in done.stderr and b"iconv" in done.stderr
    done = shell(f"{line} ok.txt --output y.csv", tmp_path)
    assert done.returncode == 2 and b"--output: got y.csv" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ok.txt", "u16.txt"]
    assert shell(f"{line} ok.txt --output y.csv --format npy", tmp_path).returncode == 0
    assert np.load(tmp_path / "y.csv").shape == (1, 32)


def test_npy_is_for_what_can_be_written_twice(models: dict[str, Path], tmp_path: Path) -> None:
    line = f"echo a | fastbert encode --model {models['encode']} --max-length 48 --format npy"
    assert shell(f"{line} --output /dev/null", tmp_path).returncode == 0
    done = shell(f"mkfifo pipe; cat pipe & {line} --output pipe", tmp_path)
    assert done.returncode == 2 and b"pipe; expected a file for .npy" in done.stderr


def test_waiting_threads_sleep_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    """libgomp says what it read when it was loaded, which is with torch."""
    if sys.platform != "linux":
        pytest.skip("needs libgomp, which torch has on Linux")
    plain = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}
    for said, policy, spins in (({}, b"'PASSIVE'", b"'0'"), ({"GOMP_SPINCOUNT": "77"}, b"'PASSIVE'", b"'77'")):
        unset = " ".join(f"unset {name};" for name in plain if name not in said)
        found = shell(f"{unset} fastbert info", tmp_path, OMP_DISPLAY_ENV="VERBOSE", **said).stderr
        assert b"OMP_WAIT_POLICY = " + policy in found and b"GOMP_SPINCOUNT = " + spins in found
    found = shell("fastbert info", tmp_path, OMP_DISPLAY_ENV="VERBOSE", OMP_WAIT_POLICY="ACTIVE").stderr
    assert b"OMP_WAIT_POLICY = 'ACTIVE'" in found


def test_the_reader_of_what_is_printed_may_go(tmp_path: Path) -> None:
    for arguments in ("info", "--version", "--help"):
        for unbuffered in ("", "1"):
            done = shell(f"fastbert {arguments} | true; exit ${{PIPESTATUS[0]}}", tmp_path, PYTHONUNBUFFERED=unbuffered)
            assert done.returncode != 0 and done.stderr == b"", (arguments, unbuffered)
