"""The packages, by hand: `fastbert.kernels` lives in `kernels/`, which no search would find under that name.

Everything else about the package is in pyproject.toml.
"""

from setuptools import setup

setup(
    packages=[
        "fastbert",
        "fastbert.checkpoints",
        "fastbert.cli",
        "fastbert.cpu",
        "fastbert.families",
        "fastbert.model",
        "fastbert.ops",
        "fastbert.ray",
        "fastbert.run",
        "fastbert.tasks",
        "fastbert.text",
        "fastbert.training",
        "fastbert.kernels",
    ],
    package_dir={"fastbert.kernels": "kernels"},
    package_data={"fastbert": ["py.typed"], "fastbert.kernels": ["README.md", "tuned.json"]},
)
