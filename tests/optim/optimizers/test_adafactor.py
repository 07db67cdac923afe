import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import registry
from effjax.optim import config, factored


def test_equals_the_papers_algorithms_in_float64(trial):
  """Algorithm 4 for the matrix, 5 for the vector, with decoupled weight decay."""
  decay = 0.3

  def rule(path):
    r = c = v = 0.0
    lam = decay if trial.decayed(path) else 0.0

    def advance(t, theta, g):
      nonlocal r, c, v
      beta = 1 - t**-0.8
      square = g**2 + 1e-30
      if g.ndim == 2:
        r = beta * r + (1 - beta) * square.sum(axis=1)
        c = beta * c + (1 - beta) * square.sum(axis=0)
        estimate = np.outer(r, c) / r.sum()
      else:
        v = beta * v + (1 - beta) * square
        estimate = v
      u = g / np.sqrt(estimate)
      u = u / max(1.0, np.sqrt(np.mean(u**2)))
      size = max(1e-3, np.sqrt(np.mean(theta**2)))
      return theta - trial.rate(t - 1) * (size * u + lam * theta)

    return advance

  actual = trial.run("adafactor", min_dim=6, weight_decay=decay)
  trial.check(actual, trial.closed_form(rule))


@pytest.mark.parametrize("min_dim", [4, 128])
def test_equals_optax_where_nothing_is_stacked(min_dim, trial):
  reference = optax.adafactor(trial.rate, min_dim_size_to_factor=min_dim)
  trial.check(trial.run("adafactor", min_dim=min_dim), trial.follow(reference))


def test_steps_can_be_absolute(trial):
  reference = optax.adafactor(trial.rate, multiply_by_parameter_scale=False)
  trial.check(trial.run("adafactor", scale_by_param=False), trial.follow(reference))


def test_state_of_a_stacked_matrix_is_a_row_and_a_column_a_layer(toy):
  specs = {"w": toy.make_spec("matrix", ("embed", "mlp"), (200, 128, 256))}
  technique = registry.find(config.OPTIMIZERS, "adafactor")
  tx = technique.make(lambda step: 0.1, specs, technique.options({}))
  params = {"w": jax.ShapeDtypeStruct((200, 128, 256), jnp.bfloat16)}
  state = jax.eval_shape(tx.init, params)
  moments = next(s for s in state if isinstance(s, factored.FactoredState))
  # The stack is the second longest axis, and still not factored over.
  assert moments.v_row["w"].shape == (200, 128)
  assert moments.v_col["w"].shape == (200, 256)
  assert moments.v["w"] is None
  assert moments.v_row["w"].dtype == jnp.float32
