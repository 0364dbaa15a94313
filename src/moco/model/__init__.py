"""Encoders and momentum contrast. Knows tensors only: no files, no configuration, no tracking."""
