"""effjax in a lane: a stage folder, decoded as `effjax generate` does."""

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cli.peers import lane, model_files
from effjax.core import allocator
from effjax.infer import engine
from effjax.ops.matmul import native
from effjax.train import stages


class Effjax:
  """See lane.System."""

  def __init__(self, options: lane.Options, rows: int, length: int):
    """Loads a stage."""
    stage = stages.load_stage(options.model)
    self._decoding = engine.Decoding(stage.model, stage.params, rows, length)
    self._state = None
    self._logits_BV = None
    self.about = (
      f"jax {jax.__version__}, keys and values in bfloat16 in the bfloat16 row, else "
      "in float32"
    )
    if options.format == model_files.DYNAMIC:
      self.about = f"{options.format} executes {_integer_product()}"

  def prefill(self, tokens_BL: np.ndarray) -> None:
    self._state = None
    self._logits_BV, self._state = self._decoding.prefill(jnp.asarray(tokens_BL))
    jax.block_until_ready(self._logits_BV)

  def step(self, token_B: np.ndarray) -> None:
    token_B = jnp.asarray(token_B)
    self._logits_BV, self._state = self._decoding.step(token_B, self._state)
    jax.block_until_ready(self._logits_BV)

  def logits(self) -> np.ndarray:
    return np.asarray(self._logits_BV)


def _integer_product() -> str:
  """Which product the dynamic format executes, and why."""
  status = native.status()
  if status.available:
    return f"the native integer product, {status.reason}"
  return f"XLA's own integer product: {status.reason}"


if __name__ == "__main__":
  allocator.keep_freed_memory()  # As the command line does.
  jax.devices()  # A backend is no part of a model.
  lane.serve(Effjax)
