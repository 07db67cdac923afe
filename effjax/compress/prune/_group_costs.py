"""What a layer costs with fewer groups: parameters, FLOPs, or measured time.

Time is looked up, not predicted: each layer is run at each size that is asked for, as
in NetAdapt's tables (Yang et al. 2018, arXiv:1804.03230, section 3.3), with fresh
weights and random inputs, on the device at hand. Other work on the machine shows in it.
"""

import dataclasses
import functools
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
    self._timed: dict[blocks.Layer, int] = {}

  def of(self, index: int, config: Any) -> int:
    """The cost of layer `index`, were its config this: a count, or nanoseconds."""
    # What lends or borrows keys is taken by itself, with keys of its own.
    own = config if config.keys == "own" else dataclasses.replace(config, keys="own")
    module = self._model.layer(index).clone(config=own)
    layer = blocks.Layer(module, self._model.config.share)
    if self.cost != "latency":
      return _counted(layer, self.cost, self.tokens)
    if layer not in self._timed:
      self._timed[layer] = _nanoseconds(layer, self.tokens)
    return self._timed[layer]


# Stages of a recipe and its plan ask for the same layers again and again.
@functools.lru_cache(maxsize=4096)
def _counted(layer: blocks.Layer, cost: str, tokens: int) -> int:
  """Parameters, or FLOPs; nothing is computed."""
  params = jax.eval_shape(lambda: _init(layer, tokens))
  if cost == "params":
    return sum(a.size for a in jax.tree.leaves(params))
  run = lambda params, stream: layer(params, stream).x_BLD
  return flops.dot_flops(run, params, jax.eval_shape(lambda: _stream(layer, tokens)))


def _nanoseconds(layer: blocks.Layer, tokens: int) -> int:
  """The median time of a call, of several turns."""
  stream = _stream(layer, tokens)
  params = compiling.jit_once(lambda: _init(layer, tokens))()
  run = lambda: jax.block_until_ready(blocks.run(layer, params, stream))
  run()
  took = []
  for _ in range(_ROUNDS):
    start = time.perf_counter_ns()
    for _ in range(_CALLS):
      run()
    took.append((time.perf_counter_ns() - start) // _CALLS)
  return int(statistics.median(took))


def _stream(layer: blocks.Layer, tokens: int) -> blocks.Stream:
  shape = (1, tokens)
  x_BLD = jax.random.normal(jax.random.key(0), (*shape, layer.module.embed_dim))
  positions_BL = jnp.arange(tokens, dtype=jnp.int32)[None]
  return blocks.Stream(x_BLD, positions_BL, jnp.ones(shape, jnp.int32))


def _init(layer: blocks.Layer, tokens: int) -> Mapping[str, Any]:
  """Fresh weights: constants would send all tokens to the same experts."""
  stream = _stream(layer, tokens)
  places = (None, stream.positions_BL, stream.segments_BL, None)
  return layer.module.init(jax.random.key(1), stream.x_BLD, *places)["params"]
