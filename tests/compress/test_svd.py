"""Truncated decompositions: the nearest product, of stacks too; ranks that fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry as transforms
from effjax.core import errors, partition, specs
from effjax.core import tree as tree_lib
from effjax.models import decoder
from effjax.optim import config as optim_config
from effjax.weights.leaves import low_rank, quantized
from tests.models.conftest import small_config

MLP = {"kind": "matrix", "path": "mlp"}


@pytest.fixture(scope="module")
def experts():
  """A decoder with experts, its parameters and specs."""
  options = {"moe": {"num_experts": 3, "hidden_dim": 24}}
  config = small_config(
    num_layers=2, pattern=("attention",), mlp="moe", mlp_options=options
  )
  model = decoder.Decoder(config)
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 8), 0, 64)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  return model, params, specs.specs(model), tokens_BL


def _svd(params, spec_tree, where=MLP, **options):
  return transforms.find("svd")(params, spec_tree, where=where, options=options)


def test_is_the_nearest_matrix_of_its_rank_layer_by_layer(experts):
  _, params, spec_tree, _ = experts
  changed = tree_lib.flatten(_svd(params, spec_tree, rank=5))
  before = tree_lib.flatten(params)
  found = [p for p, leaf in changed.items() if isinstance(leaf, low_rank.LowRank)]
  assert sorted(p.rpartition("/")[2] for p in found) == ["down", "gate", "up"]
  for path in found:
    w, leaf = np.asarray(before[path], np.float64), changed[path]
    assert tuple(leaf.shape) == w.shape == (2, 3, *w.shape[2:])
    assert leaf.rank == 5 and leaf.left.shape == (*w.shape[:-1], 5)
    values = np.linalg.svd(w, compute_uv=False)
    error = np.sum((np.asarray(leaf.dense()) - w) ** 2, axis=(-2, -1))
    np.testing.assert_allclose(error, np.sum(values[..., 5:] ** 2, axis=-1), rtol=1e-4)
    norms = [np.linalg.norm(a, axis=(-2, -1)) for a in (leaf.left, leaf.right)]
    np.testing.assert_allclose(*norms, rtol=1e-4)


def test_full_rank_is_the_same_model(experts):
  model, params, spec_tree, tokens_BL = experts
  run = lambda p: jax.jit(model.apply)({"params": p}, tokens_BL)[0]
  full = _svd(params, spec_tree, rank=24)
  np.testing.assert_allclose(run(full), run(params), atol=1e-4)


def test_what_is_kept_is_held(experts):
  _, params, spec_tree, _ = experts
  changed = tree_lib.flatten(_svd(params, spec_tree, keep=0.25))
  for path, w in tree_lib.flatten(params).items():
    if isinstance(changed[path], low_rank.LowRank):
      assert 0.2 * w.nbytes < changed[path].held_bytes() <= 0.25 * w.nbytes


def test_factors_train_from_scratch(experts):
  model, params, spec_tree, tokens_BL = experts
  params = _svd(params, spec_tree, rank=4)
  paths = set(tree_lib.flatten(params))
  trainable, frozen = partition.partition(params, paths)

  def loss(trainable):
    tree = partition.merge(trainable, frozen)
    logits = model.apply({"params": tree}, tokens_BL)[0]
    return jnp.mean((logits - 1) ** 2)

  config = optim_config.OptimizerConfig(
    name="muon", learning_rate=0.02, options={"per_head": True}, schedule="constant"
  )
  tx, _ = optim_config.build(config, spec_tree, 8)

  @jax.jit
  def step(trainable, state):
    updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
    return jax.tree.map(jnp.add, trainable, updates), state

  first, state = float(loss(trainable)), tx.init(trainable)
  before = trainable
  for _ in range(8):
    trainable, state = step(trainable, state)
  assert float(loss(trainable)) < 0.7 * first
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, trainable)
  assert all(jax.tree.leaves(moved))


def test_factors_are_quantized_one_by_one(experts):
  model, params, spec_tree, tokens_BL = experts
  factors = _svd(params, spec_tree, rank=8)
  codes = transforms.find("rtn")(factors, spec_tree, where=MLP, options={"bits": 8})
  found = [
    leaf
    for leaf in tree_lib.flatten(codes).values()
    if isinstance(leaf, low_rank.LowRank)
  ]
  assert len(found) == 3
  for leaf in found:
    assert isinstance(leaf.left, quantized.Quantized)
    assert isinstance(leaf.right, quantized.Quantized)
  run = lambda p: jax.jit(model.apply)({"params": p}, tokens_BL)[0]
  np.testing.assert_allclose(run(codes), run(factors), atol=0.1)


@pytest.mark.parametrize(
  ("options", "where", "message"),
  [
    ({"rank": 25}, MLP, r"rank=25 exceeds the smaller side of .*down \[24, 32\]"),
    ({"rank": 0}, MLP, "rank=0 must be at least 1"),
    ({"keep": 0.0}, MLP, "keep=0.0 must be above 0"),
    ({"rank": 1}, {"kind": "norm"}, "cannot factorize .* of kind 'norm'"),
  ],
)
def test_bad_input_is_one_clear_line(experts, options, where, message):
  _, params, spec_tree, _ = experts
  with pytest.raises(errors.InputError, match=message):
    _svd(params, spec_tree, where=where, **options)


def test_factorized_twice_is_refused(experts):
  _, params, spec_tree, _ = experts
  with pytest.raises(errors.InputError, match="already a low_rank leaf"):
    _svd(_svd(params, spec_tree, rank=4), spec_tree, rank=2)
