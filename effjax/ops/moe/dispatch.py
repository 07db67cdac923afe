"""From tokens to rows of experts and back: with dropping, without, and all of them.

A dispatch lays the chosen (token, expert) pairs out as rows, expert after expert, the
experts multiply their rows, and the weighted results are added up for each token. Two
layouts: `sorted_places` holds every pair in groups of any size (dropless, Gale et al.
2022, arXiv:2211.15841), `capacity_places` gives every expert C rows and drops what does
not fit (Lepikhin et al. 2020, arXiv:2006.16668; first choices of all tokens come before
second ones, as there). Neither costs more with more experts: pairs are sorted, not
compared with every expert. `all_experts` is the reference: every expert for every
token, with a weight of 0 where it was not chosen.

Moving rows is a gather in both directions, written as such: XLA would derive scattered
additions, which its CPU backend runs one element after another.

Letters: K experts a token, C rows of an expert, N rows in all, P = T * K pairs.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax.ops.moe import routing


class Places(NamedTuple):
  """Where the rows of each pair lie.

  Attributes:
    pair_of_row_N: int32, which pair `t * K + k` a row holds; P where it holds none.
    row_of_pair_TK: int32, where each pair went; N where it was dropped.
    group_sizes_E: int32, rows of each expert; all others are past them.
  """

  pair_of_row_N: jax.Array
  row_of_pair_TK: jax.Array
  group_sizes_E: jax.Array


def sorted_places(
  experts_TK: jax.Array, num_experts: int, valid_T: jax.Array | None = None
) -> Places:
  """Every pair of a valid token, sorted by expert: N = T * K.

  Args:
    experts_TK: chosen experts.
    num_experts: E.
    valid_T: whether each token is real; padding gets no rows.
  """
  num_pairs = experts_TK.size
  if valid_T is not None:
    experts_TK = jnp.where(valid_T[:, None], experts_TK, num_experts)
  sorted_P, order_P = _sorted(experts_TK.reshape(-1))
  starts_E = jnp.searchsorted(sorted_P, jnp.arange(num_experts + 1)).astype(jnp.int32)
  index_P = jnp.arange(num_pairs, dtype=jnp.int32)
  row_P = jnp.zeros(num_pairs, jnp.int32).at[order_P].set(index_P, unique_indices=True)
  row_P = jnp.where(row_P < starts_E[-1], row_P, num_pairs)
  pair_N = jnp.where(index_P < starts_E[-1], order_P, num_pairs)
  return Places(pair_N, row_P.reshape(experts_TK.shape), jnp.diff(starts_E))


def capacity_places(
  experts_TK: jax.Array,
  num_experts: int,
  capacity: int,
  valid_T: jax.Array | None = None,
) -> Places:
  """At most `capacity` pairs an expert, which has rows `e * C ...`: N = E * C.

  Args:
    experts_TK: chosen experts, best first.
    num_experts: E.
    capacity: C, see `rows_of_capacity`.
    valid_T: whether each token is real; padding takes no room.
  """
  num_tokens, k = experts_TK.shape
  num_pairs, num_rows = num_tokens * k, num_experts * capacity
  # Choice by choice, so that no second choice takes the place of a first one.
  if valid_T is not None:
    experts_TK = jnp.where(valid_T[:, None], experts_TK, num_experts)
  sorted_P, order_P = _sorted(experts_TK.T.reshape(-1))
  pair_P = (order_P % num_tokens) * k + order_P // num_tokens
  starts_E = jnp.searchsorted(sorted_P, jnp.arange(num_experts)).astype(jnp.int32)
  expert_P = jnp.minimum(sorted_P, num_experts - 1)
  rank_P = jnp.arange(num_pairs, dtype=jnp.int32) - starts_E[expert_P]
  fits_P = (rank_P < capacity) & (sorted_P < num_experts)
  row_P = jnp.where(fits_P, expert_P * capacity + rank_P, num_rows)
  pair_N = jnp.full(num_rows, num_pairs, jnp.int32)
  pair_N = pair_N.at[row_P].set(pair_P, mode="drop")
  row_of_pair = jnp.full(num_pairs, num_rows, jnp.int32).at[pair_P].set(row_P)
  sizes_E = jnp.full(num_experts, capacity, jnp.int32)
  return Places(pair_N, row_of_pair.reshape(num_tokens, k), sizes_E)


def _sorted(experts_P: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Experts in order (padding, expert number E, is last), and the order (stable)."""
  experts_P = experts_P.astype(jnp.int32)
  order_P = jnp.argsort(experts_P, stable=True).astype(jnp.int32)
  return experts_P[order_P], order_P


