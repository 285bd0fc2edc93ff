"""Python in a process of its own."""

from __future__ import annotations

import sys

# -P keeps the working directory off sys.path, where `kernels/` would pass for the package of that name on PyPI. Python
# 3.10 does without; `test_package` holds that all goes well then too.
PYTHON = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else [])]
