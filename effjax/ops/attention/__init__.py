"""Softmax attention as pure functions: parallel, over a cache, and rotary positions."""
