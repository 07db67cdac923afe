"""Foundations every other package may import: specs, trees, errors, registry."""
