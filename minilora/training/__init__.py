"""The loop: optimizer, schedule, randomness, checkpoint."""
