"""The corpora, one file each; the file's name is what a config calls the corpus."""
