"""One honest ruler: what a model costs and how good it is, in one row of numbers."""
