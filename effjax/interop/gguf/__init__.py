"""GGUF, the file format of llama.cpp: its container and its block formats, in NumPy."""
