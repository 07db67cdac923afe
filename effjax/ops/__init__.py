"""Pure functions of arrays: no modules, no parameters, no state."""
