"""The blocks of code on our pages run as they stand, each by itself, beside small files of the names that they use.

A block that can't is marked in the line above it, with the reason: <!-- not run: ... -->. One that needs what not all
have is run where it is there: <!-- needs a GPU -->, or <!-- needs onnx, onnxruntime -->, names of modules.
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_bert
import torch
from processes import PYTHON

import fastbert
from fastbert.checkpoints.load import save
from fastbert.config import EncoderConfig
from fastbert.model.body import BertModel

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "kernels/README.md")]
PAGES += (ROOT / "docs").rglob("*.md")
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^>]*) -->\n\n?)?^```(?P<language>(?!diff)\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """`where` is its page and line."""

    where: str
    language: str
    code: str
    mark: str

    @property
    def skips(self) -> str | None:
        """Why it is not run here."""
        if self.mark == "needs a GPU":
            return None if torch.cuda.is_available() else self.mark
        if self.mark.startswith("needs "):
            missing = [name for name in self.needed if importlib.util.find_spec(name) is None]
            return f"needs {', '.join(missing)}" if missing else None
        return self.mark or None

    @property
    def needed(self) -> list[str]:
        """The modules that its mark names."""
        return self.mark.removeprefix("needs ").split(", ")


def blocks_of(page: str, name: str) -> list[Block]:
    return [
        Block(
            f"{name}:{page[: found.start('code')].count(chr(10))}",
            *found.group("language", "code"),
            found["mark"] or "",
        )
        for found in BLOCK.finditer(page)
    ]


BLOCKS = [block for path in PAGES for block in blocks_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that our pages name: a model as wide as MiniLM under two names, texts, examples of each task."""
    folder = tmp_path_factory.mktemp("toys")
    words = [*tiny_bert.VOCABULARY, *(f"word{i}" for i in range(8000 - len(tiny_bert.VOCABULARY)))]
    config = EncoderConfig(len(words), 384, num_layers=1, num_heads=12, intermediate_size=64, max_positions=512)
    save(BertModel(config), folder / "all-MiniLM-L6-v2")
    (folder / "all-MiniLM-L6-v2" / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "FOLDER").symlink_to("all-MiniLM-L6-v2")
    (folder / "texts.txt").write_text("the film was great\nAda met Alan in Oslo.\n")
    for seed, (examples, table) in enumerate((("train", "reviews"), ("valid", "held_out"))):
        tiny_bert.names(folder / f"{examples}.txt", 12, seed)
        lines = tiny_bert.opinions(folder / "opinions.jsonl", 12, seed).read_text().splitlines()
        with (folder / f"{table}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(map(json.loads, lines))
    for seed, name in enumerate(("documents.txt", "more.txt")):
        tiny_bert.stories(folder / name, 8, seed)
    (folder / "glove.txt").write_text(f"film {' '.join(['0.5'] * 256)}\n")
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.where, marks=[pytest.mark.long] if "train mlm" in block.code else [])
        for block in BLOCKS
    ],
)
def test_blocks_run(block: Block, toys: Path, tmp_path: Path) -> None:
    if block.skips:
        pytest.skip(f"{block.where}: {block.skips}")
    shutil.copytree(toys, tmp_path, symlinks=True, dirs_exist_ok=True)
    programs = tmp_path / ".programs"
    programs.mkdir()
    for name, arguments in (("fastbert", ["-m", "fastbert"]), ("python", [])):
        (programs / name).write_text(f'#!/bin/sh\nexec {" ".join([*PYTHON, *arguments])} "$@"\n')
        (programs / name).chmod(0o755)
    run = {"python": [*PYTHON, "-c"], "sh": ["bash", "-euo", "pipefail", "-c"]}[block.language]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON")}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*run, block.code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{block.where}:\n{block.code}\n{done.stderr[-3000:]}"


def test_blocks_are_found_with_their_marks() -> None:
    page = "\n".join(
        [
            "# A page", "", "```python", "print(1)", "```", "", "<!-- not run: takes a week -->", "```sh", "sleep 6d",
            "```",
            "", "```", "a drawing", "```", "", "<!-- needs a GPU -->", "", "```python", "x.cuda()", "```", "",
            "<!-- needs json, nobody_has_this -->", "```python", "import nobody_has_this", "```",
        ]
    )  # fmt: skip
    python, marked, gpu, other = blocks_of(page, "page.md")
    assert (python.where, python.language, python.code, python.skips) == ("page.md:3", "python", "print(1)\n", None)
    assert (marked.language, marked.skips) == ("sh", "not run: takes a week")
    assert gpu.skips == (None if torch.cuda.is_available() else "needs a GPU")
    assert other.skips == "needs nobody_has_this"


def test_marks_say_why_and_languages_are_known() -> None:
    assert sum(block.skips is None for block in BLOCKS) >= 6
    for block in BLOCKS:
        assert block.language in ("python", "sh"), block.where
        known = block.mark in ("", "needs a GPU") or re.fullmatch(r"not run: .{10,}", block.mark)
        assert known or block.mark == f"needs {', '.join(filter(str.isidentifier, block.needed))}", block.where


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_block_of_code_escapes_the_runner(path: Path) -> None:
    """Nor an indented one, nor one with a title."""
    page = path.read_text(encoding="utf-8")
    begun = re.findall(r"^[ >]*(?:```|~~~)[ ]*(\S.*)$", page, re.MULTILINE)
    assert [said for said in begun if said != "diff"] == [block.language for block in blocks_of(page, "")]


def test_messages_that_we_explain_are_those_of_the_code() -> None:
    """Each is cut where something varies, or where an error joins its parts; the pieces are strings of our modules."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^> `([^`]+)`$", page, re.MULTILINE)
    assert len(messages) == page.count("\n> `") > 30
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "fastbert").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    strings = "\0".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    for message in messages:
        pieces = re.split(r"…|: got |; expected |(?<=[a-z0-9])\. (?=[A-Zf])|\.$", message)
        assert not [piece for piece in pieces if piece.strip(" .,:;()") not in strings], message


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as a repository's browser makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path: Path) -> None:
    """Where the repository is browsed; `make docs` holds those of the site."""
    page = re.sub(r"^```.*?^```$|`[^`\n]+`", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", page):
        there = path.parent / target if target else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def test_every_public_name_is_documented_once() -> None:
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md"))]
    shown = re.findall(r"^::: fastbert\.(\w+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(shown) == sorted({*fastbert.__all__} - {"__version__"})
