"""Other libraries on the same model: what they make of a checkpoint folder, and timing in turns."""
