"""One small hybrid decoder, shared by the tests of models and of what runs them."""

import jax
import pytest

from effjax.models import config, decoder


def small_config(**changes):
  values = {
    "vocab_size": 64,
    "embed_dim": 32,
    "num_layers": 4,
    "pattern": ("mamba2", "attention"),
    "mixer_options": {
      "mamba2": {"head_dim": 16, "state_dim": 8, "chunk": 4},
      "attention": {"head_dim": 8},
    },
    "max_len": 32,
  }
  return config.DecoderConfig(**(values | changes))


@pytest.fixture(scope="session")
def small():
  """`(model, params, tokens_BL)`."""
  model = decoder.Decoder(small_config())
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 12), 0, 64)
  return model, jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"], tokens_BL
