"""Linear recurrences as pure functions: naive, chunked and one token at a time."""
