"""Real weights and text for the tests that need them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbert.assets import fetch
from fastbert.errors import CheckpointError


def fetched(name: str) -> Path:
    """The asset, from the cache or the network; the test is skipped with the reason when it can't be had."""
    try:
        return fetch(name)
    except CheckpointError as error:
        pytest.skip(str(error))
