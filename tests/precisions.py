"""Attention of float32 compiled for a target as torch may be asked for its products; prints what came of it.

test_precision.py runs this file in a process of its own: Triton must not be in its interpreter.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from fastbert.kernels.target import KNOWN

sys.path.append(str(Path(__file__).parent.parent / "benchmarks" / "static"))
import cases
import machine_code
from offline import offline


def main(arch: str) -> None:
    found: dict[str, dict[str, dict[str, int]]] = {}
    for asked in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(asked)
        with offline(KNOWN[arch]) as launches:
            for make in (cases.attention, cases.attention_gradient):
                for case in make(64, torch.float32, KNOWN[arch], "ragged"):
                    case.run()
        found[asked] = {}
        for launch in launches:
            facts = machine_code.read(launch.assembly)
            ptx = launch.assembly["ptx"]
            assert isinstance(ptx, str)
            products = re.findall(r"mma\.[^ ]*tf32", ptx)
            found[asked][launch.kernel] = {"spills": facts.spills + facts.stack, "products": len(products)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
