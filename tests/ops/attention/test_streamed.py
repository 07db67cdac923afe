"""Attention over a cache that is read block by block equals that over the whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import counting, errors
from effjax.ops import flops
from effjax.ops.attention import alibi, decode, patterns, streamed

ROWS, HEADS, GROUPS, DIM, VALUE_DIM, SLOTS = 3, 4, 2, 8, 6, 21
LENGTHS = jnp.array([17, 4, 0])


def _cache(seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  k = jax.random.normal(keys[0], (ROWS, GROUPS, SLOTS, DIM))
  v = jax.random.normal(keys[1], (ROWS, GROUPS, SLOTS, VALUE_DIM))
  return k, v


def _read(k, v):
  cut = lambda x, start, size: jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)
  return lambda start, size: (cut(k, start, size), cut(v, start, size))


def _queries(q_len):
  q = jax.random.normal(jax.random.key(5), (ROWS, q_len, HEADS, DIM))
  places = LENGTHS[:, None] - q_len + jnp.arange(q_len)[None]
  return q, places


EXTRAS = {
  "plain": {},
  "window": {"pattern": patterns.Window(5)},
  "all": {"slopes_H": alibi.slopes(HEADS), "logit_cap": 2.0, "scale": 0.5},
}


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("block", [4, 7, 512])
@pytest.mark.parametrize("q_len", [1, 3])
def test_equals_attention_over_the_whole_cache(extras, block, q_len):
  k, v = _cache()
  q, places = _queries(q_len)
  expected = decode.cached_attention(q, k, v, places, LENGTHS, **EXTRAS[extras])
  got = jax.jit(
    lambda k, v: streamed.attention(
      q, _read(k, v), GROUPS, SLOTS, places, LENGTHS, block=block, **EXTRAS[extras]
    )
  )(k, v)
  assert got.shape == (ROWS, q_len, HEADS, VALUE_DIM)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  assert (got[2] == 0).all()


def test_slots_in_any_order_hold_the_positions_that_are_given():
  k, v = _cache()
  q, places = _queries(1)
  order = jnp.asarray(np.random.default_rng(0).permutation(SLOTS))
  held = jnp.where(order[None] < LENGTHS[:, None], order[None], -1)
  expected = decode.cached_attention(q, k, v, places, LENGTHS)
  # All slots may be filled: none is skipped.
  full = jnp.full((ROWS,), SLOTS)
  got = streamed.attention(
    q,
    _read(k[:, :, order], v[:, :, order]),
    GROUPS,
    SLOTS,
    places,
    full,
    kv_positions_BS=held,
    block=4,
  )
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_slots_that_no_row_has_filled_are_not_read():
  k, v = _cache()
  q, places = _queries(1)
  spoiled = [x.at[:, :, 20:].set(jnp.nan) for x in (k, v)]
  run = lambda k, v: streamed.attention(
    q, _read(k, v), GROUPS, SLOTS, places, LENGTHS, block=5
  )
  np.testing.assert_array_equal(run(*spoiled), run(k, v))


def test_its_products_can_be_counted():
  k, v = _cache()
  q, places = _queries(1)
  run = lambda k, v: streamed.attention(
    q, _read(k, v), GROUPS, SLOTS, places, LENGTHS, block=7
  )
  assert flops.dot_flops(run, k, v) == 2 * ROWS * HEADS * SLOTS * (DIM + VALUE_DIM)
  with counting.counting():
    counted = run(k, v)
  np.testing.assert_allclose(counted, run(k, v), atol=1e-6)


def test_refuses_with_one_line():
  k, v = _cache()
  q, places = _queries(1)
  run = lambda q, **extras: streamed.attention(
    q, _read(k, v), GROUPS, SLOTS, places, LENGTHS, **extras
  )
  with pytest.raises(errors.InputError, match="3 query heads over a cache of 2 kv"):
    run(q[:, :, :3])
  with pytest.raises(errors.InputError, match="looks ahead"):
    run(q, pattern=patterns.Full())
