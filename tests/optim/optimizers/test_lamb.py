import numpy as np
import optax


def test_equals_the_papers_update_in_float64(trial):
  b1, b2, eps, decay = 0.9, 0.999, 1e-6, 0.3

  def rule(path):
    m = v = 0.0
    lam = decay if trial.decayed(path) else 0.0

    def advance(t, theta, g):
      nonlocal m, v
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * g**2
      r = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + lam * theta
      ratio = np.linalg.norm(theta) / np.linalg.norm(r)
      return theta - trial.rate(t - 1) * ratio * r

    return advance

  trial.check(trial.run("lamb", weight_decay=decay), trial.closed_form(rule))


def test_equals_optax_where_nothing_is_stacked(trial):
  reference = optax.lamb(trial.rate, weight_decay=0.01, mask={"w": True, "b": False})
  trial.check(trial.run("lamb"), trial.follow(reference))
