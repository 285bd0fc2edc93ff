"""Text to token ids, and texts to batches of them."""
