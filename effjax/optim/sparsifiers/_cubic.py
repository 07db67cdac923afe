"""Sparsity that rises as a cubic: which updates change masks, and the counts then.

Source: Zhu and Gupta 2017, arXiv:1710.01878, eq. 1.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config
from effjax.ops.sparsity import amounts, topology
from effjax.optim import checks, sparse


@dataclasses.dataclass(frozen=True, kw_only=True)
class CubicOptions:
  """When how much goes.

  Attributes:
    every: updates between two changes of the masks (dt in the paper).
    begin: update after which it begins (t0); 0 is before the first.
    num_updates: changes until the sparsity is reached (n); None for as many as fit
      into the first three quarters of the run.
    initial_sparsity: sparsity at `begin` (s_i); less where a matrix ends with less.
  """

  every: int = 100
  begin: int = 0
  num_updates: int | None = None
  initial_sparsity: float = 0.0

  def __post_init__(self):
    checks.check_positive(self, "every")
    checks.check_not_negative(self, "begin")
    config.require(
      self.num_updates is None or self.num_updates > 0,
      f"num_updates must be positive or None: {self.num_updates}",
    )
    config.require(
      0 <= self.initial_sparsity < 1,
      f"initial_sparsity={self.initial_sparsity} must be at least 0 and below 1",
    )


def num_updates(options: CubicOptions, num_steps: int) -> int:
  """How often masks change until the sparsity is reached.

  Raises:
    InputError: the schedule does not fit into `num_steps`.
  """
  number = options.num_updates
  if number is None:
    number = (3 * num_steps // 4 - options.begin) // options.every
    config.require(
      number > 0,
      f"begin={options.begin}, every={options.every}: no change of the masks fits into "
      f"the first three quarters of num_steps={num_steps}; lower them, or train longer",
    )
  end = options.begin + number * options.every
  config.require(
    end <= num_steps,
    f"begin={options.begin} and num_updates={number} with every={options.every} end at "
    f"step {end}, after num_steps={num_steps}",
  )
  return number


def due(options: CubicOptions, number: int | None) -> sparse.Due:
  """Whether masks change after update `count`; without end if `number` is None."""

  def fn(count: jax.Array) -> jax.Array:
    since = count - options.begin
    on = (since >= 0) & (since % options.every == 0)
    return on if number is None else on & (since <= number * options.every)

  return fn


def counts(
  target: sparse.Target, options: CubicOptions, number: int
) -> dict[str, np.ndarray]:
  """Weights that each matrix keeps at changes 0 to n, by path: int32 [n + 1]."""
  found: dict[str, np.ndarray] = {}
  tables: dict[tuple[int, float], np.ndarray] = {}
  for path, share in target.shares.items():
    size = target.matrix_size(path)
    if (size, share) not in tables:
      steps = amounts.cubic(min(options.initial_sparsity, share), share, number)
      kept = [amounts.number_kept(size, s) for s in steps.tolist()]
      tables[size, share] = np.array(kept, np.int32)
    found[path] = tables[size, share]
  return found


def keep(
  scores: Mapping[str, jax.Array],
  tables: Mapping[str, np.ndarray],
  options: CubicOptions,
  count: jax.Array,
) -> dict[str, jax.Array]:
  """The masks of the largest scores after update `count`."""
  masks = {}
  for path, score in scores.items():
    table = jnp.asarray(tables[path])
    index = jnp.clip((count - options.begin) // options.every, 0, len(table) - 1)
    masks[path] = topology.keep(score, table[index])
  return masks


def start(
  weights: Mapping[str, jax.Array],
  tables: Mapping[str, np.ndarray],
  options: CubicOptions,
) -> dict[str, jax.Array]:
  """The first masks: everything, or what `initial_sparsity` leaves by magnitude."""
  if options.begin or not options.initial_sparsity:
    return {path: jnp.ones(w.shape, bool) for path, w in weights.items()}
  magnitudes = {path: jnp.abs(w) for path, w in weights.items()}
  return keep(magnitudes, tables, options, jnp.int32(0))
