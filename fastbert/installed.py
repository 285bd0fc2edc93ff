"""What is installed: the versions, and the error for what isn't."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

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


def optional(module: str, extra: str, purpose: str, package: str | None = None) -> Any:
    """A module of a library that need not be installed.

    Args:
        module: its name, as `import` takes it.
        extra: of ours, the one that brings the library.
        purpose: what it is needed for, as "to read Parquet".
        package: what pip calls it; by default as the module.

    Raises:
        MissingError: it is not installed.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        mend = f"Run: pip install {package or library} (it is what the extra `{extra}` of {DISTRIBUTION} brings)."
        raise MissingError(library, "a library that is not installed", f"it, {purpose}", mend) from error
