"""To run from a checkout that nobody installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def importable(root: Path = ROOT) -> Iterator[None]:
    """Let this process, and those that it starts, import the `fastbert` of this checkout, installed or not.

    Where there is none, or another, the package is laid out in a temporary folder as a wheel would have it, by links.
    The root itself must not be on sys.path: `kernels/` would pass for the package of that name on PyPI.
    """
    spec = importlib.util.find_spec("fastbert")
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == root / "fastbert/__init__.py":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="fastbert-") as folder:
        package = Path(folder, "fastbert")
        package.mkdir()
        for part in (root / "fastbert").iterdir():
            if part.name not in ("kernels.py", "__pycache__"):
                (package / part.name).symlink_to(part)
        (package / "kernels").symlink_to(root / "kernels")
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [before])])
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before
