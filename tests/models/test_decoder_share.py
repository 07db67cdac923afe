"""Layers that share parameters: the function of copies, held once, decoding too."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import config as core_config
from effjax.core import errors, layers, specs
from effjax.core import tree as tree_lib
from effjax.models import config as config_lib
from effjax.models import decoder
from tests.models.conftest import small_config

# Two sets of parameters, each used twice in a row: scanned over the sets.
CONFIG = {"num_layers": 4, "pattern": ("attention",), "share": 2}


@pytest.fixture(scope="module")
def shared():
  """`(model, params, tokens_BL)`."""
  model = decoder.Decoder(small_config(**CONFIG))
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 10), 0, 64)
  return model, jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"], tokens_BL


def _copies(params):
  """The parameters of a model that holds every layer: each set twice."""
  twice = lambda a: jnp.repeat(a, 2, axis=0)
  return {**params, "run_0": jax.tree.map(twice, params["run_0"])}


def test_is_the_function_of_copies_and_sums_their_gradients(shared):
  model, params, tokens_BL = shared
  whole = decoder.Decoder(small_config(**CONFIG | {"share": 1}))
  probe = jax.random.normal(jax.random.key(2), (2, 10, 64))

  def run(model, params):
    loss = lambda p: jnp.sum(model.apply({"params": p}, tokens_BL)[0] * probe)
    return jax.jit(jax.value_and_grad(loss))(params)

  value, gradients = run(model, params)
  expected, of_copies = run(whole, _copies(params))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  added = lambda a: a.reshape(2, 2, *a.shape[1:]).sum(axis=1)
  of_copies = {**of_copies, "run_0": jax.tree.map(added, of_copies["run_0"])}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
    gradients,
    of_copies,
  )


def test_holds_half_of_the_layers(shared):
  model, params, _ = shared
  whole = decoder.Decoder(small_config(**CONFIG | {"share": 1}))
  flat, of_all = (tree_lib.flatten(specs.specs(m)) for m in (model, whole))
  assert flat.keys() == of_all.keys()
  for path, spec in flat.items():
    times = 2 if path.startswith("run_") else 1
    assert times * spec.size == of_all[path].size
  assert sum(a.size for a in jax.tree.leaves(params)) == sum(
    spec.size for spec in flat.values()
  )


def test_the_resolved_config_is_the_same_model(shared):
  config = shared[0].config
  assert (config.num_layers, len(config.layers)) == (4, 2)
  again = config_lib.from_dict(json.loads(json.dumps(core_config.to_dict(config))))
  assert again == config


@pytest.mark.parametrize("pattern", [("attention",), ("mamba2",)])
@pytest.mark.parametrize("unrolled", [False, True])
def test_prefill_and_steps_equal_the_parallel_form(pattern, unrolled):
  model = decoder.Decoder(small_config(**CONFIG | {"pattern": pattern}))
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 9), 0, 64)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  whole = jax.jit(model.apply)({"params": params}, tokens_BL)[0]
  if unrolled:
    model, params = layers.unstack(model, params)
  apply = jax.jit(model.apply)
  state = model.init_state(2, 12)
  first, state = apply({"params": params}, tokens_BL[:, :6], state=state)
  np.testing.assert_allclose(first, whole[:, :6], atol=1e-4)
  for place in range(6, 9):
    token = tokens_BL[:, place : place + 1]
    logits, state = apply({"params": params}, token, state=state)
    np.testing.assert_allclose(logits[:, 0], whole[:, place], atol=1e-4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"share": 3}, "share=3 must divide num_layers=4"),
    ({"share": 0}, "share must be positive"),
    (
      {"pattern": ("mamba2", "attention")},
      "ties layers 0 and 1, but they are mamba2 with swiglu and attention with swiglu",
    ),
    ({"mlp_pattern": ("swiglu", "gelu")}, "attention with swiglu and attention with"),
  ],
)
def test_bad_sharing_is_one_clear_line(changes, message):
  with pytest.raises(errors.InputError, match=message):
    small_config(**CONFIG | changes)
