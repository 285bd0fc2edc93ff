"""The host time of a layer is taken in turns, and our kernels are launched into nothing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import host_time
import pytest
from processes import PYTHON

ROOT = Path(__file__).resolve().parent.parent

RUN = """
import json, sys
sys.path.append("benchmarks")
import host_time
print(json.dumps(host_time.measure(rounds=2, each=1)))
"""


def test_calls_are_made_in_turns() -> None:
    made: list[str] = []
    seconds = host_time.in_turns({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, rounds=2, each=2)
    assert made == ["a", "a", "b", "b"] * 2
    assert {name: len(figures) for name, figures in seconds.items()} == {"a": 2, "b": 2}


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    seconds = {"ours": [1.0, 6.0, 9.0], "theirs": [4.0, 12.0, 10.0]}
    assert host_time.ratio(seconds, "ours", "theirs") == 0.5
    assert host_time.ratio(seconds, "theirs", "ours") == 2.0


def test_both_layers_run_without_a_gpu() -> None:
    pytest.importorskip("transformers")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([*PYTHON, "-c", RUN], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert {name: len(figures) for name, figures in found.items()} == {"ours": 2, "transformers": 2}
    assert all(figure > 0 for figures in found.values() for figure in figures)
