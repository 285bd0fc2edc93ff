"""The packages, by hand: `fastbert.kernels` lives in `kernels/`, which no search would find under that name.

And a wheel that is a function of the sources. Everything else about the package is in pyproject.toml.
"""

import shutil
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):
    """One of the same bytes wherever it is built, with SOURCE_DATE_EPOCH set, of one version of setuptools.

    setuptools leaves modules of an earlier build where it takes them for the next one, and packs the permissions that
    files have in this checkout under this umask.
    """

    def run(self) -> None:
        """Build from nothing."""
        for folder in map(Path, (self.get_finalized_command("build").build_lib, self.bdist_dir)):
            if folder.exists():
                shutil.rmtree(folder)
        super().run()

    def write_wheelfile(self, *arguments: Any, **options: Any) -> None:
        """The last of what is written before all is packed."""
        super().write_wheelfile(*arguments, **options)
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


setup(
    cmdclass={"bdist_wheel": Wheel},
    packages=[
        "fastbert",
        "fastbert.checkpoints",
        "fastbert.cli",
        "fastbert.cpu",
        "fastbert.families",
        "fastbert.model",
        "fastbert.ops",
        "fastbert.ray",
        "fastbert.rivals",
        "fastbert.run",
        "fastbert.tasks",
        "fastbert.text",
        "fastbert.training",
        "fastbert.kernels",
    ],
    package_dir={"fastbert.kernels": "kernels"},
    package_data={
        "fastbert": ["py.typed"],
        "fastbert.kernels": ["README.md", "tuned.json"],
        "fastbert.rivals": ["sentences.txt"],
    },
)
