"""Checks of the machine and the project."""
