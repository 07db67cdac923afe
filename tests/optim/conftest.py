"""A small tree with every kind of parameter, stacked ones among them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import specs as specs_lib


def make_spec(kind, axes, shape, head_dim=None):
  """A complete spec; axes beyond `axes` are stacked layers."""
  return specs_lib.ParamSpec(
    kind=kind,
    axes=axes,
    stack=("layers",) * (len(shape) - len(axes)),
    instances=axes,
    shape=shape,
    head_dim=head_dim,
  )


def random_like(specs, seed, scale=1.0):
  """Random float32 parameters, or gradients, for a tree of specs."""
  rng = np.random.default_rng(seed)
  draw = lambda spec: jnp.asarray(scale * rng.normal(size=spec.shape), jnp.float32)
  return jax.tree.map(draw, specs)


@pytest.fixture(scope="session")
def toy():
  """Specs of an embedding and three stacked layers, and ways to fill such trees."""
  layer = {
    "q": make_spec("matrix", ("embed", "heads"), (3, 8, 16), head_dim=4),
    "o": make_spec("matrix", ("heads", "embed"), (3, 16, 8), head_dim=4),
    "conv": make_spec("conv", ("tap", "inner"), (3, 4, 8)),
    "norm": make_spec("norm", ("embed",), (3, 8)),
    "bias": make_spec("bias", ("inner",), (3, 8)),
    "a_log": make_spec("ssm", ("inner",), (3, 8)),
  }
  specs = {
    "embed": {"table": make_spec("embedding", ("vocab", "embed"), (16, 8))},
    "run_0": {"layer_0": layer},
  }
  return types.SimpleNamespace(
    specs=specs, make_spec=make_spec, random_like=random_like
  )
