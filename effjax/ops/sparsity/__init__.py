"""Which weights of matrices stay: exact counts, amounts over training, topologies."""
