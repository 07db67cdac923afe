"""llama.cpp as the tests ask it: they are skipped where it is not installed."""

import pytest

from effjax.cli.peers import llama_cpp


class Model(llama_cpp.Model):
  """A file, loaded by llama.cpp."""

  def __init__(self, path):
    pytest.importorskip(llama_cpp.PACKAGE)
    super().__init__(path)
