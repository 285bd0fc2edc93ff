"""Work that attention's tiles waste on ragged batches: scores computed against scores needed, from the tile tables."""

from __future__ import annotations

import torch

from fastbert.kernels import attention_choices
from fastbert.kernels.target import KNOWN, Target
from fastbert.ops.tile_table import tile_table
from fastbert.packing import Packing

# Lengths as real batches have them, each 64 sequences at most: a long tail (most texts short, a few at the limit), all
# lengths alike likely, and all of the full length.
BATCHES = {
    "long tail": (512, 384, 256, 192, *[128] * 4, *[64] * 8, *[32] * 16, *[12] * 32),
    "uniform": tuple(range(8, 513, 8)),
    "full": (512,) * 16,
}
HEAD_DIMS = (32, 64, 128)
DTYPE = torch.float16


def scores(table: torch.Tensor, lengths: list[int], own: int, other: int) -> tuple[int, int]:
    """(tiles, scores) that programs for `table` compute: `own` rows each, by blocks of `other` along the sequence."""
    sequences = [int(sequence) for sequence in table[:, 0] if sequence >= 0]
    blocks = [-(-lengths[sequence] // other) for sequence in sequences]
    return sum(blocks), sum(blocks) * own * other


def waste(arch: str) -> dict[str, dict[str, float]]:
    """For each pass, head_dim and batch what `figures` finds with the tiles that `arch` gets."""
    found = {}
    for batch, lengths in BATCHES.items():
        for head_dim in HEAD_DIMS:
            for name, own, other in _passes(KNOWN[arch], head_dim, lengths):
                found[f"{name} head_dim {head_dim} {batch}"] = figures(lengths, own, other)
    return found


def _passes(target: Target, head_dim: int, lengths: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """(pass, rows a program owns, rows a step) of each kernel."""
    longest, rows = max(lengths), sum(lengths)
    forward = attention_choices.attention_forward(
        head_dim, DTYPE, longest, rows=rows, batch=len(lengths), extras=False, target=target
    )
    by_key = attention_choices.attention_backward_key(
        head_dim, DTYPE, longest, dbias=False, extras=False, target=target
    )
    by_query = attention_choices.attention_backward_query(head_dim, DTYPE, extras=False, target=target)
    return [
        ("attention", forward.BLOCK_M, forward.BLOCK_N),
        ("attention_backward_query", by_query.BLOCK_M, by_query.BLOCK_N),
        ("attention_backward_key", by_key.BLOCK_N, by_key.BLOCK_M),
    ]


def figures(lengths: tuple[int, ...], own: int, other: int) -> dict[str, float]:
    """Waste of programs that own `own` rows and walk by `other`.

    Tiles run, and how many would hold the scores that are needed; scores computed for each that is needed, and the same
    for a padded batch that wastes nothing else; programs that find nothing to do.
    """
    table = tile_table(Packing.from_lengths(torch.tensor(lengths)), own)
    run, computed = scores(table, list(lengths), own, other)
    needed = sum(length * length for length in lengths)
    return {
        "tiles_run": run,
        "tiles_needed": -(-needed // (own * other)),
        "scores_over_needed": round(computed / needed, 4),
        "padded_over_needed": round(len(lengths) * max(lengths) ** 2 / needed, 4),
        "spare_programs": int((table[:, 0] < 0).sum()),
    }
