"""Hugging Face folders: config.json, safetensors and a tokenizer, in and out."""
