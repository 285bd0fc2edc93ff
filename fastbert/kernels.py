"""The door to the Triton kernels: `kernels/` beside this package in a checkout, inside it in a wheel."""

from pathlib import Path

_here = Path(__file__).parent
__path__ = [str(_here / "kernels") if (_here / "kernels").is_dir() else str(_here.parent / "kernels")]
