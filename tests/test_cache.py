"""Files that are kept between runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbert import cache
from fastbert.errors import ArgumentError
from fastbert.ops import fastest


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "a b"))
    assert cache.folder() == tmp_path / "a b"
    monkeypatch.delenv("FASTBERT_CACHE")
    assert cache.folder() == Path.home() / ".cache" / "fastbert"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under some number: what may be kept is not, and what must be says what to set."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    for name in ("FASTBERT_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(ArgumentError, match=r"FASTBERT_CACHE: got nothing, from a user without a home; .* Set it"):
        cache.folder()
    assert fastest._read() == {}
    kept = fastest._keep(fastest.KINDS[0], fastest.Choice("blas", "", {}))
    assert kept.source == "timed just now; the cache can't be written to"


def test_a_file_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    cache.write(path, "one")
    cache.write(path, "two")
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        cache.write(path, "three")
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]
