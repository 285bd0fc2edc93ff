"""Other libraries on the same model: what they make of a checkpoint folder, and timing in turns."""

from __future__ import annotations

from pathlib import Path

# 300 English sentences of 3 to 60 words, one a line, for whoever has no texts of their own at hand.
SENTENCES = Path(__file__).with_name("sentences.txt")
