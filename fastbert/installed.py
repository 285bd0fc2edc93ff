"""What is installed: the versions, and the error for what isn't."""

from __future__ import annotations

import importlib.metadata

from fastbert.errors import MissingError

# The name by which pip installs us, as in pyproject.toml. Another project has the name `fastbert` on PyPI.
DISTRIBUTION = "fastbert-encoder"


def version(package: str) -> str | None:
    """Of a package that pip knows by the name it is imported by, or ours; None where it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION if package == "fastbert" else package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(module: str, package: str, extra: str, error: ImportError) -> MissingError:
    """The error for a module of ours that is made of another project's package, which one of our extras installs."""
    mend = f"Run: pip install {package} (it is what the extra `{extra}` of {DISTRIBUTION} brings)."
    return MissingError(module, error, f"{package} to be installed", mend)
