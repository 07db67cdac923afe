"""Absorbed attention equals attention over keys and values that are written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.attention import latent

NUM_HEADS, HEAD_DIM, ROPE_DIM, VALUE_DIM, RANK, CAPACITY = 3, 4, 2, 5, 6, 10


def _inputs(num_heads, num_queries):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return {
    "q_BLHK": normal(2, num_queries, num_heads, HEAD_DIM),
    "q_rope_BLHJ": normal(2, num_queries, num_heads, ROPE_DIM),
    "c_BSR": normal(2, CAPACITY, RANK),
    "k_rope_BSJ": normal(2, CAPACITY, ROPE_DIM),
    "k_up_RI": normal(RANK, num_heads * HEAD_DIM),
    "v_up_RI": normal(RANK, num_heads * VALUE_DIM),
  }


def _expanded(x, slots_BL, length_B, scale):
  """In float64: every key and value of every head, one query at a time."""
  x = {name: value.astype(np.float64) for name, value in x.items()}
  _, num_queries, num_heads, _ = x["q_BLHK"].shape
  y_BLHP = np.zeros((2, num_queries, num_heads, VALUE_DIM))
  for b, n, h in np.ndindex(2, num_queries, num_heads):
    seen = min(slots_BL[b, n] + 1, length_B[b])
    if seen <= 0:
      continue
    c_SR = x["c_BSR"][b, :seen]
    k_SK = c_SR @ x["k_up_RI"].reshape(RANK, num_heads, -1)[:, h]
    v_SP = c_SR @ x["v_up_RI"].reshape(RANK, num_heads, -1)[:, h]
    s_S = k_SK @ x["q_BLHK"][b, n, h]
    s_S += x["k_rope_BSJ"][b, :seen] @ x["q_rope_BLHJ"][b, n, h]
    e_S = np.exp(scale * (s_S - s_S.max()))
    y_BLHP[b, n, h] = e_S / e_S.sum() @ v_SP
  return y_BLHP


@pytest.mark.parametrize("block", [2, 128])
def test_equals_expanded_keys_and_values(block, monkeypatch):
  monkeypatch.setattr(latent, "_BLOCK", block)
  x = _inputs(NUM_HEADS, 3)
  slots_BL, length_B = np.array([[6, 7, 8], [-1, 0, 1]]), np.array([8, 2])
  given = {name: jnp.asarray(value) for name, value in x.items()}
  # What lies behind the valid slots does not matter.
  given["c_BSR"] = given["c_BSR"].at[0, 8:].set(1e4)
  ours = latent.absorbed_attention(
    **given, q_slots_BL=jnp.asarray(slots_BL), length_B=jnp.asarray(length_B), scale=0.4
  )
  expected = _expanded(x, slots_BL, length_B, 0.4)
  np.testing.assert_allclose(ours, expected, atol=1e-5 * max(1, np.abs(expected).max()))
  assert not np.any(ours[1, 0])


@pytest.mark.parametrize("num_heads", [1, 2])
def test_one_query_over_a_bfloat16_cache(num_heads):
  x = {k: jnp.asarray(v, jnp.bfloat16) for k, v in _inputs(num_heads, 1).items()}
  slots_BL, length_B = np.array([[6], [9]]), np.array([7, 10])
  ours = latent.absorbed_attention(
    **x, q_slots_BL=jnp.asarray(slots_BL), length_B=jnp.asarray(length_B), scale=0.4
  )
  assert ours.dtype == jnp.bfloat16
  expected = _expanded(
    {k: np.asarray(v) for k, v in x.items()}, slots_BL, length_B, 0.4
  )
  # Queries, weights and latents are rounded to 8 bits on the way.
  np.testing.assert_allclose(
    ours.astype(jnp.float32), expected, atol=0.03 * max(1, np.abs(expected).max())
  )
