"""Which images to have labelled; knows tensors only."""
