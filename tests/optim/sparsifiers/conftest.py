"""What tests of sparse training share: short runs, and what they leave at each step."""

import types

import jax
import numpy as np
import optax
import pytest

from effjax.core import config as config_lib
from effjax.core import tree
from effjax.optim import config as optim_config
from effjax.optim import sparse, sparsity

NUM_STEPS = 12
# Changes of the masks at steps 2, 4, 6 and 8.
OPTIONS = {"static": {}}


def make_sparsifier(toy, name, num_steps=NUM_STEPS, key=3, **values):
  """A sparsifier of all matrices of the toy."""
  options = values.pop("options", OPTIONS.get(name, {"every": 2}))
  config = config_lib.build(
    sparsity.SparsityConfig,
    {"name": name, "sparsity": 0.7, "options": options} | values,
    "sparsity",
  )
  shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, "float32"), toy.specs)
  target = sparsity.choose(config, shapes, toy.specs, frozenset(tree.flatten(shapes)))
  return sparsity.Sparsifier(
    config=config, target=target, num_steps=num_steps, key=jax.random.key(key)
  )


def make(toy, name, optimizer="adamw", masks=None, **values):
  """The whole transformation, its rate by step and its target."""
  sparsifier = make_sparsifier(toy, name, **values)
  settings = {
    "name": optimizer,
    "learning_rate": 0.05,
    "schedule": "constant",
    "clip_norm": 1.0,
  }
  tx, rate = optim_config.build(
    optim_config.OptimizerConfig(**settings),
    toy.specs,
    sparsifier.num_steps,
    masks=masks,
    sparsifier=sparsifier,
  )
  return tx, rate, sparsifier.target


def run(tx, params, gradients):
  """The states after 0, 1, ... updates: `(flat params, optimizer state)`, host arrays.

  The gradient of step t is `gradients(t)`.
  """
  state = jax.jit(tx.init)(params)
  params = sparse.masked_params(params, state)

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  seen = [(tree.flatten(jax.device_get(params)), jax.device_get(state))]
  for t in range(NUM_STEPS):
    params, state = step(params, state, gradients(t))
    seen.append((tree.flatten(jax.device_get(params)), jax.device_get(state)))
  assert step._cache_size() == 1
  return seen


def moments(inner, path):
  """Every array of an optimizer's state that belongs to a parameter."""
  flat, _ = jax.tree_util.tree_flatten_with_path(inner)
  return [
    np.asarray(x)
    for keys, x in flat
    if "/".join(str(k.key) for k in keys if hasattr(k, "key")).endswith(path)
  ]


@pytest.fixture(scope="session")
def training(toy):
  params = toy.random_like(toy.specs, seed=0)
  gradients = lambda t: toy.random_like(toy.specs, seed=100 + t)
  return types.SimpleNamespace(
    toy=toy,
    params=params,
    gradients=gradients,
    flat_gradients=lambda t: jax.tree.map(np.asarray, tree.flatten(gradients(t))),
    sparsifier=lambda *args, **kwargs: make_sparsifier(toy, *args, **kwargs),
    make=lambda *args, **kwargs: make(toy, *args, **kwargs),
    run=lambda tx, start=None, grads=None: run(
      tx, params if start is None else start, grads or gradients
    ),
    moments=moments,
    num_steps=NUM_STEPS,
  )
