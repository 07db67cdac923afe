"""One results table from a run folder: Markdown, HTML, PNG and the terminal."""
