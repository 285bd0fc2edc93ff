from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import PYTHON

ROOT = Path(__file__).resolve().parents[1]

# Page faults of ten blocks of about 64 MiB, one after the other. Each is smaller than the last by more than what small
# blocks may take of its place, or what aligning it needs. And the MiB that a freed block of 256 MiB leaves with us.
FAULTS = """
import resource, sys, torch
from contextlib import nullcontext
from pathlib import Path
from fastbert.training.allocator import freed_memory_kept

def data():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) // 1024

how, before = sys.argv[1], data()
if how == "after":
    with freed_memory_kept() as kept:
        torch.empty(2**26)
with freed_memory_kept() if how == "inside" else nullcontext(True) as kept:
    assert kept
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(10):
        torch.empty(2**24 - i * 2**14).fill_(1.0)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    torch.empty(2**26)
    print(faults, data() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is meant")
def test_freed_memory_is_used_again_inside_and_given_back_after() -> None:
    faults, left = {}, {}
    for how in ("inside", "after", "never"):
        run = subprocess.run(
            [*PYTHON, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
        )  # fmt: skip
        faults[how], left[how] = map(int, run.stdout.split())
    assert 5 * faults["inside"] < min(faults["after"], faults["never"])
    assert left["inside"] > 250
    assert max(left["after"], left["never"]) < 64
