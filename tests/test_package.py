"""The package as users get it: wheel, sdist, editable, uninstalled, in folders with spaces, beside transformers."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import fastbert
from fastbert.installed import DISTRIBUTION

ROOT = Path(__file__).resolve().parent.parent
EPOCH = "1700000000"
SHIPPED = ("fastbert", "kernels", "LICENSE", "README.md", "pyproject.toml", "setup.py")


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What a program says on stdout. Nothing of this process's paths and settings reaches it but the program's."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def empty_venv(folder: Path) -> Path:
    """A fresh environment with our dependencies in sight and without fastbert; its bin folder."""
    venv.create(folder, symlinks=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    for entry in Path(torch.__file__).parent.parent.iterdir():
        # The editable fastbert that may be installed over there stays out, with its metadata; pip comes with venv.
        if not entry.name.startswith(("fastbert", "__editable__")) and not (site_packages / entry.name).exists():
            (site_packages / entry.name).symlink_to(entry)
    return folder / "bin"


def pip(environment: Path, *words: object) -> str:
    options = ["--disable-pip-version-check", "--python", environment / "python"]
    return run(sys.executable, "-m", "pip", *options, *words, cwd=environment)


def pip_install(environment: Path, *what: object) -> None:
    pip(environment, "install", "--quiet", "--no-deps", "--no-build-isolation", *what)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that builds leave nothing in it."""
    folder = tmp_path_factory.mktemp("a path with spaces") / "source"
    folder.mkdir()
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)
    return folder


@pytest.fixture(scope="module")
def dist(source: Path) -> Path:
    """A folder with the sdist of `source` and the wheel made from that sdist."""
    folder = source.parent / "dist"
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    run(*build, cwd=source, SOURCE_DATE_EPOCH=EPOCH)
    return folder


@pytest.mark.packaging
def test_wheel_has_every_module_and_nothing_else(source: Path, dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(source)) for path in (source / "fastbert").rglob("*.py")}
    kernels = {f"fastbert/kernels/{path.name}" for path in (source / "kernels").iterdir()}
    assert "fastbert/kernels/choices.py" in kernels
    assert names == modules | kernels | {"fastbert/py.typed", "fastbert/rivals/sentences.txt"}


@pytest.mark.packaging
def test_a_wheel_is_the_same_to_the_byte_wherever_it_is_built(source: Path, dist: Path, tmp_path: Path) -> None:
    """By pip from a checkout with other permissions, dates and place, in which an older version was built."""
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout, ignore=shutil.ignore_patterns("build", "*.egg-info"), copy_function=shutil.copy)
    for path in checkout.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    for left in ("build/lib", "build/bdist.linux-x86_64/wheel"):
        (checkout / left / "fastbert").mkdir(parents=True)
        (checkout / left / "fastbert" / "gone.py").touch()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", checkout]
    run("sh", "-c", 'umask 077; exec "$0" "$@"', *build, cwd=tmp_path, SOURCE_DATE_EPOCH=EPOCH)
    (here,), (there,) = tmp_path.glob("*.whl"), dist.glob("*.whl")
    assert here.name == there.name and here.read_bytes() == there.read_bytes()


@pytest.mark.packaging
def test_sdist_has_the_sources_and_the_license(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml", "kernels/choices.py", "fastbert/py.typed"} <= names


@pytest.mark.packaging
def test_installed_wheel_works_outside_the_repository(dist: Path, tmp_path: Path) -> None:
    environment = empty_venv(tmp_path / "empty venv")
    (wheel,) = dist.glob("*.whl")
    pip_install(environment, wheel)
    assert "No broken requirements" in pip(environment, "check"), "beside all that is installed here"
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()

    code = "import fastbert, fastbert.kernels.choices as choices; print(fastbert.__file__, choices.__file__, sep='\\n')"
    for file in run(environment / "python", "-c", code, cwd=elsewhere).splitlines():
        assert Path(file).is_relative_to(tmp_path / "empty venv"), file
    assert "fastbert      0.1.0" in run(environment / "fastbert", "info", cwd=elsewhere)

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "morning"]
    config = fastbert.EncoderConfig(len(words), 32, num_layers=2, num_heads=2, intermediate_size=64, max_positions=16)
    fastbert.save(fastbert.BertModel(config), elsewhere / "model")
    (elsewhere / "model" / "vocab.txt").write_text("\n".join(words))
    (elsewhere / "texts.txt").write_text("good morning\nmorning\n")
    options = ("--model", "model", "--max-length", "16", "--output", "embeddings.npy")
    run(environment / "fastbert", "encode", "texts.txt", *options, cwd=elsewhere)
    here = fastbert.encode(["good morning", "morning"], elsewhere / "model", max_length=16)
    np.testing.assert_allclose(np.load(elsewhere / "embeddings.npy"), here, atol=1e-6)


