"""Pruning: parameters to zeros, one score a file."""
