"""One small map an architecture: its fields, and where its tensors are."""
