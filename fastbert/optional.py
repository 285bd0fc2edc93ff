"""Libraries that fastbert does without until they are asked for."""

from __future__ import annotations

import importlib
from typing import Any

from fastbert.errors import BackendError


def optional(module: str, extra: str, purpose: str, package: str | None = None) -> Any:
    """A module of a library that need not be installed.

    Args:
        module: its name, as `import` takes it.
        extra: of fastbert's extras, the one that brings the library.
        purpose: what it is needed for, as "to read Parquet".
        package: what pip calls it; by default as the module.

    Raises:
        BackendError: it is not installed.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        mend = f"pip install {package or library}, or install fastbert with its extra [{extra}]."
        raise BackendError(library, "a library that is not installed", f"it, {purpose}", mend) from error
