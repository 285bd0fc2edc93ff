"""Which product is taken: told, known, kept or timed; and what is kept of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastbert
from fastbert import backend
from fastbert.cpu.machine import Machine, host
from fastbert.errors import ArgumentError, BackendError
from fastbert.ops import fastest
from fastbert.ops.fastest import FEW, KINDS, Kind, choice

pytestmark = pytest.mark.cpu

Choose = Callable[[str | None], None]
MANY = Kind(torch.float32, False, "laid out")
HERE = isinstance(host(), Machine)
needs_kernels = pytest.mark.skipif(not HERE, reason="no kernels here: Linux on x86-64 with AVX2 runs this")


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, choose: Choose) -> Path:
    """Nothing is told or reviewed, no core is waited for, and the cache is an empty folder."""
    monkeypatch.delenv("FASTBERT_PRODUCTS", raising=False)
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fastest, "REVIEWED", {})
    monkeypatch.setattr(fastest, "_waited", lambda: 0.0)
    choose(None)
    return tmp_path / "cache"


def slow(monkeypatch: pytest.MonkeyPatch, slowest: list[str]) -> list[Kind]:
    """The ways of this list take so many milliseconds as their place in it says; the kinds that are timed."""
    asked = []

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            return cls.now

    def taking(seconds: float) -> Callable[[], None]:
        def call() -> None:
            Clock.now += seconds

        return call

    def calls(kind: Kind) -> dict[str, Callable[[], None]]:
        asked.append(kind)
        return {way: taking(1e-3 * (1 + i)) for i, way in enumerate(slowest)}

    monkeypatch.setattr(fastest, "time", Clock)
    monkeypatch.setattr(fastest, "_calls", calls)
    return asked


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_times_are_real_and_short(kind: Kind, untold: Path) -> None:
    """On whatever CPU this is: each way that serves is timed, and what is chosen is hardly slower than the best."""
    made = choice(kind)
    ways = fastest._served(kind)
    if len(ways) == 1:
        assert made.way == ways[0] and not made.milliseconds
        return
    assert set(made.milliseconds) == set(ways) and min(made.milliseconds.values()) > 0
    assert made.milliseconds[made.way] <= fastest.TIE * min(made.milliseconds.values()) + 1e-3
    assert kind.weights != "recorded" or "onednn" not in ways


@needs_kernels
def test_what_is_timed_is_kept_and_chosen_again(untold: Path, monkeypatch: pytest.MonkeyPatch, choose: Choose) -> None:
    asked = slow(monkeypatch, ["onednn", "blas", "own"])
    assert choice(MANY).way == "onednn" and "timed just now; kept in" in choice(MANY).source
    assert fastest.fastest(torch.float32, FEW + 1, "laid out") == "onednn"
    choose(None)  # as another process
    slow(monkeypatch, ["own", "blas", "onednn"])
    assert choice(MANY).way == "onednn" and choice(MANY).source.startswith("kept in")
    assert choice(MANY._replace(few=True)).way == "own", "another kind is timed by itself"
    assert len(asked) == 1
    held = json.loads((untold / fastest.FILE).read_text())
    assert [list(of) for of in held.values()] == [[MANY.name, MANY._replace(few=True).name]]
    choose("measure")
    assert choice(MANY).way == "own" and "just now" in choice(MANY).source


@needs_kernels
def test_another_machine_version_or_number_of_threads_has_its_own(
    untold: Path, monkeypatch: pytest.MonkeyPatch, choose: Choose
) -> None:
    slow(monkeypatch, ["blas", "onednn", "own"])
    assert choice(MANY).way == "blas"
    slow(monkeypatch, ["own", "onednn", "blas"])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert choice(MANY).way == "own"
    finally:
        torch.set_num_threads(threads)
    assert choice(MANY).way == "blas"
    choose(None)
    monkeypatch.setattr(fastest, "_versions", lambda: "torch 9")
    assert choice(MANY).way == "own"
    assert len(json.loads((untold / fastest.FILE).read_text())) == 3


def test_a_package_that_is_not_installed(untold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare checkout is none, and a platform without kernels has no llvmlite."""

    monkeypatch.setattr(fastest, "version", {"torch": "9"}.get)
    fastest._versions.cache_clear()
    try:
        slow(monkeypatch, ["blas", "onednn", "own"])
        assert choice(Kind(torch.float32, False, "plain")).way == "blas"
        assert "no fastbert, torch 9, no llvmlite" in (untold / fastest.FILE).read_text()
    finally:
        fastest._versions.cache_clear()


TIMES = '{"here": {"kind": {"way": "own", "milliseconds": {"own": "fast"}}}}'


