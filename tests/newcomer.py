"""The path of a newcomer: our wheel in a fresh environment, the README's snippets, each example, `fastbert bench`.

    python tests/newcomer.py TORCH       the requirement of torch, such as torch==2.13.0: `make newcomer` gives its own

Nothing is installed but what the README and the table of examples/README.md name, and all runs in an empty folder. What
is missing there shows: a module that the wheel lacks, a library that the pages don't name, a file of the checkout.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What each example is called with. `OUT` is a new folder, `MODEL` the classifier of text_classification.py.
EXAMPLES = {
    "demo.py": [],
    "text_classification.py": ["OUT", "--small"],
    "sentiment.py": ["MODEL", "texts.txt"],
    "named_entities.py": ["OUT", "--small"],
    "semantic_search.py": ["--small"],
    "zero_shot.py": ["--small"],
    "deduplication.py": ["--small"],
    "from_scratch.py": ["OUT", "--small"],
    "corpus_on_ray.py": ["OUT", "--small"],
    "transformers_trainer.py": ["--small"],
    "sentence_transformers_training.py": ["OUT", "--small"],
    "lora.py": ["OUT", "--small"],
}
TEXTS = "A masterpiece.\nA total failure, dull and stupid.\n"


class Newcomer:
    """Somebody with an empty folder and a fresh environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.bin = folder / "environment" / "bin"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.environment = {**inherited, "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        self.folder.mkdir()
        (self.folder / "texts.txt").write_text(TEXTS, encoding="utf-8")

    def run(self, *command: object) -> str:
        """What a command says on stdout; it is printed, with its time, and what it said if it fails.

        Raises:
            SystemExit: it failed.
        """
        words = [str(word) for word in command]
        begin = time.monotonic()
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        print(f"{time.monotonic() - begin:6.1f} s  {' '.join(words)[:160]!r}", flush=True)
        if done.returncode != 0:
            sys.exit(f"it ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
        return done.stdout

    def install(self, *requirements: str) -> None:
        """`pip install`, and no conflict after it."""
        quiet = ["--quiet", "--disable-pip-version-check"]
        self.run("python", "-m", "pip", "install", *quiet, *requirements)
        self.run("python", "-m", "pip", "check", "--disable-pip-version-check")


def main(torch: str) -> None:
    """Go the path; exit status 1 at the first step that fails."""
    with tempfile.TemporaryDirectory(prefix="newcomer-") as name:
        folder = Path(name)
        built = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]  # the sdist, and the wheel of that
        subprocess.run(built, check=True, stdout=subprocess.DEVNULL)
        wheel = next(folder.glob("*.whl"))
        subprocess.run([sys.executable, "-m", "venv", str(folder / "environment")], check=True)
        newcomer = Newcomer(folder)
        # torch is named so that all machines of CI have the same, and those without a GPU no libraries of one.
        newcomer.install(torch, f"{wheel}[hf]")
        found = newcomer.run("python", "-c", "import fastbert; print(fastbert.__file__)")
        if not found.startswith(str(folder)):
            sys.exit(f"fastbert is that of {found}")
        the_readme(newcomer)
        the_examples(newcomer, wheel)
        print(newcomer.run("fastbert", "bench", "all-MiniLM-L6-v2"))


def the_readme(newcomer: Newcomer) -> None:
    """Its snippets, one after another, in a folder with the checkpoint that it says how to get."""
    fetch = "import fastbert.assets; print(fastbert.assets.fetch('minilm'))"
    minilm = newcomer.run("python", "-c", fetch).strip()
    (newcomer.folder / "all-MiniLM-L6-v2").symlink_to(minilm)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    if len(snippets) < 2:
        sys.exit("README.md shows less than two snippets of Python")
    for snippet in snippets:
        newcomer.run("python", "-c", snippet)


def the_examples(newcomer: Newcomer, wheel: Path) -> None:
    """Those in the table of examples/README.md, each after what it is said to need was installed."""
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^]]*\]\(([^)]*)\) \|.*\| ([^|]*)\|$", page, flags=re.MULTILINE)
    listed = {name for name, _ in rows}
    known = {*EXAMPLES, "quick_start.ipynb", "serving/server.py"}
    if listed != known or not {path.name for path in (ROOT / "examples").glob("*.py")} <= {*known, "reviews.py"}:
        sys.exit(f"examples/README.md lists {sorted(listed)}, and tests/newcomer.py knows {sorted(known)}")
    model = ""
    for name, needs in rows:
        if needed := re.findall(r"`([^`]*)`", needs):
            newcomer.install(*(f"{wheel}[{need[2:-1]}]" if need.startswith(".[") else need for need in needed))
        path, out = ROOT / "examples" / name, name.partition(".")[0]
        if name == "quick_start.ipynb":
            (newcomer.folder / name).write_bytes(path.read_bytes())
            newcomer.run("jupyter", "execute", name)
        elif name == "serving/server.py":
            the_service(newcomer, path)
        else:
            words = {"OUT": out, "MODEL": model}
            newcomer.run("python", path, *(words.get(word, word) for word in EXAMPLES[name]))
            model = f"{out}/model" if name == "text_classification.py" else model


def the_service(newcomer: Newcomer, server: Path) -> None:
    """It answers, and ends well on SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["python", str(server), "all-MiniLM-L6-v2", "--port", str(port)]
    with subprocess.Popen(command, cwd=newcomer.folder, env=newcomer.environment) as running:
        try:
            while running.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            asked = json.dumps({"model": "all-MiniLM-L6-v2", "input": TEXTS.splitlines()}).encode()
            address, headers = f"http://127.0.0.1:{port}/v1/embeddings", {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(address, asked, headers), timeout=60) as answer:
                embeddings = json.load(answer)["data"]
        finally:
            running.send_signal(signal.SIGTERM)
    if [len(one["embedding"]) for one in embeddings] != [384, 384] or running.returncode != 0:
        sys.exit(f"the service gave {len(embeddings)} embeddings, and ended with {running.returncode}")


if __name__ == "__main__":
    main(*sys.argv[1:])
