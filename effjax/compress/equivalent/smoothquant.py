"""SmoothQuant: outlier channels of activations are moved into the weights.

Source: Xiao et al. 2023, arXiv:2211.10438, eq. 4, with the authors' code for the bounds
(largest weights and factors are at least 1e-5):

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

over all weights W that read channel j. The producer of the channel is divided by s, its
readers are multiplied, and the model computes the same function; what quantizes weights
and activations (such as rtn with activations="int8") then has ranges that are alike.
The authors' values of alpha: 0.5, for Llama-2 0.85, Mistral 0.8, Falcon 0.6 to 0.7.

Deviations: a channel that was always zero in calibration keeps its scale, where the
authors' code would multiply what it may hold elsewhere by 1e5; producers that are
matrices can be taken, too (`linear`), where the paper has norms only.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress.equivalent import _pairs
from effjax.core import config, errors, technique
from effjax.core import tree as tree_lib

_LEAST = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuantOptions:
  """Options of SmoothQuant.

  Attributes:
    alpha: how much of the range of activations moves into the weights, 0 to 1.
    linear: whether matrices that are read linearly (values by the output projection, an
      MLP's `up` by its `down`) give their channels, too, and not only norms.
  """

  alpha: float = 0.5
  linear: bool = False

  def __post_init__(self):
    config.require(0 <= self.alpha <= 1, f"alpha={self.alpha} must be between 0 and 1")


def smooth(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Mapping[str, Any] | None,
  paths: Collection[str],
  options: SmoothQuantOptions,
) -> dict[str, Any]:
  """Scales every pair that has a selected weight among its readers.

  Raises:
    InputError: nothing selected reads a norm (or, with `linear`, a matrix), or there
      are no statistics of what flows into a pair.
  """
  pairs = [
    pair for pair in _pairs.find(params, specs, paths) if pair.is_norm or options.linear
  ]
  config.require(
    bool(pairs),
    "smoothquant found no selected weight that reads "
    + ("a norm or a matrix" if options.linear else "a norm (or set linear=True)")
    + " and can be scaled; the log names what was left out; select others with where",
  )
  leaves, found = tree_lib.flatten(params), tree_lib.flatten(stats or {})
  factors = {
    pair.producer: _factors(pair, leaves, found, options.alpha) for pair in pairs
  }
  return _pairs.apply(params, pairs, factors)


def _factors(
  pair: _pairs.Pair, leaves: Mapping[str, Any], found: Mapping[str, Any], alpha: float
) -> jax.Array:
  """The factors s of eq. 4, `[*stack, C]`."""
  seen = [reader for reader in pair.readers if reader.path in found]
  if not seen:
    raise errors.InputError(
      f"smoothquant has no statistics of what flows into {pair.readers[0].path}; pass "
      "effjax.calibrate(model, params, batches)"
    )
  for reader in seen:
    got, needed = found[reader.path].absmax.shape, leaves[reader.path].shape[:-1]
    config.require(
      tuple(got) == tuple(needed),
      f"{reader.path}: its statistics have shape {tuple(got)}, not {tuple(needed)}; "
      "they are of another model",
    )
  x_max = [_largest_input(found[r.path].absmax, r.anonymous()) for r in seen]
  w_max = [_largest_weight(leaves[r.path], r.anonymous()) for r in pair.readers]
  return _balanced(x_max, w_max, alpha)


@functools.partial(jax.jit, static_argnames=("reader",))
def _largest_input(absmax: jax.Array, reader: _pairs.Reader) -> jax.Array:
  return reader.gather(absmax)


@functools.partial(jax.jit, static_argnames=("reader",))
def _largest_weight(leaf: Any, reader: _pairs.Reader) -> jax.Array:
  w = _pairs.dense(leaf).astype(jnp.float32)
  return reader.gather(jnp.max(jnp.abs(w), axis=-1))


@functools.partial(jax.jit, static_argnames=("alpha",))
def _balanced(
  x_maxima: list[jax.Array], w_maxima: list[jax.Array], alpha: float
) -> jax.Array:
  x_max, w_max = (jnp.max(jnp.stack(m), axis=0) for m in (x_maxima, w_maxima))
  s = x_max**alpha / jnp.maximum(w_max, _LEAST) ** (1 - alpha)
  return jnp.where(x_max > 0, jnp.maximum(s, _LEAST), 1.0)


TECHNIQUE = technique.Transform(
  fn=smooth,
  options_cls=SmoothQuantOptions,
  collect=("moments",),
  equivalent=True,
)
