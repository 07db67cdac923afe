"""llama.cpp in a lane, with a GGUF file that effjax exported."""

from importlib import metadata

import numpy as np

from effjax.cli.peers import lane, llama_cpp


class LlamaCpp:
  """See lane.System."""

  def __init__(self, options: lane.Options, rows: int, length: int):
    """Loads a file, and a cache of one sequence a row."""
    self._model = llama_cpp.Model(options.model)
    # Its default is float16, but a float32 row is one throughout.
    self._context = self._model.context(
      rows=rows, length=length, threads=options.threads, wide=options.format == "F32"
    )
    self._seen = 0
    self._shape = (rows, 1)
    self.about = (
      f"{llama_cpp.PACKAGE} {metadata.version(llama_cpp.PACKAGE)}, built for "
      f"{llama_cpp.system_info()}; keys and values in float16, of F32 in float32"
    )

  def prefill(self, tokens_BL: np.ndarray) -> None:
    self._context.clear()
    self._seen = 0
    self._read(tokens_BL)

  def step(self, token_B: np.ndarray) -> None:
    self._read(token_B[:, None])

  def logits(self) -> np.ndarray:
    rows, length = self._shape
    return self._context.last(length, rows)

  def _read(self, tokens_BL: np.ndarray) -> None:
    self._context.read(tokens_BL, self._seen)
    self._seen += tokens_BL.shape[1]
    self._shape = tokens_BL.shape


if __name__ == "__main__":
  llama_cpp.library()  # No part of a model.
  lane.serve(LlamaCpp)
