"""Labelled real text with a question that a language model answers untrained."""
