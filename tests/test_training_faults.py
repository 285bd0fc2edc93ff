"""Training where things go wrong: signals, two at once, a full disk, damaged files, folders that are closed."""

from __future__ import annotations

import fcntl
import io
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch
from processes import PYTHON, heed_signals

from fastbert import lock
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.training import Settings, loop, train
from fastbert.training.loop import LOCK

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore:no losses.png", "ignore:.*learned nothing")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    tiny_bert.make(path / "model")
    tiny_bert.opinions(path / "train.jsonl", 60, 0)
    return path


@pytest.fixture
def given(made: Path, tmp_path: Path) -> Settings:
    return Settings(
        "classify", str(made / "model"), str(made / "train.jsonl"), str(tmp_path / "out"),
        epochs=4, lr=3e-3, batch_tokens=60, max_length=48, checkpoint_every=4,
    )  # fmt: skip


def command(given: Settings, *more: str, **options: Any) -> subprocess.Popen[str]:
    values = {name.replace("_", "-"): value for name, value in vars(given).items() if name != "task"}
    named = [f"--{name}={value}" for name, value in values.items() if value is not None]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # else sums are taken in another order
    return subprocess.Popen(
        [*PYTHON, "-m", "fastbert", "train", given.task, *named, *more], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **{"preexec_fn": heed_signals, **options},
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_steps(steps: int, process: subprocess.Popen[str], out: str) -> None:
    losses = Path(out) / "losses.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if losses.exists() and losses.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.005)
    raise AssertionError("it took too long")


def losses(out: str) -> bytes:
    return (Path(out) / "losses.jsonl").read_bytes()


def hidden(out: str) -> list[str]:
    return [path.name for path in Path(out).iterdir() if path.name.startswith(".")]


def test_a_folder_is_trained_in_once_at_a_time(given: Settings) -> None:
    given = replace(given, epochs=2000)
    process = command(given)
    try:
        wait_for_steps(6, process, given.out)
        with pytest.raises(ArgumentError, match=f"a folder that process {process.pid} of .* is training in"):
            train(given, resume=True)
        with pytest.raises(ArgumentError, match="a folder with files in it"):
            train(given)
        code, _, err = ended(command(given, "--resume"))
        assert code == 2 and f"process {process.pid} of" in err and err.count("\n") == 1
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    with lock.locked(Path(given.out) / LOCK, "training"):  # what is left of a killed one holds nothing
        pass


def test_two_that_start_together(given: Settings) -> None:
    both = [command(given), command(given)]
    found = sorted(ended(process) for process in both)
    assert [code for code, *_ in found] == [0, 2], found
    assert "is training in" in found[1][2] or "with files in it" in found[1][2]
    alone = replace(given, out=given.out + "2")
    train(alone)
    assert losses(given.out) == losses(alone.out) and not hidden(given.out)


def test_a_lock_is_let_go_and_taken_by_one(tmp_path: Path) -> None:
    with lock.locked(tmp_path / LOCK, "training"):
        with pytest.raises(ArgumentError, match=f"process {os.getpid()} of"), lock.locked(tmp_path / LOCK, "training"):
            pass
        assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), lock.locked(tmp_path / LOCK, "training"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(UserWarning, match="can't be locked .Function not implemented."),
        lock.locked(tmp_path / LOCK, "training"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_as_an_error_would(number: signal.Signals, given: Settings) -> None:
    train(replace(given, out=given.out + "2"))
    process = command(given)
    wait_for_steps(6, process, given.out)
    process.send_signal(number)
    code, out, err = ended(process)
    assert code == 128 + number and out == ""
    assert "ended at step " in err and "--resume goes on from the last checkpoint" in err and "Traceback" not in err
    assert not hidden(given.out)
    train(given, resume=True)
    assert losses(given.out) == losses(given.out + "2")


def test_what_ends_before_its_first_checkpoint_begins_anew(given: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def interrupted(run: Any, *arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "go", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(given, say=said.append)
    assert said == ["ended at step 0; --resume begins anew, as no checkpoint was saved yet"]


# The model takes about 115 kB, a checkpoint 380, the losses 10.
@pytest.mark.parametrize("most", [2_000, 60_000, 200_000])
def test_a_full_disk_is_one_sentence_and_resumed(most: int, given: Settings) -> None:
    train(replace(given, out=given.out + "2"))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    code, out, err = ended(command(given, preexec_fn=limited))
    assert code == 1 and out == "", err
    sentences = [line for line in err.splitlines() if "warning" not in line and "epoch" not in line]
    assert len(sentences) == 1, err
    assert "File too large: the training in" in sentences[0] and "ended at step" in sentences[0]
    assert "--resume goes on" in sentences[0]
    assert not hidden(given.out) and not list(Path(given.out).glob("checkpoint-*"))
    train(given, resume=True)
    assert losses(given.out) == losses(given.out + "2") and not hidden(given.out)


def test_torch_hides_a_full_disk(given: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a large tensor does not fit, closing the file does not say it again."""

    def failing(state: Any, file: Any) -> None:
        error = RuntimeError("unexpected pos 704 vs 598")
        error.__context__ = OSError(28, "No space left on device")
        raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(
        OSError, match=r"No space left on device: the training in .* ended at step 4\. --resume goes on"
    ):
        train(given)
    assert not hidden(given.out)


def test_folders_that_are_not_to_be_written(given: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/out", "file/a/out"):
        with pytest.raises(ArgumentError, match="file: got a file; expected a folder"):
            train(replace(given, out=str(tmp_path / out)))
    closed = tmp_path / "closed"
    closed.mkdir()
    access = os.access  # a superuser may write in any folder
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    for out in ("closed", "closed/out", "closed/a/out"):
        with pytest.raises(ArgumentError, match=r"no permission to write in .*closed"):
            train(replace(given, out=str(tmp_path / out)))
    assert list(closed.iterdir()) == []


def test_a_damaged_checkpoint_says_what_to_do(given: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop._Run._step

    def stopping(self: Any, groups: Any) -> Any:
        if self.state.step == 6:
            raise KeyboardInterrupt
        return step(self, groups)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(given)
    [folder] = Path(given.out).glob("checkpoint-*")
    state = folder / "state.pt"
    whole = state.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"junk" * 100):
        state.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"state\.pt: .*Remove .*checkpoint-4 to go on"):
            train(given, resume=True)
    torch.save({"weights": torch.zeros(3)}, state)  # of another program
    with pytest.raises(CheckpointError, match=r"KeyError 'identity'; expected a checkpoint of fastbert's training"):
        train(given, resume=True)
    for identity in ([], ["seed"], None, 3, torch.zeros(2)):
        torch.save({"identity": identity}, state)
        with pytest.raises(
            (CheckpointError, ArgumentError), match=r"a checkpoint of fastbert's training|run began with"
        ):
            train(given, resume=True)
    for part in ("state", "rng", "model", "optimizer"):
        for value in (None, 3):
            crafted = torch.load(io.BytesIO(whole), weights_only=True) | {part: value}
            torch.save(crafted, state)
            with pytest.raises(CheckpointError, match="a checkpoint of fastbert's training"):
                train(given, resume=True)
        del crafted[part]
        torch.save(crafted, state)
        with pytest.raises(CheckpointError, match=f"KeyError '{part}'"):
            train(given, resume=True)
    others = torch.load(io.BytesIO(whole), weights_only=True)
    others["identity"]["the names of the weights"] = "others"  # of a version that calls its weights otherwise
    torch.save(others, state)
    with pytest.raises(ArgumentError, match=r"the names of the weights: got .* Resume with the same .* version"):
        train(given, resume=True)
    state.unlink()  # as in a folder of transformers' Trainer
    with pytest.raises(CheckpointError, match="No such file"):
        train(given, resume=True)
    (Path(given.out) / "checkpoint-best").mkdir()  # not ours
    state.write_bytes(whole)
    train(given, resume=True)
    assert [path.name for path in Path(given.out).glob("checkpoint-*")] == ["checkpoint-best"]


def test_what_a_killed_run_left_is_removed(given: Settings, make_half: Callable[[str], None]) -> None:
    make_half(given.out)
    train(given, resume=True)
    assert not hidden(given.out)


@pytest.fixture
def make_half() -> Callable[[str], None]:
    def make(out: str) -> None:
        folder = Path(out)
        (folder / ".checkpoint-4.elsewhere.17.0123abcd.tmp").mkdir(parents=True)
        (folder / ".checkpoint-4.elsewhere.17.0123abcd.tmp" / "state.pt").write_bytes(b"half")
        (folder / ".model.safetensors.elsewhere.17.0123abcd.tmp").write_bytes(b"half")
        (folder / LOCK).write_text("process 17 of elsewhere")

    return make


@pytest.mark.parametrize("kind", ["link", "broken link", "folder", "pipe"])
def test_a_lock_that_is_no_file_empties_no_other(kind: str, tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "out" / LOCK
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(other)
    if kind == "link":
        other.write_text("precious")
    with pytest.raises(ArgumentError, match="a link, folder or device"), lock.locked(path, "training"):
        pass
    assert other.exists() == (kind == "link")
    assert kind != "link" or other.read_text() == "precious"
