"""Mixture of experts as pure functions: routers, dispatches, grouped products."""
