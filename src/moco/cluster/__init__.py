"""Containers and Slurm: what runs the stages elsewhere."""
