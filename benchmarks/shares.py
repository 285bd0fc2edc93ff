"""pytest in several processes where pytest-xdist is not installed: each runs every so manieth test of a selection.

    python benchmarks/shares.py 8 tests -m kernels

Of each process the output is shown when all have ended. The exit status is 0 if all passed, else that of the first that
did not. An interruption of the process group reaches them all, and what they have found by then is shown.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

PASSED = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)  # there may be fewer tests than processes


@dataclass(frozen=True)
class Share:
    """A plugin of pytest: which tests of all are this process's."""

    number: int
    of: int

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        """Leave the others out."""
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % self.of != self.number])
        items[:] = items[self.number :: self.of]


def run(processes: int, arguments: Sequence[str]) -> int:
    """So many processes at once; the exit status."""
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(processes)]
        shares = [
            subprocess.Popen(
                [sys.executable, __file__, f"{number}/{processes}", *arguments], stdout=log, stderr=subprocess.STDOUT
            )
            for number, log in enumerate(logs)
        ]
        try:
            for share in shares:
                share.wait()
        except KeyboardInterrupt:  # it came to the whole group
            for share in shares:
                share.wait()
        for number, log in enumerate(logs):
            log.seek(0)
            print(f"Share {number + 1} of {processes}\n{log.read()}", flush=True)
    return next((share.returncode for share in shares if share.returncode not in PASSED), 0)


if __name__ == "__main__":
    number, _, of = sys.argv[1].partition("/")
    if of:
        sys.exit(pytest.main(sys.argv[2:], plugins=[Share(int(number), int(of))]))
    sys.exit(run(int(number), sys.argv[2:]))
