"""The GLA layer against its formulas in NumPy, and its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.nn.mixers import gla

BATCH, LENGTH, WIDTH, HEADS = 2, 11, 8, 2


@pytest.fixture(scope="module")
def layer():
  """Module, random parameters with decays of all strengths, and inputs."""
  module = gla.GLA(gla.GLAOptions(num_heads=HEADS, rank=3, chunk=4), WIDTH)
  x_BLD = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
  params = jax.jit(module.init)(jax.random.key(1), x_BLD, **_places())["params"]
  rng = np.random.default_rng(0)
  draw = lambda z: jnp.asarray(rng.standard_normal(z.shape), jnp.float32)
  params = jax.tree.map(draw, params)
  params["decay_bias"] = 20 * params["decay_bias"]
  return module, params, x_BLD


def _places():
  positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (BATCH, LENGTH))
  return dict(positions=positions, segments=jnp.ones((BATCH, LENGTH), jnp.int32))


def _numpy_layer(p, x):
  """The layer in NumPy, float64, token by token."""
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  heads = lambda name: (x @ p[name]).reshape(BATCH, LENGTH, HEADS, -1)
  q, k, v, gate = (heads(name) for name in ("q", "k", "v", "gate"))
  logits = x @ p["decay_down"] @ p["decay_up"] + p["decay_bias"]
  decay = (sigmoid(logits) ** (1 / 16)).reshape(q.shape)
  s, outputs = np.zeros((BATCH, HEADS, q.shape[-1], v.shape[-1])), []
  for t in range(LENGTH):
    s = decay[:, t, :, :, None] * s + k[:, t, :, :, None] * v[:, t, :, None, :]
    outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], s) / np.sqrt(q.shape[-1]))
  o = np.stack(outputs, 1)
  o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
  return (o * gate * sigmoid(gate)).reshape(BATCH, LENGTH, -1) @ p["o"]


def test_outputs_and_every_gradient_equal_numpy(layer):
  """Gradients along a random direction of each parameter, by central differences."""
  module, params, x_BLD = layer
  rng = np.random.default_rng(1)
  weights = rng.standard_normal((BATCH, LENGTH, WIDTH))
  wide = jax.tree.map(lambda z: np.asarray(z, np.float64), (params, x_BLD))

  def loss(params, x_BLD):
    y_BLD, _ = module.apply({"params": params}, x_BLD, **_places())
    return jnp.sum(y_BLD * weights), y_BLD

  grads, y_BLD = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x_BLD)
  _close(y_BLD, _numpy_layer(*wide), 1e-5)
  leaves, treedef = jax.tree.flatten(wide)
  for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
    direction = rng.standard_normal(leaf.shape)

    def shifted(step, i=i, leaf=leaf, direction=direction):
      moved = [*leaves[:i], leaf + step * direction, *leaves[i + 1 :]]
      return np.sum(_numpy_layer(*treedef.unflatten(moved)) * weights)

    wanted = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    _close(np.sum(np.asarray(grad, np.float64) * direction), wanted)


def _close(a, b, tolerance=1e-4):
  limit = tolerance * max(1.0, float(np.max(np.abs(b))))
  assert float(np.max(np.abs(np.asarray(a, np.float64) - b))) <= limit


def test_defaults_are_those_of_the_source():
  opts = gla.GLAOptions()
  assert opts.sizes(1024) == (128, 256) and opts.width(1024) == 1024
  module = gla.GLA(opts, 64)
  x_BLD = jnp.zeros((BATCH, LENGTH, 64))
  init = lambda: module.init(jax.random.key(0), x_BLD, **_places())
  shapes = jax.tree.map(lambda z: z.shape, jax.eval_shape(init)["params"])
  assert shapes == {
    "q": (64, 32),
    "k": (64, 32),
    "v": (64, 64),
    "gate": (64, 64),
    "decay_down": (64, 16),
    "decay_up": (16, 32),
    "decay_bias": (32,),
    "norm": {"scale": (16,)},
    "o": (64, 64),
  }


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(num_heads=0), "num_heads=0 must be positive"),
    (dict(decay_root=-1.0), "decay_root=-1.0 must be positive"),
    (dict(num_heads=3), "gla expand_k=0.5 of width 64 must be a multiple of its num_h"),
    (dict(head_dim=8, num_heads=3), "gla expand_v=1.0 of width 64 must be a multiple"),
  ],
)
def test_errors_name_the_field(options, message):
  with pytest.raises(errors.InputError, match=message):
    gla.GLAOptions(**options).width(64)


def test_it_says_what_it_cannot_do(layer):
  module, params, x_BLD = layer
  with pytest.raises(errors.InputError, match="gla is causal"):
    module.clone(causal=False).apply({"params": params}, x_BLD, **_places())
  with pytest.raises(errors.InputError, match="gla has no keys"):
    shared = (x_BLD, x_BLD)
    module.apply({"params": params}, x_BLD, **_places(), shared=shared)
