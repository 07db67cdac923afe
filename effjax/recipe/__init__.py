"""Recipes: the root config and the runner that takes a model through its stages."""
