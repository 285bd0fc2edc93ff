"""The versions of what is installed."""

from __future__ import annotations

import importlib.metadata

# The name by which pip installs us, as in pyproject.toml. Another project has the name `fastbert` on PyPI.
DISTRIBUTION = "fastbert-encoder"


def version(package: str) -> str | None:
    """Of a package that pip knows by the name it is imported by, or ours; None where it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION if package == "fastbert" else package)
    except importlib.metadata.PackageNotFoundError:
        return None
