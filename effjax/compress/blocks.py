"""A model taken apart: what comes before its layers, each layer, what comes after.

What works on one layer at a time (sequential calibration, AWQ, block reconstruction)
carries the activations of a few batches from layer to layer:

    blocks = Blocks(model)                     # and core.layers.unstack(model, params)
    streams = [blocks.embed(params, batch) for batch in batches]
    for k in range(blocks.num_layers):
      layer, own = blocks.layer(k), params[f"layer_{k}"]
      streams = [run(layer, own, stream) for stream in streams]
    logits = blocks.head(params, streams[0])

Layers that are built equal share their compiled programs.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import config
from effjax.core import layers as layers_lib
from effjax.models import stack
from effjax.weights import weight as weight_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
  """A batch between two layers.

  Attributes:
    x_BLD: the residual stream.
    positions_BL, segments_BL: int32, as the batch had them or the model counts them.
    keys: what the last layer that lends keys has lent, or None.
  """

  x_BLD: Any
  positions_BL: Any
  segments_BL: Any
  keys: Any = None


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer of a model, without its parameters; hashable, equal layers are equal.

  Attributes:
    module: called as models.stack says.
    share: how often in a row it is applied.
    keys: "own", "lent" or "borrowed".
  """

  module: nn.Module
  share: int = 1
  keys: str = "own"

  def __call__(self, params: Mapping[str, Any], stream: Stream) -> Stream:
    """The stream after the layer; pure."""
    return self.observed(params, {}, stream, ())[0]

  def observed(
    self,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    stream: Stream,
    mutable: Sequence[str] = ("stats",),
  ) -> tuple[Stream, dict[str, Any]]:
    """The stream after the layer, and the statistics with this batch added."""
    places = (stream.positions_BL, stream.segments_BL)
    x_BLD, keys, written = stream.x_BLD, stream.keys, dict(stats)
    with weight_lib.token_weights((stream.segments_BL > 0).astype(jnp.float32)):
      for _ in range(self.share):
        variables = {"params": params} | ({"stats": written} if written else {})
        (x_BLD, _, keys), changed = self.module.apply(
          variables, x_BLD, None, *places, keys, mutable=list(mutable)
        )
        written = changed.get("stats", written)
    keys = None if self.keys == "own" else keys
    return Stream(x_BLD, *places, keys), written


