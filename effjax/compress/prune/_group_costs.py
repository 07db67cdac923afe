"""What a layer costs with fewer groups: parameters, FLOPs, or measured time.

Time is looked up, not predicted: each layer is run at each size that is asked for, as
in NetAdapt's tables (Yang et al. 2018, arXiv:1804.03230, section 3.3), with fresh
weights and random inputs, on the device at hand. Other work on the machine shows in it.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import blocks
from effjax.core import compiling
from effjax.ops import flops

COSTS = ("params", "flops", "latency")
_ROUNDS, _CALLS = 7, 3


class LayerCosts:
  """Costs of layers, each of them counted or measured once.

  Attributes:
    cost: one of COSTS.
    tokens: of the one sequence that FLOPs and time are of.
  """

  def __init__(self, model: Any, cost: str, tokens: int):
    """Of layers of an unrolled model; nothing is computed yet."""
    self.cost = cost
    self.tokens = tokens
    self._model = model
    self._known: dict[blocks.Layer, int] = {}

  def of(self, index: int, config: Any) -> int:
    """The cost of layer `index`, were its config this: a count, or nanoseconds."""
    layers = list(self._model.config.layers)
    # What lends or borrows keys is taken by itself, with keys of its own.
    layers[index] = dataclasses.replace(config, keys="own")
    whole = dataclasses.replace(self._model.config, layers=tuple(layers))
    layer = blocks.Layer(self._model.clone(config=whole).layer(index), whole.share)
    if layer not in self._known:
      self._known[layer] = getattr(self, f"_{self.cost}")(layer)
    return self._known[layer]

  def _stream(self) -> blocks.Stream:
    shape = (1, self.tokens)
    x_BLD = jax.random.normal(jax.random.key(0), (*shape, self._model.config.embed_dim))
    positions_BL = jnp.arange(self.tokens, dtype=jnp.int32)[None]
    return blocks.Stream(x_BLD, positions_BL, jnp.ones(shape, jnp.int32))

  def _init(self, layer: blocks.Layer) -> Mapping[str, Any]:
    """Fresh weights: constants would send all tokens to the same experts."""
    stream = self._stream()
    places = (None, stream.positions_BL, stream.segments_BL, None)
    return layer.module.init(jax.random.key(1), stream.x_BLD, *places)["params"]

  def _shapes(self, layer: blocks.Layer) -> Mapping[str, Any]:
    return jax.eval_shape(lambda: self._init(layer))

  def _params(self, layer: blocks.Layer) -> int:
    return sum(a.size for a in jax.tree.leaves(self._shapes(layer)))

  def _flops(self, layer: blocks.Layer) -> int:
    stream = jax.eval_shape(self._stream)
    return flops.dot_flops(
      lambda params, stream: layer(params, stream).x_BLD, self._shapes(layer), stream
    )

  def _latency(self, layer: blocks.Layer) -> int:
    stream = self._stream()
    params = compiling.jit_once(lambda: self._init(layer))()
    run = lambda: jax.block_until_ready(blocks.run(layer, params, stream))
    run()
    took = []
    for _ in range(_ROUNDS):
      start = time.perf_counter_ns()
      for _ in range(_CALLS):
        run()
      took.append((time.perf_counter_ns() - start) // _CALLS)
    return int(statistics.median(took))
