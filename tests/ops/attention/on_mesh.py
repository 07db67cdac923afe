"""What the tests of attention over several devices share."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import shard
from effjax.ops.attention import api, reference
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules

# Documents that begin and end anywhere, with padding behind and between them.
PACKED = np.repeat([[1, 2, 0, 4, 0], [3, 3, 3, 1, 1]], [5, 9, 3, 11, 4], axis=1)
LENGTH = PACKED.shape[1]


@contextlib.contextmanager
def active(preset, **shape):
  """The rules of a preset on a mesh of a shape."""
  mesh = mesh_lib.make(mesh_lib.MeshConfig(preset=preset, shape=shape))
  with shard.use_rules(mesh, rules.find(preset).activations):
    yield mesh


def inputs(heads=4, groups=2, head_dim=8, value_dim=6, length=LENGTH, rows=2):
  rng = np.random.default_rng(0)
  shapes = ((rows, length, n, head_dim) for n in (heads, groups))
  shapes = (*shapes, (rows, length, groups, value_dim))
  return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def outputs_and_gradients(fn, arrays, segments=None, **options):
  """y, dq, dk and dv of a weighted sum of the outputs."""
  if segments is not None:
    segments = jnp.asarray(segments, jnp.int32)
  shape = (*arrays[0].shape[:3], arrays[2].shape[3])
  probe = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)

  def loss(arrays, segments):
    y = fn(*arrays, q_segments_BL=segments, kv_segments_BS=segments, **options)
    return (y.astype(jnp.float32) * probe).sum(), y

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, y), gradients = run(arrays, segments)
  return [np.asarray(x, np.float32) for x in (y, *gradients)]


def close(got, expected, tolerance=1e-5):
  for a, b in zip(got, expected, strict=True):
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


@functools.cache
def _expected(sizes, packed, options):
  segments = PACKED if packed else None
  arrays = inputs(**dict(sizes))
  return outputs_and_gradients(reference.attention, arrays, segments, **dict(options))


def check(preset, shape, sizes=None, packed=True, **options):
  """That `api.attention` on the mesh equals the naive form on one device."""
  sizes, segments = sizes or {}, PACKED if packed else None
  key = {k: v for k, v in options.items() if k != "slopes_H"}
  if "slopes_H" in options:
    expected = outputs_and_gradients(
      reference.attention, inputs(**sizes), segments, **options
    )
  else:
    expected = _expected(tuple(sizes.items()), packed, tuple(key.items()))
  with active(preset, **shape):
    got = outputs_and_gradients(api.attention, inputs(**sizes), segments, **options)
  close(got, expected)
  if packed:
    for x in got:
      assert (x[PACKED == 0] == 0).all()
  return got