class Blocks:
  """The parts of a model.

  Attributes:
    model: the unrolled model; parameters are those of its per-layer view.
  """

  def __init__(self, model: Any):
    """Takes a decoder or an encoder apart; nothing is computed."""
    self.model = model.with_runs(None)

  @property
  def num_layers(self) -> int:
    """Layers with parameters of their own."""
    return len(self.model.config.layers)

  def layer(self, index: int) -> Layer:
    """Layer number `index`, whose parameters are `params["layer_<index>"]`."""
    keys = self.model.config.layers[index].keys
    return Layer(self.model.layer(index), self.model.config.share, keys)

  def embed(self, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Stream:
    """A batch as the first layer gets it."""
    arrays = {name: batch[name] for name in _PLACES if name in batch}
    return _embed(self.model, outside(params), arrays)

  def head(self, params: Mapping[str, Any], stream: Stream) -> jax.Array:
    """What the model returns, of the stream after the last layer."""
    return _head(self.model, outside(params), {}, stream, (), frozenset())[0]

  def observe_head(
    self,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    stream: Stream,
    collect: Sequence[str],
    paths: Collection[str],
  ) -> dict[str, Any]:
    """The statistics of the weights `paths` that come after the layers."""
    collected = (tuple(collect), frozenset(paths))
    return _head(self.model, outside(params), stats, stream, *collected)[1]


_PLACES = ("inputs", "positions", "segments")


def outside(params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters that belong to no layer."""
  return {name: leaf for name, leaf in params.items() if not name.startswith("layer_")}


@functools.partial(jax.jit, static_argnums=0)
def run(layer: Layer, params: Mapping[str, Any], stream: Stream) -> Stream:
  """The stream after a layer."""
  return layer(params, stream)


def observe(
  layer: Layer,
  params: Mapping[str, Any],
  stats: Mapping[str, Any],
  stream: Stream,
  collect: Sequence[str],
  paths: Collection[str],
) -> dict[str, Any]:
  """The statistics of a layer's weights with a batch added; see calibrate.finished.

  Args:
    layer, params, stream: the layer and what flows into it.
    stats: of the batches before; `{}` at first. Donated.
    collect: see weights.weight.COLLECTED.
    paths: of the weights, as the layer names them, such as "mixer/q".
  """
  collected = (tuple(collect), frozenset(paths))
  return _observe(layer, params, stats, stream, *collected)


@contextlib.contextmanager
def watching(
  paths: Collection[str], used: list[tuple[str, Any]]
) -> Iterator[list[tuple[str, Any]]]:
  """While open, `used` gets path and input of every use of these weights of a layer.

  For calls of `Layer.observed` that are not compiled, and for tracing.
  """
  with weight_lib.collecting((), frozenset(paths), used):
    yield used


def uses(
  layer: Layer, params: Mapping[str, Any], stream: Stream, paths: Collection[str]
) -> tuple[tuple[str, ...], ...]:
  """The weights of a layer in the order in which it uses them; nothing is computed.

  Returns:
    Paths, those together that read the same activations (q, k and v). What is used
    twice stands where it is used first.
  """
  found: list[tuple[str, Any]] = []

  def trace(params, stream):
    with watching(paths, found):
      return layer.observed(params, {}, stream)

  jax.eval_shape(trace, params, stream)
  together: list[tuple[Any, list[str]]] = []
  seen: set[str] = set()
  for path, x in found:
    if path in seen:
      continue
    seen.add(path)
    if together and together[-1][0] is x:
      together[-1][1].append(path)
    else:
      together.append((x, [path]))
  return tuple(tuple(paths) for _, paths in together)


def split(
  model: layers_lib.Layered, paths: Collection[str]
) -> tuple[dict[int, frozenset[str]], frozenset[str]]:
  """Selected parameters of a model, by the layer of its per-layer view.

  Args:
    model: as the parameters stand, with stacked runs or unrolled.
    paths: of its parameters.

  Returns:
    For each layer that has some the paths within it, and those outside all layers.
  """
  inside: dict[int, set[str]] = {}
  rest = set()
  stacked = None if model.runs is None else layers_lib.places(model.runs)
  for path in paths:
    first, _, name = path.partition("/")
    if stacked is None:
      number = first.removeprefix("layer_")
      members = [int(number)] if number != first and number.isdigit() else []
    else:
      second, _, below = name.partition("/")
      members = stacked.get((first, second), [])
      name = below if members else name
    for layer in members:
      inside.setdefault(layer, set()).add(name)
    if not members:
      rest.add(path)
  config.require(bool(paths), "no parameter is selected")
  return {k: frozenset(v) for k, v in inside.items()}, frozenset(rest)


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: Any, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Stream:
  found = []

  def keep(x_BLD: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
    found.append(Stream(x_BLD, positions, segments))
    return x_BLD

  with stack.instead_of_layers(keep):
    model.apply(
      {"params": params},
      batch["inputs"],
      positions=batch.get("positions"),
      segments=batch.get("segments"),
    )
  return found[0]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _head(
  model: Any,
  params: Mapping[str, Any],
  stats: Mapping[str, Any],
  stream: Stream,
  collect: tuple[str, ...],
  paths: frozenset[str],
) -> tuple[jax.Array, dict[str, Any]]:
  variables = {"params": params} | ({"stats": stats} if stats else {})
  tokens_BL = jnp.zeros(stream.x_BLD.shape[:2], jnp.int32)
  instead = stack.instead_of_layers(lambda *_: stream.x_BLD)
  with instead, weight_lib.collecting(collect, paths):
    (output, _), written = model.apply(
      variables,
      tokens_BL,
      positions=stream.positions_BL,
      segments=stream.segments_BL,
      mutable=["stats"],
    )
  return output, written.get("stats", {})


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=2)
def _observe(
  layer: Layer,
  params: Mapping[str, Any],
  stats: Mapping[str, Any],
  stream: Stream,
  collect: tuple[str, ...],
  paths: frozenset[str],
) -> dict[str, Any]:
  with weight_lib.collecting(collect, paths):
    return layer.observed(params, stats, stream)[1]
