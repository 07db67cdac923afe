"""Sequence mixers: modules that move information between positions."""