def rows_of_capacity(num_tokens: int, k: int, num_experts: int, factor: float) -> int:
  """C: `factor` times an even share of the pairs, rounded up to a multiple of 4.

  Source: Riquelme et al. 2021, arXiv:2106.05974, eq. 2, and the authors' code for the
  rounding. Never more than all tokens: an expert is no token's choice twice.
  """
  rows = math.ceil(factor * num_tokens * k / num_experts)
  return min(-(-rows // 4) * 4, num_tokens)


@jax.custom_vjp
def to_rows(x_TD: jax.Array, places: Places) -> jax.Array:
  """The token of each row, `[N, D]`; zeros in rows that hold none."""
  k = places.row_of_pair_TK.shape[1]
  return _taken(x_TD, places.pair_of_row_N // k)


def _to_rows_forward(x_TD: jax.Array, places: Places) -> tuple[jax.Array, Any]:
  return to_rows(x_TD, places), places


def _to_rows_backward(places: Places, drows_ND: jax.Array) -> tuple[jax.Array, None]:
  dpairs_TKD = _taken(drows_ND, places.row_of_pair_TK)
  return jnp.sum(dpairs_TKD, axis=1), None


to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def from_rows(y_ND: jax.Array, weights_TK: jax.Array, places: Places) -> jax.Array:
  """The weighted sum of each token's rows, `[T, D]` in the dtype of y."""
  pairs_TKD = _taken(y_ND, places.row_of_pair_TK)
  return jnp.einsum("tkd,tk->td", pairs_TKD, weights_TK.astype(y_ND.dtype))


def _from_rows_forward(
  y_ND: jax.Array, weights_TK: jax.Array, places: Places
) -> tuple[jax.Array, Any]:
  return from_rows(y_ND, weights_TK, places), (y_ND, weights_TK, places)


def _from_rows_backward(
  residuals: tuple[Any, ...], dy_TD: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  y_ND, weights_TK, places = residuals
  k = weights_TK.shape[1]
  weight_N = _taken(weights_TK.reshape(-1), places.pair_of_row_N).astype(dy_TD.dtype)
  drows_ND = weight_N[:, None] * _taken(dy_TD, places.pair_of_row_N // k)
  pairs_TKD = _taken(y_ND, places.row_of_pair_TK)
  dweights_TK = jnp.einsum(
    "tkd,td->tk", pairs_TKD, dy_TD, preferred_element_type=jnp.float32
  )
  return drows_ND, dweights_TK.astype(weights_TK.dtype), None


from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def _taken(rows: jax.Array, index: jax.Array) -> jax.Array:
  """`rows[index]`, zeros where the index is past the end."""
  return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def all_experts(
  x_TD: jax.Array,
  routed: routing.Routing,
  num_experts: int,
  expert_fn: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Reference: `sum_e g_te expert_e(x_t)` with g_te = 0 unless e was chosen.

  Args:
    x_TD: tokens.
    routed: what the router decided.
    num_experts: E.
    expert_fn: all experts on rows of their own, `[E, T, D] -> [E, T, D]`.
  """
  chosen_TKE = routed.experts_TK[:, :, None] == jnp.arange(num_experts)[None, None]
  gates_TE = jnp.einsum("tke,tk->te", chosen_TKE, routed.weights_TK)
  y_ETD = expert_fn(jnp.broadcast_to(x_TD[None], (num_experts, *x_TD.shape)))
  return jnp.einsum("etd,te->td", y_ETD, gates_TE.astype(y_ETD.dtype))


def chosen_tokens(
  x_TD: jax.Array,
  chosen: routing.ExpertChoice,
  expert_fn: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Expert choice: every expert on the tokens it took, added up for each token.

  Args:
    x_TD: tokens.
    chosen: what the experts chose.
    expert_fn: all experts on rows of their own, `[E, C, D] -> [E, C, D]`.
  """
  y_ECD = expert_fn(x_TD[chosen.tokens_EC])
  y_ECD = y_ECD * chosen.weights_EC[:, :, None].astype(y_ECD.dtype)
  return jnp.zeros_like(x_TD).at[chosen.tokens_EC].add(y_ECD)
