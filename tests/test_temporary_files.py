"""Files that are being written: names of their own, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from processes import PYTHON

from fastbert import writing
from fastbert.checkpoints import files

ROOT = Path(__file__).resolve().parents[1]


def test_names_are_unique(tmp_path: Path) -> None:
    """Two threads, or two processes with one number in two containers, may write one file at once."""
    path = tmp_path / "file"
    with writing.replacing(path) as one, writing.replacing(path) as other:
        assert one != other and one.parent == other.parent == tmp_path
        assert all(socket.gethostname() in name.name and f".{os.getpid()}." in name.name for name in (one, other))
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last to end
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(text: str) -> None:
        for _ in range(50):
            with writing.replacing(path) as temporary:
                temporary.write_text(text * 1000)

    threads = [threading.Thread(target=write, args=(text,)) for text in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in [text * 1000 for text in "abc"]
    assert list(tmp_path.iterdir()) == [path]


def test_long_names(tmp_path: Path) -> None:
    for name in ("n" * 255, "\u4e2d" * 85):
        with writing.replacing(tmp_path / name) as temporary:
            temporary.write_text("x")
        assert (tmp_path / name).read_text() == "x"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = f"""
import os, signal
from pathlib import Path
from fastbert import writing
with writing.replacing(Path({str(path)!r})) as temporary, writing.making(Path({str(path)!r})) as folder:
    temporary.write_text("half")
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([*PYTHON, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    with writing.replacing(path) as temporary:
        assert list(tmp_path.iterdir()) == []
        temporary.write_text("whole")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_what_may_be_another_s_stays(tmp_path: Path) -> None:
    host = socket.gethostname()
    others = {
        f".file.{host}.{os.getppid()}.0123abcd.tmp",  # of a process that lives
        f".file.elsewhere.{2**30 - 1}.0123abcd.tmp",  # of another host
        f".file2.{host}.{2**30 - 1}.0123abcd.tmp",  # of another file
        f".file.{host}.x.tmp",  # not ours
        f".file.{host}.{2**30 - 1}.0123abcd.tmp.txt",
    }
    for name in others:
        (tmp_path / name).touch()
    with writing.replacing(tmp_path / "file") as temporary:
        temporary.touch()
    assert {found.name for found in tmp_path.iterdir()} == others | {"file"}


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def stop_in(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), writing.making(tmp_path / "made") as folder:
        stop_in(folder)
    assert list(tmp_path.iterdir()) == []
    with writing.making(tmp_path / "made") as folder:
        (folder / "whole").touch()
        assert not (tmp_path / "made").exists()
    assert [found.name for found in (tmp_path / "made").iterdir()] == ["whole"]
    assert [found.name for found in tmp_path.iterdir()] == ["made"]


def test_a_full_disk_is_the_system_s_error(tmp_path: Path) -> None:
    """safetensors has a word of its own for it."""
    code = f"""
import resource, torch
from pathlib import Path
from fastbert.checkpoints import files
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    files.write(Path({str(tmp_path)!r}), {{}}, {{"a": torch.zeros(100, 100)}}, {{}})
except OSError as error:
    print(error)
"""
    result = subprocess.run(
        [*PYTHON, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    assert result.stdout == f"[Errno 27] File too large: '{tmp_path / files.WEIGHTS}'\n"
    assert list(tmp_path.iterdir()) == []
    files.write(tmp_path, {}, {"a": torch.zeros(100, 100)}, {})
    assert (tmp_path / files.WEIGHTS).stat().st_size > 40_000
