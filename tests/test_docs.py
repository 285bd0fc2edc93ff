"""The blocks of code on our pages run as they stand, each by itself, beside small files of the names that they use.

A block that can't is marked in the line above it, with the reason: <!-- not run: ... -->, or <!-- needs a GPU -->.
"""

from __future__ import annotations

import csv
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

from fastbert.checkpoints.load import load, save
from fastbert.config import EncoderConfig, HeadConfig
from fastbert.errors import UntrainedWarning
from fastbert.model.body import BertModel
from fastbert.model.heads import BertForMaskedLM, BertForSequenceClassification

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md", *(ROOT / "docs").rglob("*.md")]
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
        return self.mark or None


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


ONE = HeadConfig(("relevant",))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that our pages name: a model as wide as MiniLM, with heads too, texts, examples of each task."""
    folder = tmp_path_factory.mktemp("toys")
    words = [*tiny_bert.VOCABULARY, *(f"word{i}" for i in range(8000 - len(tiny_bert.VOCABULARY)))]
    config = EncoderConfig(len(words), 384, num_layers=1, num_heads=12, intermediate_size=64, max_positions=512)
    save(BertModel(config), folder / "all-MiniLM-L6-v2")
    (folder / "all-MiniLM-L6-v2" / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "FOLDER").symlink_to("all-MiniLM-L6-v2")
    for name, kind, head in (
        ("bert-base-uncased", BertForMaskedLM, None),
        ("reranker", BertForSequenceClassification, ONE),
    ):
        with pytest.warns(UntrainedWarning):
            save(load(folder / "all-MiniLM-L6-v2", kind, head=head), folder / name)
        shutil.copy(folder / "all-MiniLM-L6-v2" / "vocab.txt", folder / name)
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
            "", "```", "a drawing", "```", "", "<!-- needs a GPU -->", "", "```python", "x.cuda()", "```",
        ]
    )  # fmt: skip
    python, marked, gpu = blocks_of(page, "page.md")
    assert (python.where, python.language, python.code, python.skips) == ("page.md:3", "python", "print(1)\n", None)
    assert (marked.language, marked.skips) == ("sh", "not run: takes a week")
    assert gpu.skips == (None if torch.cuda.is_available() else "needs a GPU")


def test_marks_say_why_and_languages_are_known() -> None:
    assert sum(block.skips is None for block in BLOCKS) >= 6
    for block in BLOCKS:
        assert block.language in ("python", "sh"), block.where
        assert not block.mark or block.mark == "needs a GPU" or re.fullmatch(r"not run: .{10,}", block.mark), (
            block.where
        )
