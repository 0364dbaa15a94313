"""Training in general: one loop, schedules, checkpoints, numerics. Knows nothing of contrast."""
