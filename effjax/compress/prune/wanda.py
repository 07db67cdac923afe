"""Wanda: a weight counts by its magnitude times the norm of its input.

Source: Sun et al. 2023, arXiv:2306.11695, eq. 1: score |W_io| ||X_i||_2, compared for
each output by itself, the same share of every matrix. Weights are not changed.
Calibration is one-shot, on the model as it is before; `calibration.order: sequential`
in a recipe prunes layer by layer, as the authors' code does.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress.prune import _masks
from effjax.core import config, errors, select, technique
from effjax.core import tree as tree_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandaOptions(_masks.PruneOptions):
  """Options of Wanda.

  Attributes:
    budget: "uniform" by default; "owl" is that of Yin et al. 2024, made for it.
    within: by default "output" where the pattern and budget allow it.
  """

  budget: str = "uniform"
  within: str = ""

  def __post_init__(self):
    if not self.within:
      single = self.pattern == "unstructured" and self.budget != "global"
      object.__setattr__(self, "within", "output" if single else "matrix")
    super().__post_init__()


def prune(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: WandaOptions,
) -> dict[str, Any]:
  """Replaces the selected parameters by `Masked` leaves over their values.

  Raises:
    InputError: a parameter has no statistics; or see _masks.prune.
  """
  found = tree_lib.flatten(stats or {})
  score = lambda path, w: scores(found.get(path), w)
  return _masks.prune(params, specs, paths, "wanda", score, options)


def scores(stats: Any, w: jax.Array) -> jax.Array:
  """|W| times the root of the mean square of the inputs; as ||X|| up to a factor.

  Args:
    stats: calibrate.InputStats of the inputs of w, or None.
    w: `[*stack, I, O]`.

  Raises:
    InputError: there are no statistics, or those of another shape.
  """
  if stats is None:
    raise errors.InputError(
      "wanda has no statistics of it; pass effjax.calibrate(model, params, batches). "
      "What contracts no input, such as an embedding that is only looked up, has none"
    )
  config.require(
    tuple(stats.square_sum.shape) == tuple(w.shape[:-1]),
    f"its statistics have shape {tuple(stats.square_sum.shape)}, not "
    f"{tuple(w.shape[:-1])}; they are of another model",
  )
  return jnp.abs(w) * jnp.sqrt(stats.mean_square)[..., None].astype(w.dtype)


TECHNIQUE = technique.Transform(
  fn=prune,
  options_cls=WandaOptions,
  default_where=select.Where(kind=("matrix",)),
  collect=("moments",),
)
