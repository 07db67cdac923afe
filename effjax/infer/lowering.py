"""Prefill and decoding step of a model for devices that need not be there."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import layers
from effjax.core import shard as shard_lib
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.infer import engine
from effjax.parallel import sharding
from effjax.parallel import spread as spread_lib
from effjax.weights import leaf as leaf_lib

# Every cache is laid out `[rows, heads, ...]`.
_CACHE = ("batch", "kv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
  """A model that is served; arrays may be shapes.

  Attributes:
    model: a Decoder, at the precision that it computes in.
    params: its parameters, of any leaf kinds; plain floats are held in that precision.
    rows: sequences decoded together.
    max_len: tokens that a sequence can hold.
  """

  model: Any
  params: Mapping[str, Any]
  rows: int
  max_len: int

  def lower(
    self, spread: spread_lib.Spread
  ) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """The programs of `engine.Decoding`: a prefill of `max_len` tokens, and a step."""
    model, params, state = self._placed(spread)
    tokens = spread.abstract((self.rows, self.max_len), jnp.int32)
    token = spread.abstract((self.rows,), jnp.int32)
    with spread.active():
      prefill = engine.prefill.lower(model, params, tokens, tokens, state)
      step = engine.step.lower(model, params, token, state)
    return prefill, step

  def held_bytes(self, spread: spread_lib.Spread) -> dict[str, int]:
    """Bytes that a device holds between steps, without padding: "params", "cache"."""
    _, params, state = self._placed(spread)
    return {"params": sharding.held_bytes(params), "cache": sharding.held_bytes(state)}

  def _placed(self, spread: spread_lib.Spread) -> tuple[Any, Any, Any]:
    """The unrolled model, its parameters and its empty state, placed on devices."""
    cast = functools.partial(_cast, dtype=self.model.precision.dtype)
    unrolled = self.model.with_runs(None)
    shapes = jax.eval_shape(
      lambda params: layers.unstack(self.model, cast(params))[1], dict(self.params)
    )
    params = _place(shapes, spread.params(specs_lib.specs(unrolled), shapes))
    state = jax.eval_shape(lambda: unrolled.init_state(self.rows, self.max_len))
    return unrolled, params, jax.tree.map(lambda a: _cache(a, spread), state)


def _cast(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
  """Plain arrays of floats in another type; scales and factors stay as they are."""
  flat = tree_lib.flatten(params)
  for path, leaf in flat.items():
    if not leaf_lib.is_leaf_kind(leaf) and leaf.dtype == jnp.float32:
      flat[path] = leaf.astype(dtype)
  return tree_lib.unflatten(flat)


def _place(tree: Any, shardings: Any) -> Any:
  placed = lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to)
  return jax.tree.map(placed, tree, shardings)


def _cache(array: Any, spread: spread_lib.Spread) -> jax.ShapeDtypeStruct:
  axes = (_CACHE + (None,) * array.ndim)[: array.ndim]
  spec = shard_lib.partition_spec(
    axes, array.shape, spread.mesh, spread.preset.activations
  )
  sharding = jax.sharding.NamedSharding(spread.mesh, spec)
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
