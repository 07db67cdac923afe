import numpy as np


def test_equals_the_papers_update_in_float64(trial):
  b1, b2, decay = 0.9, 0.99, 0.3

  def rule(path):
    m = 0.0
    lam = decay if trial.decayed(path) else 0.0

    def advance(t, theta, g):
      nonlocal m
      update = np.sign(b1 * m + (1 - b1) * g)
      m = b2 * m + (1 - b2) * g
      return theta - trial.rate(t - 1) * (update + lam * theta)

    return advance

  trial.check(trial.run("lion", weight_decay=decay), trial.closed_form(rule))
