"""Decoding states of the mixers, one kind a file."""
