import jax
import pytest

from effjax.core import registry
from effjax.optim import config


@pytest.mark.oracle
@pytest.mark.parametrize(
  ("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)]
)
def test_equals_torch(momentum, nesterov, trial, torch_run):
  torch = pytest.importorskip("torch")
  actual = trial.run("sgd", momentum=momentum, nesterov=nesterov, weight_decay=0.2)
  expected = torch_run(
    torch.optim.SGD, weight_decay=0.2, momentum=momentum, nesterov=nesterov, lr=1.0
  )
  trial.check(actual, expected)


def test_nesterov_equals_its_equation_in_float64(trial):
  def rule(path):
    m = 0.0
    lam = 0.2 if trial.decayed(path) else 0.0

    def advance(t, theta, g):
      nonlocal m
      g = g + lam * theta
      m = 0.9 * m + g
      return theta - trial.rate(t - 1) * (g + 0.9 * m)

    return advance

  actual = trial.run("sgd", nesterov=True, weight_decay=0.2)
  trial.check(actual, trial.closed_form(rule))


def test_without_momentum_it_holds_no_array(trial):
  technique = registry.find(config.OPTIMIZERS, "sgd")
  tx = technique.make(trial.rate, trial.specs, technique.options({"momentum": 0.0}))
  assert all(x.ndim == 0 for x in jax.tree.leaves(jax.eval_shape(tx.init, trial.start)))
