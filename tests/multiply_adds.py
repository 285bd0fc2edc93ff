"""How LayerNorm's kernels are compiled for an H100: fused multiply-adds with 1 / width, of a lane, in the PTX.

Run as a script, because Triton's interpreter and its compiler exclude each other in a process. Prints JSON by kernel.
"""

import json
import re
import struct
import sys
from pathlib import Path

import torch

from fastbert.kernels import embedding, layer_norm
from fastbert.kernels.target import KNOWN

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks" / "static"))
import offline

WIDTH = 768

with offline.offline(KNOWN["sm_90"]) as launches:
    x, ids = torch.empty(64, WIDTH, dtype=torch.float16), torch.zeros(64, dtype=torch.int64)
    layer_norm.layer_norm_forward(x, x[0], x[0], eps=1e-12)
    layer_norm.layer_norm_backward(x, x, x[0], torch.empty(64), torch.empty(64), residual=False, x_bias=False)
    embedding.embedding_forward(ids, ids, None, x, x, x, x[0], x[0], eps=1e-12)

numbers = "|".join(f"0f{struct.pack('>f', sign / WIDTH).hex().upper()}" for sign in (1, -1))
found = {one.kernel: len(re.findall(rf"fma\.rn\.f32\s.*({numbers})", str(one.assembly["ptx"]))) for one in launches}
json.dump(found, sys.stdout)
