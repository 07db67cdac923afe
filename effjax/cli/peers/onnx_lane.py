"""ONNX Runtime in a lane, on its CPU provider, with a file that effjax exported."""

import numpy as np
import onnxruntime

from effjax.cli.peers import lane

_PAST = "past_key_values."


class ONNXRuntime:
  """See lane.System."""

  def __init__(self, options: lane.Options, rows: int, length: int):
    """Loads a file with a cache."""
    del length  # The cache grows.
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    # As it comes, threads look for work between the operators of a run, which is worth
    # a third of its time; after a run it would be another lane's time that they take.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    self._session = onnxruntime.InferenceSession(
      options.model, settings, providers=["CPUExecutionProvider"]
    )
    self._outputs = [item.name for item in self._session.get_outputs()]
    # Held by the runtime, so that no step copies the cache to NumPy and back.
    self._empty = {
      item.name: _held(np.zeros((rows, item.shape[1], 0, item.shape[3]), np.float32))
      for item in self._session.get_inputs()
      if item.name.startswith(_PAST)
    }
    self._past = self._empty
    self._seen = 0
    self._logits = None
    self.about = (
      f"onnxruntime {onnxruntime.__version__}, keys and values in float32; of a prompt "
      "the graph computes all logits"
    )

  def prefill(self, tokens_BL: np.ndarray) -> None:
    self._past, self._seen = self._empty, 0
    self._read(tokens_BL)

  def step(self, token_B: np.ndarray) -> None:
    self._read(token_B[:, None])

  def logits(self) -> np.ndarray:
    return self._logits.numpy()[:, -1]

  def _read(self, tokens_BL: np.ndarray) -> None:
    rows, length = tokens_BL.shape
    self._seen += length
    feed = {
      "input_ids": _held(tokens_BL.astype(np.int64)),
      "attention_mask": _held(np.ones((rows, self._seen), np.int64)),
    }
    found = self._session.run_with_ort_values(self._outputs, feed | self._past)
    self._logits, *present = found
    self._past = dict(zip(self._empty, present, strict=True))


def _held(array: np.ndarray) -> onnxruntime.OrtValue:
  return onnxruntime.OrtValue.ortvalue_from_numpy(array)


if __name__ == "__main__":
  lane.serve(ONNXRuntime)
