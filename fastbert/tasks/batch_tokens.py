"""How long a batch is, in tokens, where the caller does not say."""

from __future__ import annotations

import torch

from fastbert.config import EncoderConfig
from fastbert.cpu.machine import last_cache
from fastbert.families.quantization import in_int8
from fastbert.model.body import EncoderModel
from fastbert.model.heads import HeadModel, body_of

# On a CPU at least and at most: below, products slow down; above, nothing was gained.
LEAST_TOKENS, MOST_TOKENS = 1024, 8192
# And on a GPU at least, if its memory allows; seconds the host takes for a layer, and products' FLOP/s, which no GPU of
# today exceeds by much at BERT's sizes.
LEAST_GPU_TOKENS, HOST_SECONDS, GPU_RATE = 32768, 110e-6, 400e12


def default_batch_tokens(model: EncoderModel | HeadModel, device: torch.device) -> int:
    """Tokens of a batch for this model on this device."""
    size = 2 if in_int8(body_of(model).encoder) else next(model.parameters()).itemsize
    if device.type == "cuda":
        return gpu_batch_tokens(model.config, size, torch.cuda.get_device_properties(device).total_memory)
    return cpu_batch_tokens(model.config, size, last_cache())


def cpu_batch_tokens(config: EncoderConfig, itemsize: int, cache: int) -> int:
    """Tokens whose activations in a layer fill the CPU's last cache, of so many bytes.

    Within 2% of the best of 512 to 8192 with MiniLM in all dtypes on a CPU with 32 MiB.
    """
    return min(max(cache // _layer_bytes(config, itemsize), LEAST_TOKENS), MOST_TOKENS)


def gpu_batch_tokens(config: EncoderConfig, itemsize: int, memory: int) -> int:
    """Tokens that a GPU with so many bytes of memory computes for as long as the host prepares two such batches.

    So the host stays ahead; predicted, from the host's time a layer (docs/graphs.md) and `GPU_RATE`. Activations get a
    tenth of the memory.
    """
    flops = 8 * config.hidden_size**2 + 4 * config.hidden_size * config.intermediate_size  # of a token in a layer
    busy = int(2 * HOST_SECONDS * GPU_RATE / flops)
    fits = memory // 10 // _layer_bytes(config, itemsize)
    return min(max(busy, LEAST_GPU_TOKENS), max(fits, LEAST_TOKENS))


def _layer_bytes(config: EncoderConfig, itemsize: int) -> int:
    """Of a token's activations in a layer: the wide one and about five of hidden_size."""
    return (config.intermediate_size + 5 * config.hidden_size) * itemsize
