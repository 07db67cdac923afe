"""Pruning by derivatives of the loss: what Taylor, Fisher and OBD share."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import derivatives
from effjax.compress.prune import _masks
from effjax.core import select, technique
from effjax.core import tree as tree_lib

# `derive(model, params, batches, paths, options)`: arrays of the parameters' shapes.
Derive = Callable[..., derivatives.Flat]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DerivedOptions(_masks.PruneOptions):
  """Options of pruning by derivatives of the loss.

  Attributes:
    budget: "uniform" by default; with "global", which the papers have, a matrix that a
      small model hardly uses can go as a whole, and is refused.
  """

  budget: str = "uniform"


def transform(
  name: str,
  derive: Derive,
  score: Callable[[jax.Array, jax.Array], jax.Array],
  options_cls: type,
) -> technique.ModelTransform:
  """A transform that prunes by `score(derivative, w)`.

  Args:
    name: of the transform.
    derive: what of the loss.
    score: of weights, elementwise.
    options_cls: of the transform.
  """

  def prune(
    model: Any,
    params: Mapping[str, Any],
    specs: Mapping[str, Any],
    batches: Sequence[Mapping[str, Any]],
    paths: Collection[str],
    options: _masks.PruneOptions,
  ) -> tuple[Any, dict[str, Any]]:
    """Replaces the selected parameters by `Masked` leaves over their values.

    Raises:
      InputError: the model is no decoder, derivatives are not finite, or see
        _masks.prune.
    """
    found = derive(model, params, batches, paths, options)
    about = tree_lib.flatten(specs)

    def of(path: str, w: jax.Array) -> jax.Array:
      derivative = found[path]
      if about[path].kind == "embedding":
        derivative = jnp.swapaxes(derivative, -1, -2)
      return score(derivative, w.astype(jnp.float32))

    return model, _masks.prune(params, specs, paths, name, of, options)

  def outcome(
    model: Any,
    params: Mapping[str, Any],
    specs: Mapping[str, Any],
    paths: Collection[str],
    options: _masks.PruneOptions,
  ) -> tuple[Any, dict[str, Any]]:
    """What `prune` makes, of shapes."""
    derivatives.require_decoder(model)
    magnitude = lambda path, w: jnp.abs(w)
    of = lambda params: _masks.prune(params, specs, paths, name, magnitude, options)
    return model, jax.eval_shape(of, dict(params))

  return technique.ModelTransform(
    fn=prune,
    options_cls=options_cls,
    default_where=select.Where(kind=("matrix",)),
    needs_batches=True,
    outcome=outcome,
  )