@needs_kernels
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"here": 3}',
        '{"here": {"kind": 3}}',
        '{"here": {"kind": {"way": "magic"}}}',
        TIMES,
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_as_none(text: str, untold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untold.mkdir()
    text = text.replace("here", fastest._machine()).replace("kind", MANY.name)
    (untold / fastest.FILE).write_text(text)
    slow(monkeypatch, ["blas", "own", "onednn"])
    assert choice(MANY).way == "blas" and "just now" in choice(MANY).source
    assert json.loads((untold / fastest.FILE).read_text())[fastest._machine()][MANY.name]["way"] == "blas"


@needs_kernels
def test_a_cache_that_cannot_be_written(untold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untold.write_text("a file where a folder should be")
    slow(monkeypatch, ["blas", "own", "onednn"])
    assert choice(MANY).way == "blas" and "can't be written" in choice(MANY).source


@needs_kernels
def test_where_others_run_nothing_is_kept(untold: Path, monkeypatch: pytest.MonkeyPatch, choose: Choose) -> None:
    slow(monkeypatch, ["blas", "own", "onednn"])
    waits = iter(range(100))
    monkeypatch.setattr(fastest, "_waited", lambda: float(next(waits)))
    made = choice(MANY)
    assert made.way == "own" and "neither heeded nor kept" in made.source
    assert not untold.exists()


@needs_kernels
def test_as_fast_is_ours(untold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, ["blas", "own", "onednn"])
    monkeypatch.setattr(fastest, "TIE", 2.5)
    assert choice(MANY).way == "own"


@needs_kernels
def test_what_was_reviewed_needs_no_times(untold: Path, monkeypatch: pytest.MonkeyPatch, choose: Choose) -> None:
    asked = slow(monkeypatch, ["onednn", "own", "blas"])
    monkeypatch.setattr(fastest, "lane", lambda: None)
    for name in fastest.LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fastest, "REVIEWED", {fastest._cpu(): {MANY.name: "blas"}})
    assert choice(MANY).way == "blas" and "reviewed" in choice(MANY).source and not asked
    choose("measure")
    assert choice(MANY).way == "onednn"
    choose(None)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # it was reviewed with all that the CPU has
    assert choice(MANY).way == "onednn"


def test_reviewed_tables_name_kinds_and_ways() -> None:
    names = {kind.name for kind in KINDS}
    for table in fastest.REVIEWED.values():
        assert set(table) <= names and set(table.values()) <= {"own", "onednn", "blas"}


@pytest.mark.parametrize("way", ["own", "onednn", "blas"])
def test_what_is_told_is_taken_where_it_serves(way: str, choose: Choose) -> None:
    if way == "own" and not HERE:
        with pytest.raises(BackendError, match="a CPU for which kernels are compiled"):
            choose(way)
        return
    choose(way)
    for kind in KINDS:
        ways = fastest._served(kind)
        assert choice(kind).way == (way if way in ways else ways[0])
        assert not choice(kind).milliseconds


def test_what_is_no_way(choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="'mkl'; expected own, onednn, blas, or measure"):
        choose("mkl")
    choose(None)
    monkeypatch.setenv("FASTBERT_PRODUCTS", "fast")
    with pytest.raises(ArgumentError, match="'fast'"):
        fastest.fastest(torch.float32, 3, "plain")


@needs_kernels
def test_each_way_gives_the_encoder_what_it_is(choose: Choose, generator: torch.Generator) -> None:
    """The executor that runs is that of the way; results differ by rounding alone."""
    model = fastbert.Encoder(fastbert.EncoderConfig(hidden_size=64, num_heads=2, num_layers=2)).eval()
    x = torch.randn(FEW + 9, 64, generator=generator)
    packing = fastbert.Packing.from_lengths([FEW, 9])
    made = {}
    for way, executor in (("own", "cpu"), ("onednn", "onednn"), ("blas", "eager")):
        choose(way)
        with torch.no_grad(), backend.paths_taken() as taken:
            made[way] = model(x, packing=packing).last_hidden_state
        assert set(taken) == {executor}
        torch.testing.assert_close(made[way], made["own"], rtol=1e-4, atol=1e-5)


@needs_kernels
def test_few_rows_and_many_may_take_different_ways(
    untold: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    kept = {Kind(torch.float32, few, "laid out").name: way for few, way in ((True, "own"), (False, "onednn"))}
    monkeypatch.setattr(fastest, "REVIEWED", {fastest._cpu(): kept})
    monkeypatch.setattr(fastest, "_limited", lambda: False)
    model = fastbert.Encoder(fastbert.EncoderConfig(hidden_size=64, num_heads=2, num_layers=1)).eval()
    taken: dict[int, Any] = {}
    for rows in (5, FEW, FEW + 1, 5):
        with torch.no_grad(), backend.paths_taken() as counts:
            model(torch.randn(rows, 64, generator=generator), packing=fastbert.Packing.from_lengths([rows]))
        taken[rows] = set(counts)
    assert taken == {5: {"cpu"}, FEW: {"cpu"}, FEW + 1: {"onednn"}}


def test_from_outside(tmp_path: Path) -> None:
    environment = {**os.environ, "FASTBERT_PRODUCTS": "blas", "FASTBERT_CACHE": str(tmp_path / "none")}
    shown = subprocess.check_output([sys.executable, "-m", "fastbert", "info"], env=environment, text=True)
    assert "blas          float32, up to 64 rows, laid out: told by" in shown
    assert not (tmp_path / "none").exists()
