"""Models built from a config."""
