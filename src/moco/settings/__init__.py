"""Settings: one file for each section of params.yaml, with default, unit and range of every key."""
