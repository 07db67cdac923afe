"""Static scales of activations from the statistics of calibration, put on leaves."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config, errors
from effjax.ops.matmul import activations, histogram
from effjax.weights.formats import base

log = logging.getLogger(__name__)


def attach(
  leaf: Any, stats: Any, path: str, spec: Any, options: base.FormatOptions
) -> Any:
  """The leaf with its `x_scale`, where the options ask for static activations.

  One scale a matrix, of experts one each. An expert that was given no token, or only
  zeros, gets the largest scale of the others of its layer, and the log names it.

  Args:
    leaf: of the format of the options.
    stats: InputStats of the weight, or None where there are none.
    path: of the parameter, for the log.
    spec: its ParamSpec; None for a part of a parameter.
    options: of the stage.

  Raises:
    InputError: there are no statistics, or what they show of the inputs is nothing.
  """
  if not options.static_activations:
    return leaf
  name = f"activation_scale={options.activation_scale!r}"
  if spec is None:
    raise errors.InputError(
      f"{name}: calibration knows the inputs of a matrix, not of the factors of a "
      "low-rank one; use activation_scale='dynamic'"
    )
  collect = options.collect
  if stats is None or ("histogram" in collect and stats.histogram is None):
    raise errors.InputError(
      f"{name} needs statistics of its inputs; pass effjax.calibrate(model, params, "
      f"batches, collect={collect}). What contracts no input, such as an embedding "
      "that is only looked up, has none: leave it out"
    )
  expected = tuple(leaf.shape[:-2])
  config.require(
    tuple(stats.count.shape) == expected,
    f"its statistics are of a stack of shape {tuple(stats.count.shape)}, not "
    f"{expected}; they are of another model",
  )
  cut = histogram.threshold(
    stats.histogram,
    jnp.max(stats.absmax, axis=-1),
    method=str(options.activation_scale),
    kind=str(options.activations),
    percentile=float(options.percentile),
  )
  seen = (stats.count > 0) & (cut > 0)
  if "experts" in spec.axes:
    most = jnp.max(jnp.where(seen, cut, 0), axis=-1, keepdims=True)
    cut = jnp.where(seen, cut, most)
    _tell(path, seen, cut)
  # A plan traces this on shapes, of whose values there is nothing to say.
  if not isinstance(cut, jax.core.Tracer):
    config.require(
      bool(jnp.all(cut > 0)),
      f"{name}: calibration gave it no token, or only zeros; calibrate on more text",
    )
  scale = cut / activations.LARGEST[options.activations]
  return dataclasses.replace(leaf, x_scale=scale[..., None, None].astype(jnp.float32))


def _tell(path: str, seen: jax.Array, cut: jax.Array) -> None:
  """Logs experts whose scale is that of others."""
  if isinstance(seen, jax.core.Tracer):
    return
  places = [tuple(map(int, at)) for at in np.argwhere(~np.asarray(seen))]
  if places and bool(jnp.all(cut > 0)):
    named = ", ".join(f"{path}[{', '.join(map(str, at))}]" for at in places)
    log.warning(
      "no token seen, activations scaled as those of the other experts: %s", named
    )
