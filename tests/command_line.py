"""The command line in tests: inside this process, or in one of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from processes import PYTHON

from fastbert import cli

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "COLUMNS": "200"}
COMMAND = [*PYTHON, "-m", "fastbert"]


class Result:
    def __init__(self, code: int, out: bytes, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def rows(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.decode().removesuffix("\n").split("\n")]


class Run:
    """Runs the command line inside this process, which has torch loaded already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[bytes]) -> None:
        self.monkeypatch, self.capture = monkeypatch, capture

    def __call__(self, *arguments: object, stdin: bytes = b"") -> Result:
        self.monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
        self.monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # which `main` would set for good
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        code: object = 0
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code or 0
        for number, handler in handlers.items():
            signal.signal(number, handler)
        out, err = self.capture.readouterr()
        assert isinstance(code, int)
        assert b"Traceback" not in err
        return Result(code, out, err.decode())
