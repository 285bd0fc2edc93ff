from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import PYTHON

ROOT = Path(__file__).resolve().parents[1]

# Page faults of ten blocks of about 64 MiB, one after the other. Each is smaller than the last by more than what small
# blocks may take of its place, or what aligning it needs. Then the MiB of them that the process has, now and after.
FAULTS = """
import resource, sys, torch
from contextlib import nullcontext
from pathlib import Path
from fastbert.training.allocator import freed_memory_kept

def resident():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) // 1024

torch.empty(2**10).fill_(1.0)
before = resident()
with freed_memory_kept() if sys.argv[1] == "kept" else nullcontext(True) as kept:
    assert kept
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(10):
        torch.empty(2**24 - i * 2**14).fill_(1.0)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    inside = resident() - before
print(faults, inside, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is meant")
def test_freed_memory_is_used_again_inside_and_given_back_after() -> None:
    faults, inside, after = {}, {}, {}
    for how in ("kept", "given back"):
        run = subprocess.run(
            [*PYTHON, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
        )  # fmt: skip
        faults[how], inside[how], after[how] = map(int, run.stdout.split())
    assert 5 * faults["kept"] < faults["given back"]
    assert inside["kept"] > 50
    assert max(inside["given back"], after["kept"], after["given back"]) < 20
