"""Sweeps: one recipe at many points, by any number of workers."""
