"""Fine-tune MiniLM to find people, places and organisations, on CoNLL-2003, and mark them in a sentence.

    python examples/named_entities.py OUT             ten minutes on a CPU
    python examples/named_entities.py OUT --small     less than a minute

The data are for research only, and are fetched once (27 MB); training data of your own may be JSON lines, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import fastbert
from fastbert.assets import fetch
from fastbert.training import Settings, train

TEXT = "Angela Merkel met the head of Siemens in Munich before she flew to New York."


def main() -> None:
    """Train, measure, mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the data and the model")
    parser.add_argument("--small", action="store_true", help="on little data")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, count in (("train", 800 if options.small else None), ("valid", 150 if options.small else None)):
        sentences = (fetch("conll2003") / f"{name}.txt").read_text(encoding="utf-8").split("\n\n")
        files[name] = options.out / f"{name}.txt"  # a word a line, its tag last, an empty line between sentences
        files[name].write_text("\n\n".join(sentences[:count]), encoding="utf-8")
    settings = Settings(
        task="tag",
        model=str(fetch("minilm")),
        train=str(files["train"]),
        valid=str(files["valid"]),
        out=str(options.out / "model"),
        epochs=3,
        lr=5e-4 if options.small else 1e-4,
        max_length=128,
    )
    metrics = train(settings, progress=sys.stderr.isatty(), say=print)
    print(f"entity F1 {metrics['f1']:.3f} on sentences that it never saw")

    for entity in fastbert.tag([TEXT], options.out / "model")[0]:
        print(f"{entity.kind:5} {entity.score:.2f}  {TEXT[entity.start : entity.end]}")


if __name__ == "__main__":
    main()
