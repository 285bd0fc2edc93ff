"""Where results are kept: a folder for each machine."""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def folder_of(machine: str) -> Path:
    """The folder of a machine by its name: "NVIDIA H100 80GB HBM3" has results/nvidia-h100-80gb-hbm3."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
