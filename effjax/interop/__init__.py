"""Other programs' model files: weights and configs read from them and written to."""
