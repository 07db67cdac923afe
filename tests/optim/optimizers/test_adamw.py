import jax
import numpy as np
import pytest

from effjax.core import registry
from effjax.optim import config


def test_equals_the_papers_update_in_float64(trial):
  b1, b2, eps, decay = 0.8, 0.95, 1e-6, 0.3

  def rule(path):
    m = v = 0.0
    lam = decay if trial.decayed(path) else 0.0

    def advance(t, theta, g):
      nonlocal m, v
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * g**2
      step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
      return theta - trial.rate(t - 1) * (step + lam * theta)

    return advance

  actual = trial.run("adamw", b1=b1, b2=b2, eps=eps, weight_decay=decay)
  trial.check(actual, trial.closed_form(rule))


@pytest.mark.oracle
def test_defaults_equal_torch(trial, torch_run):
  torch = pytest.importorskip("torch")
  trial.check(trial.run("adamw"), torch_run(torch.optim.AdamW, weight_decay=0.01))


def test_the_first_moment_can_be_held_in_bfloat16(trial):
  technique = registry.find(config.OPTIMIZERS, "adamw")
  options = technique.options({"momentum_dtype": "bfloat16"})
  tx = technique.make(trial.rate, trial.specs, options)
  dtypes = [x.dtype.name for x in jax.tree.leaves(jax.eval_shape(tx.init, trial.start))]
  assert dtypes.count("bfloat16") == 2
