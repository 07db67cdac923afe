"""Your own plain text files, one document a file."""

from collections.abc import Iterator

from effjax.data import documents
from effjax.data.builders import _user_files


class TextFiles(_user_files.FileBuilder):
  """UTF-8 text files; a single file is cut in two at a line end."""

  KEY = "text_files"
  SUFFIXES = (".txt", ".md", ".rst", ".py")

  def read_documents(self) -> Iterator[documents.Document]:
    for name, split, path in self.named_files():
      text = documents.decode(path.read_bytes(), str(path))
      yield documents.Document(name=name, text=text, split=split)


TECHNIQUE = TextFiles
