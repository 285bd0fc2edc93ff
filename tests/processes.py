"""Python in a process of its own."""

from __future__ import annotations

import signal
import sys

# -P keeps the working directory off sys.path, where `kernels/` would pass for the package of that name on PyPI. Python
# 3.10 does without; `test_package` holds that all goes well then too.
PYTHON = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else [])]


def heed_signals() -> None:
    """For `preexec_fn`: nohup and a shell's background jobs, and so a test run among them, ignore these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
