"""Real corpora, tokenizers, and the batches that training and evaluation read."""
