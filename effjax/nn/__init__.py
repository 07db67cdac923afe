"""Linen modules over the pure ops, one technique a file."""
