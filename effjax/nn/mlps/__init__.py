"""Channel mixers: modules that act on each position alone."""
