"""State-space models with a diagonal state for every channel, as pure functions."""
