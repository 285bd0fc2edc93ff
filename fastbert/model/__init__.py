"""A BERT: its layers and encoder, the model around them, its heads, and what masks and outputs mean."""
