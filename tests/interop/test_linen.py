"""Specs of a user's own Linen model, and compressed trees that it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import effjax
from effjax.core import errors
from effjax.core import tree as tree_lib


class Block(nn.Module):
  """One layer of a small Transformer, as somebody else would write it."""

  @nn.compact
  def __call__(self, x, _):
    x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
    return x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.RMSNorm()(x)))), None


class Model(nn.Module):
  """An embedding, scanned blocks, a convolution, and a parameter of its own."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(32, 16)(tokens)
    blocks = nn.scan(
      Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    x, _ = blocks(name="blocks")(x, None)
    gain = self.param("gain", nn.initializers.ones, (16,))
    x = nn.Conv(16, (3,))(x) * gain[None, None]
    x = x @ self.param("mix", nn.initializers.orthogonal(), (16, 16))
    return nn.Dense(32)(x)


TOKENS = jnp.arange(12).reshape(2, 6) % 32


@pytest.fixture(scope="module")
def made():
  model = Model()
  params = model.init(jax.random.key(0), TOKENS)["params"]
  return model, params, effjax.specs_from_linen(model, TOKENS)


def test_kinds_and_shapes(made):
  _, params, specs = made
  flat = tree_lib.flatten(specs)
  assert flat.keys() == tree_lib.flatten(params).keys()
  kinds = {path: spec.kind for path, spec in flat.items()}
  attention = "blocks/MultiHeadDotProductAttention_0"
  assert kinds["Embed_0/embedding"] == "embedding"
  assert kinds["Conv_0/kernel"] == "conv"
  assert kinds["blocks/LayerNorm_0/scale"] == kinds["blocks/LayerNorm_0/bias"] == "norm"
  assert kinds["blocks/RMSNorm_0/scale"] == "norm"
  assert kinds["gain"] == "bias"
  assert kinds["mix"] == "ssm"
  matrices = {path for path, kind in kinds.items() if kind == "matrix"}
  assert matrices == {
    "Dense_0/kernel",
    *(f"blocks/Dense_{i}/kernel" for i in range(2)),
    *(f"{attention}/{name}/kernel" for name in ("query", "key", "value", "out")),
  }
  # Four heads of 4 count as one axis of 16, on whichever side they are.
  assert flat[f"{attention}/query/kernel"].shape == (3, 16, 16)
  assert flat[f"{attention}/out/kernel"].shape == (3, 16, 16)
  assert flat[f"{attention}/out/kernel"].stack == ("layers",)
  for path, spec in flat.items():
    assert len(spec.shape) == len(spec.stack) + len(spec.axes), path


def test_a_quantized_tree_runs_in_the_model(made):
  model, params, specs = made
  int8 = effjax.transform("rtn", params, specs)
  found = effjax.sizes(int8, specs)
  plain = effjax.sizes(params, specs)
  assert found["bytes_held"] < 0.5 * plain["bytes_held"]
  assert found["simulated"] == plain["simulated"] == []
  simulated = effjax.simulate(int8, like=params)
  jax.tree.map(
    lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
    dict(simulated),
    params,
  )
  y, y8 = (model.apply({"params": p}, TOKENS) for p in (params, simulated))
  error = float(jnp.abs(y - y8).max())
  assert 0 < error < 0.1 * float(jnp.std(y))
  assert effjax.sizes(simulated, specs)["simulated"] == ["bytes", "flops"]


def test_the_mark_survives_jax(made):
  model, params, specs = made
  simulated = effjax.simulate(effjax.transform("rtn", params, specs), like=params)
  doubled = jax.tree.map(lambda a: 2 * a, simulated)
  assert effjax.sizes(doubled, specs)["simulated"] == ["bytes", "flops"]
  y = jax.jit(lambda p: model.apply({"params": p}, TOKENS))(simulated)
  np.testing.assert_allclose(y, model.apply({"params": simulated}, TOKENS), atol=1e-5)


def test_values_are_those_of_the_leaves(made):
  _, params, specs = made
  int4 = effjax.transform("rtn", params, specs, options={"bits": 4, "group": 8})
  name = "blocks/MultiHeadDotProductAttention_0/query/kernel"
  leaf = tree_lib.flatten(int4)[name]
  array = tree_lib.flatten(effjax.simulate(int4, like=params))[name]
  np.testing.assert_array_equal(array, leaf.dense().reshape(array.shape))


def test_wrapped_parameters_are_refused():
  class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
      init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
      return nn.Dense(4, kernel_init=init)(x)

  with pytest.raises(errors.InputError, match="Dense_0/kernel is wrapped"):
    effjax.specs_from_linen(Partitioned(), jnp.ones((1, 3)))
