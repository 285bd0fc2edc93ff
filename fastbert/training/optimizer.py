"""AdamW, what decays in it, and its learning rate from step to step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastbert.training.settings import Settings


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`: a linear rise, then a linear or cosine fall to 0."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    done = (step - warm) / (steps - warm)
    return settings.lr * (1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """The optimizer: AdamW over `decay_groups`."""
    return torch.optim.AdamW(decay_groups(model, settings.weight_decay), lr=settings.lr, fused=True)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups of parameters: matrices and tables decay; vectors (biases, LayerNorms) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
