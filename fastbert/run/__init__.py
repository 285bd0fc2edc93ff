"""What computes an encoder: its layers as steps, and executors that read them."""
