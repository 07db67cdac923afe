"""One block's rounding, learned so that what the block puts out changes least.

Source: see adaround. What flows into a block and out of it is that of all batches,
stacked `[N, B, L, D]`, N batches.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.compress import blocks as blocks_lib
from effjax.compress.quantize import _matrices, _soft_rounding, rtn
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.weights.formats import base


class Matrix(NamedTuple):
  """A weight `[..., groups, inputs of a group, out]` between two values of its format.

  Attributes:
    grid: of its format.
    below, above: codes of the two values.
    nearest: codes of the nearest of all.
    inside: where between the two the weight lies, 0 to 1.
  """

  grid: dict[str, jax.Array]
  below: jax.Array
  above: jax.Array
  nearest: jax.Array
  inside: jax.Array


Matrices = dict[str, Matrix]
Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Block:
  """A layer and what is quantized in it; hashable, equal layers make equal blocks.

  Attributes:
    layer: the block.
    specs: of its parameters; see `block`.
    paths: of the selected parameters, as the layer names them.
    options: an AdaRoundOptions.
  """

  layer: blocks_lib.Layer
  specs: tuple[tuple[str, specs_lib.ParamSpec], ...]
  paths: frozenset[str]
  options: Any

  def placed(self, params: Mapping[str, Any], one: _matrices.One) -> dict[str, Any]:
    """The parameters with those of `one` in place of the selected."""
    specs = tree_lib.unflatten(dict(self.specs))
    return _matrices.replace(params, specs, self.paths, "adaround", one, self.options)

  def soft(
    self, params: Mapping[str, Any], matrices: Matrices, v: Flat
  ) -> dict[str, Any]:
    """The parameters with weights between two values each, as the variables say."""
    fmt = self.options.build()

    def one(path: str, w: jax.Array, axis: int) -> jax.Array:
      matrix = matrices[path]
      low, high = (fmt.decode(c, matrix.grid) for c in (matrix.below, matrix.above))
      values = low + _soft_rounding.share(v[path]) * (high - low)
      values = base.merge(values).astype(w.dtype)
      return values if axis == -2 else jnp.swapaxes(values, -1, -2)

    return self.placed(params, one)


def block(
  layer: blocks_lib.Layer,
  specs: Mapping[str, Any],
  paths: frozenset[str],
  options: Any,
) -> Block:
  """A block of a layer; of its specs what names the layer is left out."""
  unnamed = {"instances": (), "reads": None}
  flat = tree_lib.flatten(specs)
  kept = tuple((k, dataclasses.replace(s, **unnamed)) for k, s in flat.items())
  return Block(layer, kept, paths, options)


@functools.partial(jax.jit, static_argnums=0)
def run(
  layer: blocks_lib.Layer, params: Mapping[str, Any], streams: blocks_lib.Stream
) -> blocks_lib.Stream:
  """All batches after a layer, one at a time."""
  return jax.lax.map(lambda stream: layer(params, stream), streams)


@jax.jit
def error(made: blocks_lib.Stream, wanted: jax.Array) -> jax.Array:
  """Mean over tokens and channels of the squared difference; padding is no token."""
  return _mean_square(made.x_BLD, wanted, made.segments_BL)


@functools.partial(jax.jit, static_argnums=0)
def prepare(block: Block, params: Mapping[str, Any]) -> Matrices:
  """The selected matrices between the values of their formats."""
  fmt = block.options.build()
  matrices: Matrices = {}

  def one(path: str, w: jax.Array, axis: int) -> jax.Array:
    del axis
    x = base.split(w.astype(jnp.float32), fmt.group_of(w.shape[-2]))
    grid = rtn.fit(fmt, x, block.options.range)
    below, above = fmt.neighbours(x, grid)
    low, gap = fmt.decode(below, grid), fmt.decode(above, grid)
    gap -= low
    inside = jnp.clip((x - low) / jnp.where(gap > 0, gap, 1), 0, 1)
    matrices[path] = Matrix(grid, below, above, fmt.encode(x, grid), inside)
    return w

  block.placed(params, one)
  return matrices


@functools.partial(jax.jit, static_argnums=0)
def rounded(
  block: Block, params: Mapping[str, Any], matrices: Matrices, codes: Flat
) -> dict[str, Any]:
  """The parameters with leaves of these codes."""
  fmt = block.options.build()

  def one(path: str, w: jax.Array, axis: int) -> Any:
    merged = base.merge(codes[path])
    return fmt.leaf(merged, matrices[path].grid, axis=axis, dtype=w.dtype)

  return block.placed(params, one)


@functools.partial(jax.jit, static_argnums=0)
def learned(
  block: Block,
  params: Mapping[str, Any],
  matrices: Matrices,
  inputs: blocks_lib.Stream,
  targets: jax.Array,
  scale: jax.Array,
  key: jax.Array,
) -> tuple[Flat, dict[str, Any], jax.Array]:
  """Learns the rounding of a block.

  Args:
    block, params, matrices: the block.
    inputs: what flows into it.
    targets: `[N, B, L, D]`, what it should put out.
    scale: the error that counts as 1.
    key: of the choice of sequences.

  Returns:
    Codes, the parameters before rounding, and the share of the codes that are not those
    of the nearest values.
  """
  start = {k: _soft_rounding.variable(m.inside) for k, m in matrices.items()}

  def distance(v: Flat, stream: blocks_lib.Stream, wanted: jax.Array) -> jax.Array:
    made = block.layer(block.soft(params, matrices, v), stream)
    return _mean_square(made.x_BLD, wanted, stream.segments_BL)

  v = _minimized(distance, start, (inputs, targets), scale, key, block.options)
  up = {k: _soft_rounding.share(part) >= 0.5 for k, part in v.items()}
  codes = {k: jnp.where(up[k], m.above, m.below) for k, m in matrices.items()}
  changed = sum(jnp.sum(codes[k] != m.nearest) for k, m in matrices.items())
  count = sum(part.size for part in codes.values())
  return codes, block.soft(params, matrices, v), changed / count


def _minimized(
  distance: Callable[..., jax.Array],
  v: Flat,
  data: tuple[blocks_lib.Stream, jax.Array],
  scale: jax.Array,
  key: jax.Array,
  options: Any,
) -> Flat:
  """The variables after all steps of Adam."""
  optimizer = optax.adam(options.learning_rate)
  count = sum(part.size for part in v.values())
  scale = jnp.where(scale > 0, scale, 1)

  def objective(v: Flat, batch: Any, step: jax.Array) -> jax.Array:
    ends = (options.beta_start, options.beta_end)
    beta = _soft_rounding.annealed(step, options.num_steps, options.warmup, ends)
    parts = (
      _soft_rounding.undecided(_soft_rounding.share(p), beta) for p in v.values()
    )
    penalty = options.regularizer * sum(map(jnp.sum, parts))
    on = step >= options.warmup * options.num_steps
    # Of means, the gradients of large blocks would be no larger than Adam's epsilon.
    return count * distance(v, *batch) / scale + jnp.where(on, penalty, 0)

  def update(carry: Any, step: jax.Array) -> tuple[Any, None]:
    v, state = carry
    batch = _rows(data, jax.random.fold_in(key, step), options.batch_size)
    updates, state = optimizer.update(jax.grad(objective)(v, batch, step), state, v)
    return (optax.apply_updates(v, updates), state), None

  steps = jnp.arange(options.num_steps)
  return jax.lax.scan(update, (v, optimizer.init(v)), steps)[0][0]


def _rows(data: Any, key: jax.Array, size: int) -> Any:
  """Sequences drawn without replacement; all, in their order, if there are not more."""
  num_batches, batch = jax.tree.leaves(data)[0].shape[:2]
  rows = jnp.arange(num_batches * batch)
  if size < len(rows):
    rows = jax.random.permutation(key, rows)[:size]
  return jax.tree.map(lambda a: a[rows // batch, rows % batch], data)


def _mean_square(made: jax.Array, wanted: jax.Array, segments: jax.Array) -> jax.Array:
  """Over tokens and channels; `[..., D]` and `[...]`."""
  difference = made.astype(jnp.float32) - wanted.astype(jnp.float32)
  is_token = segments > 0
  # What padding holds is nobody's business, and may even be not finite.
  difference = jnp.where(is_token[..., None], difference, 0)
  total = jnp.sum(jnp.mean(jnp.square(difference), axis=-1))
  return total / jnp.maximum(jnp.sum(is_token), 1)
