import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import specs as specs_lib
from effjax.models import config as config_lib
from effjax.models import decoder


@dataclasses.dataclass(frozen=True)
class Text:
  """An eval set of two rows, the second padded and partly unscored."""

  num_bytes: int = 100
  context: int = 12
  stride: int = 6

  def batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(0, 40, (2, self.context + 1), np.int32)
    segments_BL = np.ones((2, self.context), np.int32)
    segments_BL[1, 8:] = 0
    weights_BL = (segments_BL > 0).astype(np.float32)
    weights_BL[1, :6] = 0
    batch = {
      "inputs": tokens_BL[:, :-1],
      "targets": tokens_BL[:, 1:],
      "weights": weights_BL,
      "segments": segments_BL,
      "positions": np.tile(np.arange(self.context, dtype=np.int32), (2, 1)),
    }
    for start in range(0, 2, batch_size):
      yield {name: a[start : start + batch_size] for name, a in batch.items()}


@pytest.fixture(scope="session")
def text() -> Text:
  return Text()


@pytest.fixture(scope="session")
def model() -> decoder.Decoder:
  """A layer of attention and two scanned ones of Mamba-2, tied embeddings."""
  config = config_lib.DecoderConfig(
    vocab_size=40,
    embed_dim=16,
    num_layers=3,
    pattern=("attention", "mamba2", "mamba2"),
    mixer_options={
      "attention": {"num_heads": 2},
      "mamba2": {"head_dim": 16, "state_dim": 8, "chunk": 4},
    },
    max_len=64,
  )
  return decoder.Decoder(config)


@pytest.fixture(scope="session")
def params(model):
  """Random numbers of the right shapes, without compiling the initializers."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())
  return jax.tree.map(
    lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes["params"]
  )


@pytest.fixture(scope="session")
def specs(model):
  return specs_lib.specs(model)
