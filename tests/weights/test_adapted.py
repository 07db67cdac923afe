"""Adapters: the formulas by hand and by PyTorch, what trains, what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors, partition
from effjax.measure import bytes as bytes_lib
from effjax.measure import leaves as measure_leaves
from effjax.ops import flops
from effjax.weights import verbs
from effjax.weights.leaves import adapted, block_sparse, low_rank, masked, n_of_m
from tests.conformance import leaf_kinds

IN, OUT, RANK, SCALE = 16, 8, 3, 0.75


def _parts(rng, *stack):
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  shapes = (IN, OUT), (IN, RANK), (RANK, OUT)
  return tuple(normal(*stack, *shape) for shape in shapes)


def _grads(loss, leaf):
  """Gradients of what trains of a leaf."""
  trainable, frozen = partition.partition({"w": leaf}, {"w"})
  of = lambda t: loss(partition.merge(t, frozen)["w"])
  return jax.grad(of)(trainable)["w"]


def test_gradients_are_those_of_full_training_through_the_other_factor(rng):
  w, down, up = _parts(rng)
  x = jnp.asarray(rng.standard_normal((5, IN)), jnp.float32)
  target = jnp.asarray(rng.standard_normal((5, OUT)), jnp.float32)
  loss = lambda leaf: jnp.sum(jnp.square(verbs.contract(x, leaf) - target)) / 2
  leaf = adapted.Adapted.create(w, down, up, SCALE)
  got = _grads(loss, leaf)
  # Full fine-tuning's gradient, by hand: G = x^T (x W - t).
  whole = np.asarray(w) + SCALE * np.asarray(down) @ np.asarray(up)
  full = np.asarray(x).T @ (np.asarray(x) @ whole - np.asarray(target))
  np.testing.assert_allclose(got.down, SCALE * full @ np.asarray(up).T, rtol=1e-4)
  np.testing.assert_allclose(
    got.up, SCALE * np.asarray(down).T @ full, rtol=1e-4, atol=1e-5
  )
  assert got.base is None and got.scale is None


def test_under_a_mask_gradients_are_masked_before_they_are_projected(rng):
  w, down, up = _parts(rng)
  mask = jnp.asarray(rng.random((IN, OUT)) < 0.4)
  leaf = masked.Masked.create(adapted.Adapted.create(w, down, up, SCALE), mask)
  x = jnp.asarray(rng.standard_normal((5, IN)), jnp.float32)
  got = _grads(lambda leaf: jnp.sum(verbs.contract(x, leaf) ** 2) / 2, leaf).values
  whole = mask * (np.asarray(w) + SCALE * np.asarray(down) @ np.asarray(up))
  full = mask * (np.asarray(x).T @ (np.asarray(x) @ whole))
  np.testing.assert_allclose(
    got.down, SCALE * full @ np.asarray(up).T, rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(
    got.up, SCALE * np.asarray(down).T @ full, rtol=1e-4, atol=1e-4
  )


@pytest.mark.oracle
def test_trains_like_pytorch(rng):
  torch = pytest.importorskip("torch")
  w, down, up = _parts(rng)
  x, target = (rng.standard_normal((7, n)).astype(np.float32) for n in (IN, OUT))
  linear = torch.nn.Linear(IN, OUT, bias=False)
  linear.weight.data = torch.tensor(np.asarray(w).T.copy())
  linear.weight.requires_grad_(False)
  a = torch.nn.Parameter(torch.tensor(np.asarray(down).T.copy()))
  b = torch.nn.Parameter(torch.tensor(np.asarray(up).T.copy()))
  optimizer = torch.optim.SGD([a, b], lr=1e-3)

  def loss(leaf):
    return jnp.mean(jnp.square(verbs.contract(jnp.asarray(x), leaf) - target))

  leaf = adapted.Adapted.create(w, down, up, SCALE)
  for _ in range(3):
    h = torch.tensor(x)
    y = linear(h) + SCALE * torch.nn.functional.linear(
      torch.nn.functional.linear(h, a), b
    )
    expected = torch.mean((y - torch.tensor(target)) ** 2)
    np.testing.assert_allclose(float(loss(leaf)), expected.item(), rtol=1e-5)
    optimizer.zero_grad()
    expected.backward()
    optimizer.step()
    grads = _grads(loss, leaf)
    leaf = adapted.Adapted(
      w, leaf.down - 1e-3 * grads.down, leaf.up - 1e-3 * grads.up, leaf.scale
    )
  np.testing.assert_allclose(leaf.down, a.detach().numpy().T, atol=1e-5)
  np.testing.assert_allclose(leaf.up, b.detach().numpy().T, atol=1e-5)


def test_each_of_a_stack_has_its_own_scale(rng):
  w, down, up = _parts(rng, 2)
  scale = jnp.asarray([0.5, 2.0]).reshape(2, 1, 1)
  leaf = adapted.Adapted.create(w, down, up, scale)
  for i, s in enumerate((0.5, 2.0)):
    one = np.asarray(w[i]) + s * np.asarray(down[i]) @ np.asarray(up[i])
    np.testing.assert_allclose(leaf.dense()[i], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inner", ["int8_dynamic", "fake_int8_dynamic"])
def test_a_base_rounds_its_own_activations(inner, rng):
  base = leaf_kinds.KINDS[inner](jax.random.key(0), (IN, OUT), -2)
  _, down, up = _parts(rng)
  x = jnp.asarray(rng.standard_normal((5, IN)), jnp.float32)
  leaf = adapted.Adapted.create(base, down, up, SCALE)
  expected = verbs.contract(x, base) + SCALE * (x @ down) @ up
  np.testing.assert_allclose(verbs.contract(x, leaf), expected, rtol=1e-5, atol=1e-5)


def test_the_sum_is_never_formed(rng):
  leaf = adapted.Adapted.create(*_parts(rng), SCALE)
  x = jnp.ones((5, IN))
  counted = flops.per_parameter(lambda p, x: verbs.contract(x, p["w"]), {"w": leaf}, x)
  assert counted == {"w": 2 * 5 * (IN * OUT + RANK * (IN + OUT)), "": 0}


def test_a_step_costs_two_products_beside_a_mask_and_three_under_it(rng):
  tokens = 512
  w, down, up = _parts(rng)
  mask = jnp.asarray(rng.random((IN, OUT)) < 0.4)
  beside = adapted.Adapted.create(masked.Masked.create(w, mask), down, up, SCALE)
  within = masked.Masked.create(adapted.Adapted.create(w, down, up, SCALE), mask)
  product = 2 * tokens * IN * OUT
  thin = 2 * tokens * RANK * (IN + OUT)
  formed = 2 * IN * OUT * RANK

  def cost(leaf):
    """Of the gradients to what trains and to activations."""
    trainable, frozen = partition.partition({"w": leaf}, {"w"})

    def loss(trainable, x):
      leaf = partition.merge(trainable, frozen)["w"]
      return jnp.sum(jnp.sin(verbs.contract(x, leaf)))

    grad = jax.grad(loss, argnums=(0, 1))
    return flops.dot_flops(grad, trainable, jnp.ones((tokens, IN)))

  assert cost(w) == 3 * product
  assert cost(beside) == 2 * product + 3 * thin
  assert cost(within) == 3 * product + 3 * formed


def test_adapters_count_beside_the_weight(rng):
  w, down, up = _parts(rng)
  mask = np.arange(IN * OUT).reshape(IN, OUT) % 4 == 0
  pruned = masked.Masked.create(w, jnp.asarray(mask))
  factors = RANK * (IN + OUT)
  for leaf in (
    adapted.Adapted.create(pruned, down, up, SCALE),
    masked.Masked.create(adapted.Adapted.create(w, down, up, SCALE), jnp.asarray(mask)),
  ):
    params = {"w": leaf}
    assert bytes_lib.num_params(params) == IN * OUT + factors
    assert bytes_lib.num_nonzero(params) == IN * OUT // 4 + factors
    assert leaf.held_bytes() == 4 * (IN * OUT + factors + 1) + IN * OUT // 8
    assert measure_leaves.simulated(params) == ["bytes", "flops"]
  zero = adapted.Adapted.create(pruned, down, 0 * up, SCALE)
  assert bytes_lib.num_nonzero({"w": zero}) == IN * OUT // 4 + RANK * IN


def test_masks_save_nothing_of_the_adapters(rng):
  w, down, up = _parts(rng)
  mask = jnp.asarray(np.arange(IN * OUT).reshape(IN, OUT) % 4 == 0)
  factors, whole = RANK * (IN + OUT), IN * OUT
  beside = adapted.Adapted.create(masked.Masked.create(w, mask), down, up, SCALE)
  within = masked.Masked.create(adapted.Adapted.create(w, down, up, SCALE), mask)
  kept = measure_leaves.kept_fractions({"beside": beside, "within": within})
  assert kept["beside"] == (whole / 4 + factors) / (whole + factors)
  assert kept["within"] == 0.25
  left = low_rank.LowRank.create(masked.Masked.create(w, mask), jnp.ones((OUT, 4)))
  kept = measure_leaves.kept_fractions({"w": left})["w"]
  assert kept == (whole / 4 + OUT * 4) / (whole + OUT * 4)


@pytest.mark.parametrize("kind", ["n_of_m", "block_sparse"])
def test_a_mask_over_a_packed_base_counts_once(kind, rng):
  base = leaf_kinds.KINDS[kind](jax.random.key(0), (IN, OUT), -2)
  assert isinstance(base, n_of_m.NOfM | block_sparse.BlockSparse)
  _, down, up = _parts(rng)
  leaf = adapted.Adapted.create(base, down, up, SCALE)
  within = masked.Masked.create(leaf, base.mask())
  assert measure_leaves.kept_fractions({"w": within}) == {"w": 0.5}


def test_mistakes_are_named(rng):
  w, down, up = _parts(rng)
  with pytest.raises(errors.InputError, match="do not make a weight of shape"):
    adapted.Adapted.create(w, up, down, SCALE)
  with pytest.raises(errors.InputError, match="scale of shape"):
    adapted.Adapted.create(w, down, up, jnp.ones((2,)))
  assert not adapted.is_adapted(w)
