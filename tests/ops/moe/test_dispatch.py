"""Dispatches against the reference that computes all experts, for any routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.moe import dispatch, grouped, routing

T, E, K, D = 10, 4, 2, 3
VALID = jnp.asarray([1, 1, 0, 1, 1, 1, 1, 1, 0, 0], bool)
ROUTINGS = {
  "random": np.random.default_rng(0).permuted([[0, 1, 2, 3]] * T, axis=1)[:, :K],
  "one_expert_has_all": np.tile([2, 0], (T, 1)),
  "two_are_empty": np.tile([3, 1], (T, 1)),
}


def _inputs(experts):
  rng = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return normal(T, D), jnp.abs(normal(T, K)), normal(E, D, D), jnp.asarray(experts)


def _routed(experts, weights):
  return routing.Routing(experts, weights, jnp.full((T, E), 1 / E))


def _reference(x_TD, weights_TK, w_EDD, experts):
  expert_fn = lambda x_ETD: jnp.tanh(jnp.einsum("etd,edf->etf", x_ETD, w_EDD))
  return dispatch.all_experts(x_TD, _routed(experts, weights_TK), E, expert_fn)


def _dropless(x_TD, weights_TK, w_EDD, experts, valid=None):
  places = dispatch.sorted_places(experts, E, valid)
  rows = dispatch.to_rows(x_TD, places)
  y = jnp.tanh(grouped.grouped_matmul(rows, w_EDD, places.group_sizes_E, block=4))
  return dispatch.from_rows(y, weights_TK, places)


def _capacity(x_TD, weights_TK, w_EDD, experts, valid=None, capacity=T):
  places = dispatch.capacity_places(experts, E, capacity, valid)
  rows = dispatch.to_rows(x_TD, places).reshape(E, capacity, D)
  y = jnp.tanh(jnp.einsum("ecd,edf->ecf", rows, w_EDD))
  return dispatch.from_rows(y.reshape(-1, D), weights_TK, places)


@pytest.mark.parametrize("fast", [_dropless, _capacity])
@pytest.mark.parametrize("experts", ROUTINGS.values(), ids=ROUTINGS)
def test_equals_the_reference_with_every_gradient(fast, experts):
  *arrays, experts = _inputs(experts)
  probe = jax.random.normal(jax.random.key(0), (T, D))

  def run(fn):
    loss = lambda *a: jnp.sum(fn(*a, experts) * probe)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
    run(fast),
    run(_reference),
  )


@pytest.mark.parametrize("fast", [_dropless, _capacity])
def test_padding_takes_no_rows_and_changes_nothing(fast):
  x_TD, weights_TK, w_EDD, experts = _inputs(ROUTINGS["random"])
  whole = fast(x_TD, weights_TK, w_EDD, experts)
  masked = fast(x_TD, weights_TK, w_EDD, experts, valid=VALID)
  np.testing.assert_allclose(masked[VALID], whole[VALID], atol=1e-6)
  assert jnp.all(masked[~VALID] == 0)


@pytest.mark.parametrize("valid", [None, VALID])
def test_permuting_and_back_gives_every_token_as_often_as_it_was_chosen(valid):
  x_TD, _, _, experts = _inputs(ROUTINGS["random"])
  ones = jnp.ones((T, K))
  times = K if valid is None else K * valid[:, None]
  for places in (
    dispatch.sorted_places(experts, E, valid),
    dispatch.capacity_places(experts, E, T, valid),
  ):
    back = dispatch.from_rows(dispatch.to_rows(x_TD, places), ones, places)
    np.testing.assert_allclose(back, times * x_TD, rtol=1e-6)


def test_first_choices_come_before_second_ones_and_earlier_tokens_first():
  # Experts 0 and 1 are wanted by all; there is room for 3 rows each.
  experts = jnp.asarray([[0, 1], [0, 1], [1, 0], [0, 1], [0, 1]])
  places = dispatch.capacity_places(experts, 2, 3)
  kept = places.row_of_pair_TK < 6
  assert kept.tolist() == [
    [True, True],
    [True, True],
    [True, False],
    [True, False],
    [False, False],
  ]


def test_sizes_are_counts_and_rows_are_in_order():
  experts = jnp.asarray(ROUTINGS["random"])
  places = dispatch.sorted_places(experts, E, VALID)
  counts = routing.counts(experts, E, VALID)
  assert places.group_sizes_E.tolist() == counts.astype(int).tolist()
  num_rows = int(counts.sum())
  pairs = np.asarray(places.pair_of_row_N)
  assert np.all(pairs[num_rows:] == T * K)
  assert np.all(np.diff(np.asarray(experts).reshape(-1)[pairs[:num_rows]]) >= 0)


def test_expert_choice_equals_its_definition(rng):
  x_TD, _, w_EDD, _ = _inputs(ROUTINGS["random"])
  logits = jnp.asarray(rng.standard_normal((T, E)), jnp.float32)
  chosen = routing.expert_choice(logits, 3, VALID)
  expert_fn = lambda x_ECD: jnp.tanh(jnp.einsum("ecd,edf->ecf", x_ECD, w_EDD))
  found = dispatch.chosen_tokens(x_TD, chosen, expert_fn)
  expected = np.zeros((T, D))
  for e in range(E):
    for token, weight in zip(*(a[e] for a in chosen[:2]), strict=True):
      expected[token] += float(weight) * np.tanh(np.asarray(x_TD[token] @ w_EDD[e]))
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("tokens", "k", "experts", "factor", "rows"),
  [(64, 1, 8, 1.25, 12), (64, 2, 8, 1.0, 16), (4, 2, 2, 8.0, 4), (64, 1, 64, 0.1, 4)],
)
def test_rows_of_capacity(tokens, k, experts, factor, rows):
  assert dispatch.rows_of_capacity(tokens, k, experts, factor) == rows
