"""Runs: identity, folder, lock, checkpoints, resuming."""
