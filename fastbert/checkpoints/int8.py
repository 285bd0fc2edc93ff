"""A checkpoint whose matrices are kept in int8: how it says so, and how it has them.

A weight `NAME` is int8 `[out, in, 1]`, and `NAME_scale` float32 `[out]`: the weight is the one times the other.
config.json says `"quantization_config": {"quant_method": "fastbert", "dtype": "int8"}`. transformers only warns of a
method that it does not know, and would take whole numbers for weights; a shape that no matrix has is an error there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.checkpoints.fields import Fields
from fastbert.cpu.int8 import PAIR, pair_sums, rows_in_int8
from fastbert.errors import CheckpointError

FIELD = "quantization_config"
MARK = {"quant_method": "fastbert", "dtype": "int8"}
_ENDING = "_scale"


def in_int8(config: Mapping[str, Any], source: Path) -> bool:
    """Whether a config.json says that its matrices are in int8.

    Args:
        config: its object.
        source: the file, for messages.

    Raises:
        CheckpointError: it says that they are in another format of ours.
    """
    fields = Fields(str(source), config)
    said = fields.mapping(FIELD)
    if said.get("quant_method") != MARK["quant_method"]:
        return False
    if said != MARK:
        raise fields.error(FIELD, f"{MARK}")
    return True


def to_int8(state: Mapping[str, Tensor], weights: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by their keys, of which these weights are put in int8, and the rest is in float32."""
    found = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    for key in weights:
        values, found[key + _ENDING] = rows_in_int8(state[key])
        found[key] = values.unsqueeze(2)
    return found


def from_int8(state: Mapping[str, Tensor], source: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors by their keys, in floats, and the scales of those that were in int8, by the same keys.

    Args:
        state: what the folder has.
        source: the folder, for messages.

    Raises:
        CheckpointError: a weight in int8 has no scale that fits, or values that some CPU would not sum exactly.
    """
    floats, scales = dict(state), dict[str, Tensor]()
    for key, kept in state.items():
        if kept.dtype != torch.int8:
            continue
        scale = floats.pop(key + _ENDING, None)
        fits = kept.dim() == 3 and kept.shape[2] == 1 and kept.numel() > 0
        if scale is None or not fits or scale.dtype != torch.float32 or scale.shape != kept.shape[:1]:
            got = f"int8 {tuple(kept.shape)}, "
            got += "and no scale" if scale is None else f"and a scale of {scale.dtype} {tuple(scale.shape)}"
            expected = f"int8 [out, in, 1], and float32 [out] as {key}{_ENDING}"
            raise CheckpointError(f"{source}: {key}", got, expected)
        if not (scale > 0).all():
            raise CheckpointError(f"{source}: {key}{_ENDING}", "numbers that are not positive", "positive ones")
        values = kept.squeeze(2)
        if (largest := int(pair_sums(F.pad(values, (0, values.shape[1] % 2))).max())) > PAIR:
            got = f"two weights that sum to {largest}"
            raise CheckpointError(f"{source}: {key}", got, f"at most {PAIR}", "Convert it anew.")
        floats[key], scales[key] = values.float() * scale[:, None], scale
    return floats, scales
