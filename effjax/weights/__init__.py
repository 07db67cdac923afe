"""Weights: the leaf kinds, `weight()` and the five verbs."""
