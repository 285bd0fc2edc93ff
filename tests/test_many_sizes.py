"""Work that goes on for long: the memory of a process stays as it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from processes import PYTHON

from fastbert import backend
from fastbert.cpu.machine import host

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.heavy,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory there: Linux"),
]

# Many numbers of rows through a small model; prints MB after a warm-up, which has each number that oneDNN gets to
# see, and after all.
MANY_SIZES = """
import random, sys
sys.path.append(".")
import torch
from tiny_bert import random_model
from fastbert.packing import Packing

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

torch.manual_seed(0)
dtype, plain = getattr(torch, sys.argv[1]), sys.argv[2] == "plain"
model = random_model(torch.Generator().manual_seed(0)).to(dtype)
sizes = list(range(1, 2001))
warm = sorted({count << bits for count in range(1, 33) for bits in range(7)}, reverse=True)  # five bits at most
random.Random(0).shuffle(sizes)

def run(rows):
    packing = Packing.from_lengths([16] * (rows // 16) + [rows % 16] * (rows % 16 > 0))
    model(torch.full((rows,), 7), packing=packing, output_hidden_states=plain)  # layer by layer

with torch.inference_mode():
    for sequence in ([*warm, *sizes[:40]], sizes):
        for rows in sequence:
            run(rows)
        print(resident())
"""


@pytest.mark.parametrize("how", ["laid out", pytest.param("plain", marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_user_case_shapes_memory_does_not_grow_with_each_number_of_rows(dtype: str, how: str) -> None:
    """oneDNN keeps half a megabyte of each product of other sizes: 2,000 batches once took 1.6 GB and more."""
    if dtype == "bfloat16" and not backend.onednn_multiplies_bfloat16():
        pytest.skip("oneDNN multiplies no bfloat16 here: a CPU with AVX-512 runs this, or CPU=avx512")
    if isinstance(host(), str):
        pytest.skip("torch alone, whose memory grew by a third here: not mended. A CPU with AVX2 runs this")
    done = subprocess.run(
        [*PYTHON, "-c", MANY_SIZES, dtype, how], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    warm, after = map(float, done.stdout.split())
    assert after <= 1.05 * warm
