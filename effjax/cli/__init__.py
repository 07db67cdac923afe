"""The command line: one file a verb; the file name is the verb."""
