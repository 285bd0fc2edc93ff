"""Training: `train(Settings(task="classify", ...))` is the library call behind `fastbert train`."""

from __future__ import annotations

from fastbert.training.loop import Settings, train

__all__ = ["Settings", "train"]
