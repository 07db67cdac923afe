"""Optimizers and schedules by name, as optax transformations that read specs."""
