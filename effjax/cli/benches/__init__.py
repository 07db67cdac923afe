"""The suites of `effjax bench`, one a file."""
