"""Quantization: parameters to integer codes, one rounding a file."""
