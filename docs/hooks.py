"""Pages of the site that lie outside of docs/, and the links that lead to them.

Links on our pages are those of the repository, so that they work where it is browsed. mkdocs knows only what is in
docs/.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

# Of a file of the repository what page of the site it is.
PAGES = {
    ROOT / "kernels" / "README.md": "kernels/writing.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between files of the repository into those between pages of the site."""
    source = Path(page.file.abs_src_path)
    folder = posixpath.dirname(page.file.src_uri)

    def of_the_site(found: re.Match[str]) -> str:
        target = (source.parent / found["path"]).resolve()
        there = PAGES.get(target)
        if there is None and target.is_relative_to(config.docs_dir):
            there = target.relative_to(config.docs_dir).as_posix()
        return found["path"] if there is None else posixpath.relpath(there, folder or ".")

    return LINK.sub(of_the_site, markdown)
