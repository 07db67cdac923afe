"""Magnitude pruning: the weights nearest to zero go.

Source: Han et al. 2015, arXiv:1506.02626; with the default budget one threshold for the
whole model, as in Frankle and Carbin 2019, arXiv:1803.03635, appendix. The number
pruned is exact: of weights as large as the threshold, the first in tree order go.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from effjax.compress.prune import _masks
from effjax.core import select, technique


def prune(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: _masks.PruneOptions,
) -> dict[str, Any]:
  """Replaces the selected parameters by `Masked` leaves over their values.

  Raises:
    InputError: see _masks.prune.
  """
  del stats
  score = lambda path, w: jnp.abs(w)
  return _masks.prune(params, specs, paths, "magnitude", score, options)


TECHNIQUE = technique.Transform(
  fn=prune,
  options_cls=_masks.PruneOptions,
  default_where=select.Where(kind=("matrix",)),
)
