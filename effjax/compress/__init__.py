"""Transforms that make a model cheaper without training it."""
