from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import PYTHON

ROOT = Path(__file__).resolve().parents[1]

# Page faults of ten blocks of about 64 MiB, one after the other. Each is smaller than the last by more than what small
# blocks may take of its place, or what aligning it needs.
FAULTS = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from fastbert.training.allocator import keep_freed_memory
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(10):
    torch.empty(2**24 - i * 2**14).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is meant")
def test_freed_memory_is_used_again() -> None:
    faults = {}
    for how in ("keep", "default"):
        run = subprocess.run(
            [*PYTHON, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
        )  # fmt: skip
        faults[how] = int(run.stdout)
    assert 5 * faults["keep"] < faults["default"]
