"""One matrix, one vector, and a rate that changes at every step."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import registry
from effjax.optim import config


def rate(step):
  """0.1, 0.05, 0.033...: a wrong count of steps shows."""
  return 0.1 / (step + 1)


def decayed(path):
  return path == "w"


@pytest.fixture(scope="session")
def trial(toy):
  """Four updates of a matrix `w` and a bias `b`, from given numbers."""
  rng = np.random.default_rng(7)
  shapes = {"w": (6, 10), "b": (10,)}
  draw = lambda: {k: rng.normal(size=v) for k, v in shapes.items()}
  start, grads = draw(), [draw() for _ in range(4)]
  specs = {
    "w": toy.make_spec("matrix", ("embed", "mlp"), shapes["w"]),
    "b": toy.make_spec("bias", ("mlp",), shapes["b"]),
  }

  def run(name, **options):
    technique = registry.find(config.OPTIMIZERS, name)
    tx = technique.make(rate, specs, technique.options(options))
    return follow(tx)

  def follow(tx):
    """The end of the updates of any optax transformation, as float64."""

    @jax.jit
    def step(params, state, gradient):
      updates, state = tx.update(gradient, state, params)
      return jax.tree.map(jnp.add, params, updates), state

    single = lambda values: {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}
    params = single(start)
    state = tx.init(params)
    for gradient in grads:
      params, state = step(params, state, single(gradient))
    return {k: np.asarray(v, np.float64) for k, v in params.items()}

  def closed_form(rule):
    """Runs `rule(path) -> fn(t, theta, g) -> theta` in float64; t counts from 1."""
    end = {}
    for path, theta in start.items():
      advance = rule(path)
      for t, gradient in enumerate(grads, start=1):
        theta = advance(t, theta, gradient[path])
      end[path] = theta
    return end

  def check(actual, expected, tolerance=1e-5):
    for path, b in expected.items():
      bound = tolerance * max(1, np.abs(b).max())
      np.testing.assert_allclose(actual[path], b, rtol=0, atol=bound, err_msg=path)

  return types.SimpleNamespace(
    start=start,
    grads=grads,
    specs=specs,
    rate=rate,
    decayed=decayed,
    run=run,
    follow=follow,
    closed_form=closed_form,
    check=check,
  )


@pytest.fixture
def torch_run(trial):
  """Runs a torch optimizer class over the same numbers, in float64."""
  torch = pytest.importorskip("torch")

  def run(cls, weight_decay, paths=("w", "b"), transpose=False, **options):
    turn = lambda x: torch.tensor(x.T.copy() if transpose else x.copy())
    params = {p: turn(trial.start[p]).requires_grad_() for p in paths}
    groups = [
      {"params": [p], "weight_decay": weight_decay if trial.decayed(path) else 0.0}
      for path, p in params.items()
    ]
    optimizer = cls(groups, **options)
    for step, gradient in enumerate(trial.grads):
      for group in optimizer.param_groups:
        group["lr"] = trial.rate(step)
      for path, p in params.items():
        p.grad = turn(gradient[path])
      optimizer.step()
    back = lambda x: x.T if transpose else x
    return {path: back(p.detach().numpy()) for path, p in params.items()}

  return run
