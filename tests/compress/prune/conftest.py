"""Two matrices and an embedding to prune."""

import jax.numpy as jnp
import pytest

from effjax.core import specs

SPECS = {
  "a": specs.ParamSpec(axes=("embed", "mlp"), kind="matrix"),
  "b": specs.ParamSpec(axes=("mlp", "embed"), kind="matrix"),
  "c": specs.ParamSpec(axes=("vocab", "embed"), kind="embedding"),
}


@pytest.fixture
def params(rng):
  make = lambda shape, std: jnp.asarray(std * rng.standard_normal(shape), jnp.float32)
  return {"a": make((16, 24), 1.0), "b": make((24, 8), 0.3), "c": make((9, 8), 1.0)}
