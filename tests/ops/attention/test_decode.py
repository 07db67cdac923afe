"""Attention over a cache: equal to the parallel form, and no copy of the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.attention import alibi, api, decode, patterns, reference, xla


def _inputs(rows, length, heads, groups, head_dim, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda n: jnp.asarray(
    rng.standard_normal((rows, length, n, head_dim)), jnp.float32
  )
  return draw(heads), draw(groups), draw(groups)


def _cache(x_BSGK, size, junk):
  """The keys or values as a cache of `size` slots, the unused ones filled with junk."""
  x_BGSK = x_BSGK.transpose(0, 2, 1, 3)
  pad = ((0, 0), (0, 0), (0, size - x_BGSK.shape[2]), (0, 0))
  return jnp.pad(x_BGSK, pad, constant_values=junk)


OPTIONS = {
  "causal": {},
  "window": {"pattern": patterns.Window(5), "logit_cap": 2.0},
  "longformer": {"pattern": patterns.Longformer(4, 2, causal=True)},
  "bigbird": {"pattern": patterns.BigBird(2, 1, 1, 1, causal=True)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1)])
def test_decode_equals_parallel_row_by_row(heads, groups, name):
  options = OPTIONS[name] | {"slopes_H": alibi.slopes(heads)}
  q, k, v = _inputs(2, 12, heads, groups, 8)
  v = v[..., :6]
  parallel = jax.jit(functools.partial(xla.attention, **options))(q, k, v)
  cache = _cache(k, 16, 7.0), _cache(v, 16, -9.0)
  step = jax.jit(lambda q, n: api.decode_attention(q, *cache, n, **options))
  for t in range(12):
    # The second sequence is two tokens behind the first.
    at = np.array([t, max(t - 2, 0)])
    y_BHK = step(q[np.arange(2), at], jnp.asarray(at + 1, jnp.int32))
    np.testing.assert_allclose(y_BHK, parallel[np.arange(2), at], atol=1e-5)


@pytest.mark.parametrize("many_pairs", [None, 1])
@pytest.mark.parametrize("name", ["causal", "window"])
def test_prefill_in_parts_equals_parallel(name, many_pairs, monkeypatch):
  """Also as it goes for prompts too long to hold their scores."""
  if many_pairs is not None:
    monkeypatch.setattr(decode, "_MANY_PAIRS", many_pairs)
  options = OPTIONS[name]
  q, k, v = _inputs(2, 12, 4, 2, 8)
  parallel = jax.jit(functools.partial(xla.attention, **options))(q, k, v)
  cache = _cache(k, 20, 7.0), _cache(v, 20, -9.0)
  prefill = jax.jit(functools.partial(api.cached_attention, **options))
  for start, stop in [(0, 5), (5, 12)]:
    positions = jnp.broadcast_to(jnp.arange(start, stop)[None], (2, stop - start))
    length = jnp.full((2,), stop, jnp.int32)
    y = prefill(q[:, start:stop], *cache, positions, length)
    np.testing.assert_allclose(y, parallel[:, start:stop], atol=1e-5)


def test_lengths_equal_reference():
  q, k, v = _inputs(3, 6, 4, 2, 8)
  length = jnp.asarray([6, 3, 0], jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(6)[None], (3, 6))
  cache = _cache(k, 9, 5.0), _cache(v, 9, 5.0)
  ours = jax.jit(api.cached_attention)(q, *cache, positions, length)
  theirs = jax.jit(reference.attention)(q, k, v, kv_lengths_B=length)
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert (np.asarray(ours[2]) == 0).all()
  empty = jax.jit(api.decode_attention)(q[:, 0], *cache, length)
  assert (np.asarray(empty[2]) == 0).all() and np.isfinite(np.asarray(empty)).all()


def test_gradients_equal_reference():
  q, k, v = _inputs(1, 5, 2, 1, 4)
  length = jnp.asarray([5], jnp.int32)
  positions = jnp.arange(5)[None]
  cached = lambda q, k, v: (
    api.cached_attention(q, _cache(k, 8, 0.0), _cache(v, 8, 0.0), positions, length)
    ** 2
  ).sum()
  plain = lambda q, k, v: (reference.attention(q, k, v) ** 2).sum()
  ours, theirs = (jax.jit(jax.grad(fn, (0, 1, 2)))(q, k, v) for fn in (cached, plain))
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 4), (8, 2), (8, 1)])
def test_a_step_neither_copies_nor_transposes_the_cache(dtype, heads, groups):
  rows, size, head_dim = 2, 512, 64
  cache = jax.ShapeDtypeStruct((rows, groups, size, head_dim), dtype)
  q = jax.ShapeDtypeStruct((rows, heads, head_dim), dtype)
  length = jax.ShapeDtypeStruct((rows,), jnp.int32)
  compiled = jax.jit(api.decode_attention).lower(q, cache, cache, length).compile()
  cache_bytes = 2 * cache.size * jnp.dtype(dtype).itemsize
  # Two arrays of float32 scores are the floor: with many query heads to a small kv
  # head they are more than a tenth of the cache.
  scores_bytes = rows * heads * size * 4
  limit = max(0.1 * cache_bytes, 2.1 * scores_bytes)
  assert compiled.memory_analysis().temp_size_in_bytes < limit
  assert limit < cache_bytes / 3
  entry = compiled.as_text().split("ENTRY")[1]
  whole = f"[{rows},{groups},{size},{head_dim}]"
  made = [line.split("=")[1] for line in entry.splitlines() if " = " in line]
  made = [m for m in made if whole in m.split("(")[0] and "parameter" not in m]
  assert not made


def test_bfloat16_cache_with_one_row_is_exact():
  q, k, v = _inputs(1, 6, 2, 2, 8)
  cache = [_cache(x, 8, 0.0).astype(jnp.bfloat16) for x in (k, v)]
  y = jax.jit(api.decode_attention)(q[:, -1], *cache, jnp.asarray([6], jnp.int32))
  assert y.dtype == jnp.float32 and y.shape == (1, 2, 8)
  theirs = jax.jit(reference.attention)(q, k, v)[:, -1]
  np.testing.assert_allclose(y, theirs, atol=3e-2)


def test_refuses_with_one_line():
  q, k, v = _inputs(1, 4, 4, 2, 4)
  with pytest.raises(errors.InputError, match="looks ahead: it cannot decode"):
    api.decode_attention(
      q[:, 0],
      _cache(k, 4, 0.0),
      _cache(v, 4, 0.0),
      jnp.asarray([4], jnp.int32),
      pattern=patterns.FULL,
    )
  q, k, v = _inputs(1, 4, 3, 2, 4)
  with pytest.raises(errors.InputError, match="3 query heads over a cache of 2"):
    api.decode_attention(
      q[:, 0], _cache(k, 4, 0.0), _cache(v, 4, 0.0), jnp.asarray([4], jnp.int32)
    )
