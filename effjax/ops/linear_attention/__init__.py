"""Attention whose weights are products of features, and retention: linear in L."""
