"""Which images of the pool to have labelled: features in, rows out. Knows neither files nor settings."""
