"""From a dataset source to batches: source -> manifest -> decoded cache -> batches -> views."""
