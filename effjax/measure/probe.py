"""How well a linear classifier tells texts apart by their embeddings.

Source: the transfer tasks of SentEval (Conneau and Kiela 2018, arXiv:1803.05449,
section 3.1): logistic regression on frozen embeddings. Deviations: its strength is not
tuned but fixed (the default of scikit-learn: 1 over half of the squared weights, no
penalty on the offsets), and texts are divided by what they say, so that equal ones
never stand on both sides.

Local letters: N texts, D width, A answers.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

from effjax.core import config
from effjax.measure import answers as answers_lib

# One text in that many is scored, the others are fitted.
_PARTS = 5
_MAX_STEPS = 1000


def accuracy(
  embeddings_ND: np.ndarray,
  labels_N: Sequence[int] | np.ndarray,
  texts: Sequence[str],
  answers: Sequence[str],
) -> dict[str, Any]:
  """How often a probe, fitted on four fifths of the texts, is right on the others.

  Args:
    embeddings_ND: of the texts.
    labels_N: the right answers' numbers.
    texts: what was embedded; decides which are scored.
    answers: the answers' names.

  Returns:
    What `answers.summarize` returns of the scored texts, and "num_fitted".

  Raises:
    InputError: too few texts: none is left to fit or to score.
  """
  embeddings_ND, labels_N = np.asarray(embeddings_ND), np.asarray(labels_N)
  scored_N = np.array([_is_scored(text) for text in texts])
  num_fitted = int((~scored_N).sum())
  config.require(
    0 < num_fitted < len(texts),
    f"{len(texts)} texts are too few for a probe, which is fitted on some and scored "
    "on others; take a hundred or more",
  )
  given_N = None
  if np.isfinite(embeddings_ND).all():
    w_DA, b_A = fit(embeddings_ND[~scored_N], labels_N[~scored_N], len(answers))
    given_N = (embeddings_ND[scored_N].astype(np.float64) @ w_DA + b_A).argmax(axis=1)
  found = answers_lib.summarize(given_N, labels_N[scored_N], answers)
  return found | {"num_fitted": num_fitted}


def fit(
  x_ND: np.ndarray, labels_N: np.ndarray, num_answers: int
) -> tuple[np.ndarray, np.ndarray]:
  """Multinomial logistic regression: the weights `[D, A]` and offsets `[A]`, float64.

  They minimize the summed negative log-likelihood plus half of the squared weights,
  which has one minimum (offsets up to a constant), whatever it is started from.
  """
  x_ND = np.asarray(x_ND, np.float64)
  num_inputs = x_ND.shape[1]
  target_NA = np.eye(num_answers)[labels_N]

  def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
    w_DA, b_A = _split(flat, num_inputs)
    logits_NA = x_ND @ w_DA + b_A
    norms_N1 = scipy.special.logsumexp(logits_NA, axis=1, keepdims=True)
    error_NA = np.exp(logits_NA - norms_N1) - target_NA
    loss = norms_N1.sum() - (logits_NA * target_NA).sum() + 0.5 * (w_DA**2).sum()
    slopes = np.concatenate([x_ND.T @ error_NA + w_DA, error_NA.sum(0)[None]])
    return loss, slopes.ravel()

  start = np.zeros((num_inputs + 1) * num_answers)
  options = {"maxiter": _MAX_STEPS, "maxfun": 2 * _MAX_STEPS, "ftol": 1e-12}
  found = scipy.optimize.minimize(
    objective, start, jac=True, method="L-BFGS-B", options=options
  )
  return _split(found.x, num_inputs)


def _split(flat: np.ndarray, num_inputs: int) -> tuple[np.ndarray, np.ndarray]:
  rows = flat.reshape(num_inputs + 1, -1)
  return rows[:-1], rows[-1]


def _is_scored(text: str) -> bool:
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % _PARTS == 0