@pytest.mark.packaging
def test_editable_install_finds_the_kernels(source: Path, tmp_path: Path) -> None:
    environment = empty_venv(tmp_path / "empty venv")
    pip_install(environment, "--editable", source)
    code = (
        "import fastbert, fastbert.kernels.choices as choices; print(choices.__file__, fastbert.__version__, sep='\\n')"
    )
    printed = run(environment / "python", "-c", code, cwd=tmp_path).splitlines()
    assert printed == [str(source / "kernels" / "choices.py"), "0.1.0"]


@pytest.mark.packaging
def test_uninstalled_use_works_and_has_no_version(tmp_path: Path) -> None:
    environment = empty_venv(tmp_path / "empty venv")
    for name in ("fastbert", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name)
    code = "import fastbert, fastbert.kernels.choices\ntry: fastbert.__version__\nexcept AttributeError as e: print(e)"
    assert "not installed" in run(environment / "python", "-c", code, cwd=environment, PYTHONPATH=str(tmp_path))


def test_the_name_of_the_distribution_is_that_of_pyproject() -> None:
    assert re.search(r'^name = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1] == DISTRIBUTION


@pytest.mark.parametrize("options", [("-P",), ()], ids=["safe path", "root on the path"])
def test_transformers_is_unharmed_in_the_repository_root(options: tuple[str, ...]) -> None:
    """PyPI's `kernels`, which transformers imports when it sees it, is not mistaken for our folder of that name."""
    if options and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no -P")
    code = "from transformers import BertConfig, BertModel, utils; BertModel(BertConfig(num_hidden_layers=1))"
    run(sys.executable, *options, "-c", code + "; assert not utils.is_kernels_available()", cwd=ROOT)


def test_case_19_import_makes_no_driver_call_and_loads_no_triton() -> None:
    code = """
import sys, torch

def driver_call(*args, **kwargs):
    raise AssertionError("a driver call")

torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = driver_call
torch._C._cuda_getDeviceCount = driver_call

import fastbert
import fastbert.kernels.choices

print(torch.cuda.is_initialized())
print([name for name in ("triton", "transformers", "tokenizers") if name in sys.modules])
"""
    printed = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT)).split("\n")
    assert printed[:2] == ["False", "[]"]


WITHOUT_LLVMLITE = """
import sys
sys.modules["llvmlite"] = None
import torch, fastbert
from fastbert.model.body import BertModel
from fastbert.packing import Packing
config = fastbert.EncoderConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
model, packing = BertModel(config), Packing.from_lengths([70, 3])
ids = torch.randint(50, (73,))
out = model.train()(ids, packing=packing).last_hidden_state  # dropout is on
weight = model.encoder.layer[0].output.dense.weight
[gradient] = torch.autograd.grad(out, [weight], torch.randn_like(out), create_graph=True)
gradient.backward(torch.randn_like(gradient))
with torch.inference_mode():
    print(model.eval()(ids, packing=packing).last_hidden_state.isfinite().all().item())
"""


@pytest.mark.heavy
def test_a_machine_without_llvmlite_trains_and_infers(tmp_path: Path) -> None:
    """ARM64 and macOS have none, and a module of the CPU's kernels that is imported without need ends all there."""
    environment = {"PYTHONPATH": str(ROOT), "FASTBERT_PRODUCTS": ""}  # the tests ask for products of our own
    assert run(sys.executable, "-c", WITHOUT_LLVMLITE, cwd=tmp_path, **environment).split() == ["True"]


def test_import_loads_no_torch() -> None:
    code = "import fastbert, fastbert.cli, sys; print('torch' in sys.modules, 'BertModel' in dir(fastbert))"
    assert run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT)).split() == ["False", "True"]


def test_type_checkers_and_python_find_the_same_public_names() -> None:
    tree = ast.parse((ROOT / "fastbert" / "__init__.py").read_text(encoding="utf-8"))
    said = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastbert.")
        for alias in node.names
    }
    assert {name: f"fastbert.{module}" for name, module in fastbert._HOMES.items()} == said
    assert set(fastbert.__all__) == said.keys() | {"__version__"} <= set(dir(fastbert))


def test_public_names_are_there() -> None:
    for name in fastbert.__all__:
        assert name == "__version__" or getattr(fastbert, name).__doc__, name
    assert fastbert.encode.__module__ == "fastbert.tasks.encode"
    with pytest.raises(AttributeError, match="no attribute 'encoed'"):
        fastbert.encoed  # noqa: B018


@pytest.mark.heavy
def test_examples_in_the_readme_run(minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(minilm)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        run(sys.executable, "-c", example, cwd=tmp_path, PYTHONPATH=str(ROOT))
