"""Training: `train(Settings(task="classify", ...))` is the library call behind `fastbert train`."""

from __future__ import annotations

from fastbert.training.from_scratch import initialise_embedding, read_word_vectors, scratch
from fastbert.training.loop import train
from fastbert.training.settings import Settings

__all__ = ["Settings", "initialise_embedding", "read_word_vectors", "scratch", "train"]
