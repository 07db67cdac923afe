"""The DeltaNet layer against Qwen3-Next without decay, and its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.nn.mixers import deltanet
from tests.nn.mixers import test_gated_deltanet as gated

BATCH, LENGTH, WIDTH, HEADS = 2, 11, 8, 2


def _places():
  positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (BATCH, LENGTH))
  return dict(positions=positions, segments=jnp.ones((BATCH, LENGTH), jnp.int32))


@pytest.mark.oracle
def test_with_gate_equals_qwen3_next_that_never_forgets():
  """exp(A_log) = 0 there turns Gated DeltaNet into DeltaNet with an output gate."""
  state, run = gated.make_qwen(gated.KEYS, decays=False)
  opts = deltanet.DeltaNetOptions(
    num_heads=gated.KEYS,
    head_dim=gated.KEY_DIM,
    value_dim=gated.VALUE_DIM,
    chunk=5,
    output_gate=True,
  )
  rates = ("dt", "dt_bias", "a_log")

  def mapping(state):
    params = gated.from_qwen(state, gated.KEYS)
    return {name: value for name, value in params.items() if name not in rates}

  gated.compare(deltanet.DeltaNet(opts, gated.WIDTH), mapping(state), mapping, run)


def _numpy_layer(p, x):
  """The layer in NumPy, float64, token by token; beta in 0 to 2."""
  sigmoid = lambda z: 1 / (1 + np.exp(-z))

  def stream(name):
    y = np.pad(x @ p[name], ((0, 0), (3, 0), (0, 0)))
    y = sum(y[:, i : i + LENGTH] * p[f"conv_{name}"][i] for i in range(4))
    return (y * sigmoid(y)).reshape(BATCH, LENGTH, HEADS, -1)

  unit = lambda z: z / np.sqrt(np.sum(z**2, axis=-1, keepdims=True) + 1e-6)
  q, k, v = unit(stream("q")), unit(stream("k")), stream("v")
  beta = 2 * sigmoid(x @ p["beta"])
  s, outputs = np.zeros((BATCH, HEADS, q.shape[-1], v.shape[-1])), []
  for t in range(LENGTH):
    error = v[:, t] - np.einsum("bhkv,bhk->bhv", s, k[:, t])
    s = s + np.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error)
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], s) / np.sqrt(q.shape[-1]))
  o = np.stack(outputs, 1)
  o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
  return o.reshape(BATCH, LENGTH, -1) @ p["o"]


def test_outputs_and_every_gradient_equal_numpy():
  """Gradients along a random direction of each parameter, by central differences."""
  opts = deltanet.DeltaNetOptions(num_heads=HEADS, chunk=4, allow_neg_eigval=True)
  module = deltanet.DeltaNet(opts, WIDTH)
  rng = np.random.default_rng(1)
  x, weights = rng.standard_normal((2, BATCH, LENGTH, WIDTH)).astype(np.float32)
  params = jax.jit(module.init)(jax.random.key(1), x, **_places())["params"]
  draw = lambda z: jnp.asarray(rng.standard_normal(z.shape), jnp.float32)
  params = jax.tree.map(draw, params)
  wide = jax.tree.map(lambda z: np.asarray(z, np.float64), (params, x))

  def loss(params, x_BLD):
    y_BLD, _ = module.apply({"params": params}, x_BLD, **_places())
    return jnp.sum(y_BLD * weights), y_BLD

  grads, y_BLD = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
  gated.close(y_BLD, _numpy_layer(*wide), "outputs", 1e-5)
  leaves, treedef = jax.tree.flatten(wide)
  for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
    direction = rng.standard_normal(leaf.shape)

    def shifted(step, i=i, leaf=leaf, direction=direction):
      moved = [*leaves[:i], leaf + step * direction, *leaves[i + 1 :]]
      return np.sum(_numpy_layer(*treedef.unflatten(moved)) * weights)

    wanted = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    gated.close(np.sum(np.asarray(grad, np.float64) * direction), wanted, i)


def test_defaults_are_those_of_the_source():
  opts = deltanet.DeltaNetOptions()
  assert opts.sizes(1024) == (256, 256) and opts.width(1024) == 1024
  module = deltanet.DeltaNet(opts, 64)
  x_BLD = jnp.zeros((BATCH, LENGTH, 64))
  init = lambda: module.init(jax.random.key(0), x_BLD, **_places())
  shapes = jax.tree.map(lambda z: z.shape, jax.eval_shape(init)["params"])
  streams = {name: (64, 64) for name in "qkv"}
  convs = {f"conv_{name}": (4, 64) for name in "qkv"}
  rest = {"beta": (64, 4), "norm": {"scale": (16,)}, "o": (64, 64)}
  assert shapes == streams | convs | rest


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(chunk=0), "chunk=0 must be positive"),
    (dict(conv_taps=1), "conv_taps=1 must be at least 2"),
    (dict(num_heads=3), "deltanet expand_k=1.0 of width 64 must be a multiple of its"),
  ],
)
def test_errors_name_the_field(options, message):
  with pytest.raises(errors.InputError, match=message):
    deltanet.DeltaNetOptions(**options).width(64)
