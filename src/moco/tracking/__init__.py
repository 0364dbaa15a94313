"""What a run did: a metric log in JSON lines first, MLflow fed from it."""
