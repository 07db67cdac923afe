"""Transforms that move scales and rotations between weights, not the function."""
