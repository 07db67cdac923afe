"""Number formats that weights are rounded to: a grid of values for each group."""
