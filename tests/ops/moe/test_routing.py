"""Routers against their definitions, balancing against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.moe import routing

T, E = 12, 6
VALID = jnp.arange(T) < 9


@pytest.fixture
def logits(rng):
  return jnp.asarray(rng.standard_normal((T, E)), jnp.float32)


def test_switch_takes_the_most_probable_expert(logits):
  routed = routing.switch(logits)
  probabilities = jax.nn.softmax(logits)
  assert routed.experts_TK[:, 0].tolist() == jnp.argmax(logits, axis=1).tolist()
  np.testing.assert_allclose(routed.weights_TK[:, 0], jnp.max(probabilities, axis=1))


def test_renormalized_top_k_is_the_softmax_of_the_chosen_logits(logits):
  routed = routing.top_k(logits, 2)
  chosen = jnp.take_along_axis(logits, routed.experts_TK, axis=1)
  np.testing.assert_allclose(routed.weights_TK, jax.nn.softmax(chosen), rtol=1e-5)


def test_the_bias_changes_the_choice_and_not_the_weights(logits):
  bias = jnp.zeros(E).at[3].set(10.0)
  routed = routing.sigmoid(logits, bias, 2, renormalize=False, scale=2.5)
  assert jnp.all(routed.experts_TK[:, 0] == 3)
  np.testing.assert_allclose(
    routed.weights_TK[:, 0], 2.5 * jax.nn.sigmoid(logits[:, 3]), rtol=1e-6
  )
  gradient = jax.grad(
    lambda bias: jnp.sum(routing.sigmoid(logits, bias, 2).weights_TK ** 2)
  )(bias)
  assert jnp.all(gradient == 0)


def test_groups_limit_the_choice(logits):
  routed = routing.sigmoid(logits, jnp.zeros(E), 2, num_groups=3, top_groups=1)
  scores = np.asarray(jax.nn.sigmoid(logits)).reshape(T, 3, 2)
  best = scores.sum(axis=2).argmax(axis=1)
  groups = np.asarray(routed.experts_TK) // 2
  assert np.array_equal(groups, np.stack([best, best], axis=1))


def test_expert_choice_fills_every_expert_and_takes_padding_last(logits):
  chosen = routing.expert_choice(logits, 4, VALID)
  assert chosen.tokens_EC.shape == (E, 4)
  assert jnp.all(VALID[chosen.tokens_EC])
  probabilities = jnp.where(VALID[:, None], jax.nn.softmax(logits), 0)
  expected = -jnp.sort(-probabilities.T, axis=1)[:, :4]
  np.testing.assert_allclose(chosen.weights_EC, expected, rtol=1e-6)
  full = routing.expert_choice(logits, T, VALID)
  assert jnp.sum(full.weights_EC == 0) == E * 3


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balancing_loss_is_k_at_uniform_routing(k):
  experts = jnp.asarray([[(t + j) % E for j in range(k)] for t in range(T)])
  valid = jnp.ones(T, bool)
  counts = routing.counts(experts, E, valid)
  loss = routing.balancing_loss(jnp.full((T, E), 1 / E), counts, valid)
  assert float(loss) == pytest.approx(k, abs=1e-6)


def test_balancing_loss_pushes_the_busy_expert_down(logits):
  skewed = logits.at[:, 0].add(3.0)

  def loss(logits):
    routed = routing.top_k(logits, 1)
    counts = routing.counts(routed.experts_TK, E, VALID)
    return routing.balancing_loss(routed.probabilities_TE, counts, VALID)

  assert float(loss(skewed)) > 1.5
  gradient = jax.grad(loss)(skewed)
  assert jnp.all(gradient[:9, 0] > 0)
  assert jnp.all(gradient[9:] == 0)


def test_z_loss_is_the_mean_squared_normalizer(logits):
  expected = np.mean(np.log(np.exp(np.asarray(logits[:9])).sum(axis=1)) ** 2)
  assert float(routing.z_loss(logits, VALID)) == pytest.approx(expected, rel=1e-5)


def test_the_bias_balances_a_skewed_stream():
  """Wang et al.: loads even out without any loss."""
  skew = jnp.linspace(0.0, 2.0, E)
  valid = jnp.ones(512, bool)

  @jax.jit
  def one(bias, key):
    logits = skew[None] + jax.random.normal(key, (512, E))
    routed = routing.sigmoid(logits, bias, 2)
    counts = routing.counts(routed.experts_TK, E, valid)
    gradient = jax.grad(routing.balancing_gradient)(bias, counts)
    return bias - 1e-2 * jnp.sign(gradient), counts

  keys = jax.random.split(jax.random.key(0), 400)
  _, counts_SE = jax.lax.scan(one, jnp.zeros(E), keys)
  violation = lambda counts: float(jnp.max(counts) / jnp.mean(counts)) - 1
  assert violation(counts_SE[0]) > 0.8
  assert violation(jnp.sum(counts_SE[-50:], axis=0)) < 0.05


def test_metrics_of_even_and_of_collapsed_routing():
  valid = jnp.ones(T, bool)
  even = routing.metrics(jnp.full((T, E), 1 / E), jnp.full(E, 4.0), valid)
  assert float(even["router_load_max"]) == 1
  assert float(even["router_entropy"]) == pytest.approx(np.log(E), rel=1e-5)
  one_hot = jnp.zeros((T, E)).at[:, 0].set(1.0)
  counts = jnp.zeros(E).at[0].set(T)
  collapsed = routing.metrics(one_hot, counts, valid)
  assert float(collapsed["router_load_max"]) == E
  assert float(collapsed["router_load_min"]) == 0
  assert float(collapsed["router_entropy"]) == 0
