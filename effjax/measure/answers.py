"""What a number of answers comes to: how many are right, and how sure that is."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from effjax.core import config


def summarize(
  given_N: Sequence[int] | np.ndarray | None,
  labels_N: Sequence[int] | np.ndarray,
  answers: Sequence[str],
) -> dict[str, Any]:
  """How often the right answer was given.

  Args:
    given_N: numbers of the answers that were given, or None where a model that is not
      finite gave none.
    labels_N: the right answers' numbers.
    answers: the answers' names.

  Returns:
    "accuracy", "stderr" (its binomial standard error), "majority" (what always giving
    the most frequent answer gets), "num_examples" and "recall" (of each answer, the
    share of its examples that were got right; None where there are none). Without
    answers the measured ones are None.

  Raises:
    InputError: no examples, or labels that do not fit.
  """
  labels_N = np.asarray(labels_N)
  num = len(labels_N)
  config.require(num > 0, "there are no examples to score")
  config.require(
    bool(0 <= labels_N.min() and labels_N.max() < len(answers)),
    f"labels must be from 0 to {len(answers) - 1}",
  )
  counts_A = np.bincount(labels_N, minlength=len(answers))
  known = given_N is not None
  right_N = np.asarray(given_N) == labels_N if known else np.zeros(num, bool)
  share = float(right_N.mean())
  hits_A = np.bincount(labels_N[right_N], minlength=len(answers))
  return {
    "accuracy": share if known else None,
    "stderr": math.sqrt(share * (1 - share) / num) if known else None,
    "majority": float(counts_A.max() / num),
    "num_examples": num,
    "recall": {
      answer: float(hits / count) if known and count else None
      for answer, hits, count in zip(answers, hits_A, counts_A, strict=True)
    },
  }
