"""Options for compilers, where the defaults serve us badly."""

# For programs that run once: compiling them well takes far longer than running them.
ONCE = {"xla_backend_optimization_level": 0}
