"""What only the compiler's IR shows of the row-wise kernels, because the interpreter is too kind or memory too small.

The interpreter's flag is read when kernels are decorated, so the kernels are compiled in a process without it.
"""

import os
import re
import subprocess
import sys

import pytest
from processes import PYTHON

COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastbert.kernels.bias_gelu import bias_gelu_backward_kernel, bias_gelu_forward_kernel
from fastbert.kernels.embedding import embedding_backward_kernel, embedding_forward_kernel
from fastbert.kernels.layer_norm import layer_norm_backward_kernel, layer_norm_forward_kernel
from fastbert.kernels.pooling import pool_backward_kernel, pool_forward_kernel

kernel = globals()[sys.argv[1]]
constants = {"HIDDEN": 48, "ROWS": 4, "BLOCK": 64, "HAS_RESIDUAL": True, "HAS_X_BIAS": True, "HAS_DROPOUT": False}
constants |= {"STORE_STATS": True, "HAS_BIAS": True, "TANH": False, "GATED": True, "MASK_COLUMNS": True}
constants |= {"HAS_TYPES": True, "SUM_BIASES": True, "HAS_OUT_ROWS": True, "QUANTIZE": False}
constants |= {"COLUMNS": 64, "HOW": "max", "NORMALISE": True, "STORE_NORM": True}
signature = {}
for name in kernel.arg_names:
    if name in constants:
        signature[name] = "constexpr"
    elif name.endswith("_ptr"):
        integers = {"cu_seqlens_ptr": "*i32", "seed_ptr": "*i64", "out_rows_ptr": "*i64"}
        signature[name] = integers.get(name, "*i64" if "ids" in name else "*fp16")
    else:
        signature[name] = "fp32" if name in ("eps", "drop_scale") else "i32"
constants = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in signature}
compiled = triton.compile(ASTSource(kernel, signature, constants, {}), target=GPUTarget("cuda", 80, 32))
print(compiled.asm["ttir"])
"""


def compiled(kernel, tmp_path):
    """The Triton IR of a kernel with all its options on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run([*PYTHON, "-c", COMPILE, kernel], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    ("kernel", "strides"),
    [
        ("layer_norm_forward_kernel", 4),
        ("bias_gelu_forward_kernel", 2),
        ("embedding_forward_kernel", 4),
        ("layer_norm_backward_kernel", 3),
        ("bias_gelu_backward_kernel", 3),
        ("embedding_backward_kernel", 5),
        ("pool_forward_kernel", 1),
        ("pool_backward_kernel", 3),
    ],
)
def test_rows_times_strides_are_64_bit_case_11(kernel, strides, tmp_path):
    products = re.findall(r"arith\.muli .* : (\S+)", compiled(kernel, tmp_path))
    blocks = [product for product in products if product.startswith("tensor")]
    assert len(blocks) == strides, f"expected one product of rows and a stride for each of {strides} tensors: {blocks}"
    assert all(block.endswith("xi64>") for block in blocks), blocks


@pytest.mark.parametrize("kernel", ["bias_gelu_forward_kernel", "pool_forward_kernel", "pool_backward_kernel"])
def test_maxima_keep_nan(kernel, tmp_path):
    """On a GPU a plain maximum takes the number, not the NaN."""
    ir = compiled(kernel, tmp_path)
    assert "arith.maximumf" in ir
    assert "arith.maxnumf" not in ir
