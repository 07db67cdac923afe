"""Maps between architectures of llama.cpp and the models here, one a file."""
