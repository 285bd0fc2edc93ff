"""The pages of docs/kernels: their pictures are what the script makes, and every page shows its own."""

from __future__ import annotations

import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import report

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs" / "kernels"))
import draw

FOLDER = draw.FOLDER


@pytest.mark.parametrize("name", draw.PICTURES)
def test_the_picture_is_what_the_script_makes(name: str) -> None:
    picture = draw.PICTURES[name]()
    xml.etree.ElementTree.fromstring(picture)
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == picture, "run docs/kernels/draw.py"


def test_every_page_has_its_picture_and_is_listed() -> None:
    pages = {path.stem for path in FOLDER.glob("*.md")} - {"README"}
    assert pages == set(draw.PICTURES) == set(report.PAGES) == {path.stem for path in FOLDER.glob("*.svg")}
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    for page in pages:
        assert f"({page}.svg)" in (FOLDER / f"{page}.md").read_text(encoding="utf-8")
        assert f"({page}.md)" in listed
