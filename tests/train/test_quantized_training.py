"""Fake-quantized leaves in the loop: they train, resume and end on the grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry
from effjax.train import loop
from effjax.train.losses import cross_entropy
from effjax.weights.leaves import fake_quantized, quantized

STEPS = 40


def _transform(toy, name, params, **options):
  return registry.find(name)(params, toy.specs, options=options)


def _train(toy, params, **changes):
  config = toy.config(num_steps=STEPS, log_every=STEPS)
  model = toy.make_model()
  return loop.train(
    **toy.arguments(model=model, params=params, config=config), **changes
  ).params


def _loss(toy, params):
  loss_fn = cross_entropy.cross_entropy(cross_entropy.CrossEntropyOptions())
  batch = toy.batch(32)
  loss = loss_fn(toy.make_model(), {"params": params}, batch, jax.random.key(0))
  return float(loss.objective / loss.weight)


@pytest.fixture(scope="module")
def trained(toy):
  """Weights trained as floats."""
  return _train(toy, toy.params)


def test_learned_steps_beat_rounding_after_as_many_steps(toy, trained):
  options = {"bits": 3, "per_tensor": True}
  rounded = _loss(toy, _transform(toy, "rtn", _train(toy, trained), **options))
  start = _transform(toy, "lsq", trained, **options)
  after = _train(toy, start)
  hard = registry.find("harden")(after, toy.specs)
  assert isinstance(hard["up"], quantized.Quantized)
  assert _loss(toy, hard) == pytest.approx(_loss(toy, after), rel=1e-6)
  assert _loss(toy, hard) < _loss(toy, start) and _loss(toy, hard) < rounded
  assert float(jnp.abs(after["up"].scale - start["up"].scale).max()) > 0


def test_a_stopped_training_resumes_with_its_leaves(toy, tmp_path):
  start = _transform(toy, "lsq", toy.params, bits=4, symmetric=False)

  def train(workdir, **changes):
    values = {"model": toy.make_model(), "params": start} | changes
    return loop.train(**toy.arguments(**values), workdir=workdir).params

  class CrashError(Exception):
    """Stands for a process that died."""

  def crash(given):
    if given == 3:
      raise CrashError

  with pytest.raises(CrashError):
    train(tmp_path, batches=toy.hooked(crash))
  resumed, straight = train(tmp_path), train(None)
  assert isinstance(resumed["up"], fake_quantized.FakeQuantized)
  assert jax.tree.structure(resumed) == jax.tree.structure(straight)
  jax.tree.map(np.testing.assert_array_equal, resumed, straight)
  moved = jnp.abs(resumed["up"].offset - start["up"].offset)
  assert float(moved.max()) > 0
