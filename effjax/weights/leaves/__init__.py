"""Leaf kinds, one a file; the file name is the kind."""
