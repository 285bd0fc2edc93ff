"""The pages of docs/kernels and the tour: their pictures are what the script makes, and every page shows its own."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import report

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs" / "kernels"))
import draw

FOLDER = draw.FOLDER


@pytest.mark.parametrize("name", [*draw.PICTURES, *draw.TOUR])
def test_the_picture_is_what_the_script_makes(name: str) -> None:
    picture = (draw.PICTURES | draw.TOUR)[name]()
    xml.etree.ElementTree.fromstring(picture)
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == picture, "run docs/kernels/draw.py"


def test_every_page_has_its_picture_and_is_listed() -> None:
    pages = {path.stem for path in FOLDER.glob("*.md")} - {"README"}
    assert pages == set(draw.PICTURES) == set(report.PAGES)
    assert {path.stem for path in FOLDER.glob("*.svg")} == pages | set(draw.TOUR)
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    for page in pages:
        assert f"({page}.svg)" in (FOLDER / f"{page}.md").read_text(encoding="utf-8")
        assert f"({page}.md)" in listed


def test_the_tour_shows_every_picture() -> None:
    shown = re.findall(r"!\[[^]]+\]\(kernels/(\w+)\.svg\)", (FOLDER.parent / "tour.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted([*draw.PICTURES, *draw.TOUR])
