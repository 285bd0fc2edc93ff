"""GELU(x @ weight^T + bias) in one kernel: the product, with bias and GELU on the accumulator before it is rounded.

A bounded number of programs, as many as run at once, stride over the tiles of the result. Tiles that run at the same
time are a block of GROUP_M rows of tiles and not a line, so that the pieces of x and weight that they read are shared
in L2. In training the product is stored too, without the bias: `bias_gelu`'s backward starts from it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import choices, linear_gelu_choices, precision, target
from fastbert.kernels.dispatch import dispatch
from fastbert.kernels.pieces import gelu_erf, gelu_erf_half, gelu_tanh


@triton.jit
def linear_gelu_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    product_ptr,
    out_ptr,
    x_stride_row,
    weight_stride_row,
    out_stride_row,
    rows,
    width,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    STORE_PRODUCT: tl.constexpr,
    MASK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See `linear_gelu_forward`; product and out have one layout."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    lane_m = tl.arange(0, BLOCK_M)
    lane_n = tl.arange(0, BLOCK_N)
    lane_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        group_m = tile // (GROUP_M * tiles_n) * GROUP_M  # the first row of tiles of the group
        size_m = tl.minimum(tiles_m - group_m, GROUP_M)
        first_row = (group_m + tile % (GROUP_M * tiles_n) % size_m) * BLOCK_M
        first_column = tile % (GROUP_M * tiles_n) // size_m * BLOCK_N

        # Only scalar bases are 64-bit; `target.aligned` sees to it that a tile's own offsets fit 32 bits. Lanes past
        # the end read the last row again, which needs no mask; what they make is not stored.
        tile_x_ptr = x_ptr + first_row.to(tl.int64) * x_stride_row
        tile_weight_ptr = weight_ptr + first_column.to(tl.int64) * weight_stride_row
        x_offsets = tl.minimum(lane_m, rows - 1 - first_row)[:, None] * x_stride_row + lane_k[None, :]
        weight_offsets = tl.minimum(lane_n, width - 1 - first_column)[:, None] * weight_stride_row + lane_k[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(0, depth, BLOCK_K):
            if MASK_DEPTH:
                mask_depth = (start + lane_k < depth)[None, :]
                x = tl.load(tile_x_ptr + x_offsets, mask=mask_depth, other=0.0)  # [BLOCK_M, BLOCK_K]
                weight = tl.load(tile_weight_ptr + weight_offsets, mask=mask_depth, other=0.0)  # [BLOCK_N, BLOCK_K]
            else:
                x = tl.load(tile_x_ptr + x_offsets)  # [BLOCK_M, BLOCK_K]
                weight = tl.load(tile_weight_ptr + weight_offsets)  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            tile_x_ptr += BLOCK_K
            tile_weight_ptr += BLOCK_K

        column = first_column + lane_n
        mask = (first_row + lane_m < rows)[:, None] & (column < width)[None, :]
        tile_offset = first_row.to(tl.int64) * out_stride_row + first_column
        offsets = lane_m[:, None] * out_stride_row + lane_n[None, :]
        dtype = out_ptr.dtype.element_ty
        if STORE_PRODUCT:
            tl.store(product_ptr + tile_offset + offsets, acc.to(dtype), mask=mask)  # [BLOCK_M, BLOCK_N]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]  # [BLOCK_N]
        if TANH:
            out = gelu_tanh(acc)
        elif dtype == tl.float32:
            out = gelu_erf(acc)
        else:
            out = gelu_erf_half(acc)
        tl.store(out_ptr + tile_offset + offsets, out.to(dtype), mask=mask)  # [BLOCK_M, BLOCK_N]


def linear_gelu_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, approximate: str = "none", store_product: bool = False
) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        x: `[rows, depth]`; weight: `[width, depth]`, in the same dtype. Any strides; each is copied once if it is not
            16-byte aligned.
        bias: `[width]`, in the dtype of `x` or float32.
        approximate: "none" for erf, "tanh".
        store_product: whether the backward will need it.

    Returns:
        out `[rows, width]` in the dtype of `x`; and x @ weight^T, the same or `[0, width]`.
    """
    (rows, depth), width = x.shape, weight.shape[0]
    x, weight = target.aligned(x), target.aligned(weight)
    out = x.new_empty((rows, width))
    product = x.new_empty((rows if store_product else 0, width))
    if out.numel() == 0:
        return out, product
    here = target.of(x.device)
    choice = linear_gelu_choices.linear_gelu_forward(rows, width, depth, x.dtype, here)
    tiles = -(-rows // choice.BLOCK_M) * -(-width // choice.BLOCK_N)
    dispatch(
        linear_gelu_forward_kernel,
        (min(tiles, choice.PROGRAMS * target.multiprocessors(x.device)), 1, 1),
        x,
        weight,
        None if bias is None else bias.contiguous(),
        product if store_product else None,
        out,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        rows,
        width,
        depth,
        HAS_BIAS=bias is not None,
        TANH=approximate == "tanh",
        STORE_PRODUCT=store_product,
        MASK_DEPTH=depth % choice.BLOCK_K != 0,
        PRECISION=precision.float32_precision(x.dtype, precision.float32_asked(), here),
        **choices.arguments(choice),
    )
    return out, product
