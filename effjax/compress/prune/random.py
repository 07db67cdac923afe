"""Random pruning: what every score has to beat.

Source: the baseline of Frankle and Carbin 2019, arXiv:1803.03635, and of Liu et al.
2022, arXiv:2202.02643, who find that with a good budget for each layer ("erk") and
training from the start it loses little.
"""

import dataclasses
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax

from effjax.compress.prune import _masks
from effjax.core import select, technique


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomOptions(_masks.PruneOptions):
  """Options of random pruning.

  Attributes:
    budget: "uniform" by default.
    seed: of the scores; those of a parameter depend on nothing else but its path.
  """

  budget: str = "uniform"
  seed: int = 0


def prune(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: RandomOptions,
) -> dict[str, Any]:
  """Replaces the selected parameters by `Masked` leaves over their values.

  Raises:
    InputError: see _masks.prune.
  """
  del stats
  key = jax.random.key(options.seed)

  def score(path: str, w: jax.Array) -> jax.Array:
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return jax.random.uniform(own, w.shape)

  return _masks.prune(params, specs, paths, "random", score, options)


TECHNIQUE = technique.Transform(
  fn=prune, options_cls=RandomOptions, default_where=select.Where(kind=("matrix",))
)
