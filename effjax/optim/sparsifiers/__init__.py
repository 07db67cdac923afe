"""Kinds of sparse training, one file each; all wrap an optimizer (optim.sparse)."""
