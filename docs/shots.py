"""Looks at every page of the built site in a headless Chromium, as wide as a desk's window and as narrow as a phone.

    python docs/shots.py [PAGE ...]      # api/texts.html, say

writes build/shots/PAGE-WIDTH.png, for somebody to look at, and exits with 1 where a page asks anybody but us for
something, has an error, lacks a picture, or is wider than its window. Chromium is that of the system (Debian's package
chromium), or the one that `playwright install chromium` has fetched.
"""

from __future__ import annotations

import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SITE, SHOTS = ROOT / "build" / "site", ROOT / "build" / "shots"
WIDTHS = {"wide": 1280, "narrow": 390}
TALLEST = 16_000  # pixels of a picture that Chromium still draws
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and says nothing about it."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


def look(page: Page, address: str, name: str) -> list[str]:
    """A picture of a page in each width, and what is wrong with it."""
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(address) else wrong.append(f"asks for {asked.url}"))
    for width, pixels in WIDTHS.items():
        page.set_viewport_size({"width": pixels, "height": 900})
        page.goto(f"{address}/{name}", wait_until="networkidle")
        broken = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
        wrong += [f"no picture at {source}" for source in page.evaluate(broken)]
        needed, tall = (page.evaluate(f"document.documentElement.scroll{side}") for side in ("Width", "Height"))
        if needed > pixels:
            wrong.append(f"{needed} pixels wide in a window of {pixels}")
        shot = SHOTS / f"{name.removesuffix('.html').replace('/', '-')}-{width}.png"
        page.screenshot(path=shot, full_page=True, clip={"x": 0, "y": 0, "width": pixels, "height": min(tall, TALLEST)})
    return wrong


def main() -> int:
    """The command."""
    names = sys.argv[1:] or sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    SHOTS.mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    status = 0
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        browser = playwright.chromium.launch(executable_path=found)
        for name in names:
            page = browser.new_page(reduced_motion="reduce")
            for problem in look(page, f"http://127.0.0.1:{server.server_port}", name):
                print(f"{name}: {problem}")
                status = 1
            page.close()
        browser.close()
    server.shutdown()
    print(f"{len(names)} pages, {len(WIDTHS)} pictures of each, are in {SHOTS.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
