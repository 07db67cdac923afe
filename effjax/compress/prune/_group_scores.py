"""What structured groups matter, by several measures.

| score       | of a group                                                             |
|-------------|------------------------------------------------------------------------|
| "magnitude" | mean square of its weights                                             |
| "random"    | a number drawn                                                         |
| "taylor"    | size of the loss' first-order change, were its output scaled to nothing|
| "fisher"    | second-order change: half the mean square of that of single sequences  |
| "wanda"     | mean squares of what its rows add to the residual stream, summed       |
| "influence" | of a layer: 1 - cosine between the stream before and after it          |
| "loss"      | of a layer: the loss without it (half N^2 layers run for N of them)    |

A group's output is what it writes into the residual stream: its rows of `down`, of an
output projection, of an expert. With a gate g = 1 on it, dL/dg is the sum of gradient
times weight over these rows.

Sources: Li et al. 2017, arXiv:1608.08710 (norms of filters); Molchanov et al. 2019,
arXiv:1906.10771, eq. 8 (gates, first order); Michel et al. 2019, arXiv:1905.10650, eq.
2 (gates of heads); Theis et al. 2018, arXiv:1801.05787, eq. 6, and Liu et al. 2021,
arXiv:2108.00708, eq. 5 (group Fisher); Sun et al. 2023, arXiv:2306.11695 (|w| ||x||,
here squared and summed over a group's rows); Men et al. 2024, arXiv:2403.03853, eq. 1
(block influence); Kim et al. 2024, arXiv:2402.02834, section 3.2 (loss without one).
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress import blocks, calibrate, derivatives
from effjax.core import config, groups, layers
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.weights import verbs

OF_LAYERS = ("influence", "loss")
OF_ALL = ("magnitude", "random", "taylor", "fisher", "wanda")
NEEDS_TEXT = ("taylor", "fisher", "wanda", *OF_LAYERS)

Batches = Sequence[Mapping[str, Any]]
# Of one parameter an array with the shape of its weights, stacked or not, summed up to
# what a group has of it: `sums(path, array)`.
Sums = Callable[[str, jax.Array], jax.Array]


def of_families(
  score: str,
  model: Any,
  params: Mapping[str, Any],
  batches: Batches,
  families: Sequence[groups.Family],
  seed: int,
) -> list[np.ndarray]:
  """Scores of the units of each family, float64 `[E or 1, units]`.

  Args:
    score: one of OF_ALL.
    model, params: as they are, scanned or not.
    batches: for scores that need text.
    families: of the per-layer view.
    seed: of "random".

  Raises:
    InputError: the model is an encoder and has no loss, or a score is not finite.
  """
  if score == "random":
    return [_drawn(f.module, (f.num_experts or 1, f.num_units), seed) for f in families]
  carriers = {
    c.path: (f, c)
    for f in families
    for c in f.carriers
    if score == "magnitude" or c.path in f.outputs
  }
  stacked = _stacked_paths(model)

  def sums(path: str, array: jax.Array) -> jax.Array:
    return _unit_sums(array, *carriers[path])

  # Layers that are scanned together have equal families: any of them says how to sum.
  of_stacked = {stacked(path): path for path in carriers}
  found = _values(
    score, model, params, batches, of_stacked, lambda p, a: sums(of_stacked[p], a)
  )
  _, flat = _unrolled(model, found)
  scores = []
  for family in families:
    own = [flat[path] for path, (f, _) in carriers.items() if f is family]
    total = np.sum([np.asarray(jax.device_get(a), np.float64) for a in own], axis=0)
    scores.append(_checked(family.module, total.reshape(-1, family.num_units)))
  return scores


def of_layers(
  score: str,
  model: Any,
  params: Mapping[str, Any],
  batches: Batches,
  specs: Mapping[str, Any],
  seed: int,
) -> np.ndarray:
  """Scores of all layers with parameters of their own, float64 `[layers]`.

  Args:
    score: one of OF_ALL or OF_LAYERS.
    model, params, batches, seed: see `of_families`.
    specs: by path, of the per-layer view.

  Raises:
    InputError: see `of_families`; or a mixer has no output projection to go by.
  """
  number = len(model.config.layers)
  if score == "random":
    return _drawn("layers", (number,), seed)
  if score in OF_LAYERS:
    return _checked("the layers", _by_running(score, model, params, batches))
  inside = [path for path in specs if path.startswith("layer_")]
  if score != "magnitude":
    inside = [path for path in inside if _writes(specs[path])]
    for k in range(number):
      config.require(
        any(path.startswith(f"layer_{k}/mixer/") for path in inside),
        f"layer {k} ({model.config.layers[k].mixer}) has no output projection for "
        f"score={score!r}; use {' or '.join(OF_LAYERS)}",
      )
  stacked = _stacked_paths(model)
  base = {stacked(path): len(specs[path].axes) for path in inside}

  def sums(path: str, array: jax.Array) -> jax.Array:
    return jnp.sum(array, axis=tuple(range(-base[path], 0)))

  found = _values(score, model, params, batches, base, sums, whole_layers=True)
  _, flat = _unrolled(model, found)
  total = np.zeros(number)
  for path, value in flat.items():
    total[int(path.split("/")[0].removeprefix("layer_"))] += float(value)
  if score == "magnitude":
    sizes = np.zeros(number)
    for path in inside:
      sizes[int(path.split("/")[0].removeprefix("layer_"))] += specs[path].size
    total = total / sizes
  return _checked("the layers", total)


def _values(
  score: str,
  model: Any,
  params: Mapping[str, Any],
  batches: Batches,
  paths: Mapping[str, Any],
  sums: Sums,
  whole_layers: bool = False,
) -> dict[str, jax.Array]:
  """What each parameter adds to the scores of the groups in it, by path.

  Args:
    paths: of the parameters as they are, scanned or not.
    whole_layers: all parameters of a layer are one group, whose gate is one.
  """
  flat = tree_lib.flatten(params)
  if score == "magnitude":
    square = lambda path: jnp.square(verbs.dense(flat[path]).astype(jnp.float32))
    return {path: sums(path, square(path)) for path in paths}
  if score == "wanda":
    stats = tree_lib.flatten(calibrate.calibrate(model, params, batches, where=None))
    tokens = sum(float(jnp.sum(derivatives.segments(b) > 0)) for b in batches)

    def energy(path: str) -> jax.Array:
      # Sums, not means, over tokens: what is rarely used adds little.
      inputs = stats[path].square_sum[..., None] / tokens
      return inputs * jnp.square(verbs.dense(flat[path]).astype(jnp.float32))

    return {path: sums(path, energy(path)) for path in paths}

  def gates(products: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    summed = {path: sums(path, product) for path, product in products.items()}
    if not whole_layers:
      return summed
    joined: dict[str, jax.Array] = {}
    for path, value in summed.items():
      module = path.split("/mixer/")[0].split("/mlp/")[0]
      joined[f"{module}/gate"] = joined.get(f"{module}/gate", 0.0) + value
    return joined

  means, squares = derivatives.gates(model, params, batches, paths, gates)
  if score == "taylor":
    return {path: jnp.abs(mean) for path, mean in means.items()}
  return {path: 0.5 * square for path, square in squares.items()}


def _by_running(
  score: str, model: Any, params: Mapping[str, Any], batches: Batches
) -> np.ndarray:
  """Scores of layers by running them one after the other, or all but one."""
  parts = blocks.Blocks(model)
  if score == "loss":
    derivatives.require_decoder(model)
  _, flat = layers.unstack(model, params)
  number = parts.num_layers
  total, tokens = np.zeros(number), 0.0
  for batch in batches:
    full = derivatives.with_targets(batch) if score == "loss" else batch
    stream = parts.embed(flat, batch)
    for k in range(number):
      after = blocks.run(parts.layer(k), flat[f"layer_{k}"], stream)
      if score == "influence":
        total[k] += float(_apart(stream.x_BLD, after.x_BLD, stream.segments_BL))
      elif model.config.layers[k].keys != "lent":
        rest = stream
        for other in range(k + 1, number):
          rest = blocks.run(parts.layer(other), flat[f"layer_{other}"], rest)
        total[k] += float(_nll(parts.head(flat, rest), full))
      stream = after
    weights = full["weights"] if score == "loss" else derivatives.segments(batch) > 0
    tokens += float(jnp.sum(weights))
  config.require(tokens > 0, "there is no target in the batches, or no batch")
  return total / tokens


@jax.jit
def _apart(x_BLD: jax.Array, y_BLD: jax.Array, segments_BL: jax.Array) -> jax.Array:
  """1 - cosine of two streams, summed over the tokens that are no padding."""
  x_BLD, y_BLD = (a.astype(jnp.float32) for a in (x_BLD, y_BLD))
  norms_BL = jnp.linalg.norm(x_BLD, axis=-1) * jnp.linalg.norm(y_BLD, axis=-1)
  cosine_BL = jnp.sum(x_BLD * y_BLD, axis=-1) / jnp.maximum(norms_BL, 1e-30)
  return jnp.sum(jnp.where(segments_BL > 0, 1 - cosine_BL, 0.0))


@jax.jit
def _nll(logits_BLV: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
  return derivatives.nll_of_logits(logits_BLV.astype(jnp.float32), batch)


def _unit_sums(
  array: jax.Array, family: groups.Family, carrier: groups.Carrier
) -> jax.Array:
  """`[*stack, (E), units]`: an array of a parameter's shape, summed over each unit."""
  base = carrier.num_dims
  lead = array.ndim - base + (family.num_experts is not None)
  moved = jnp.moveaxis(array, carrier.dim, -1)
  units = moved.reshape(*moved.shape[:-1], family.num_units, carrier.unit)
  summed = jnp.sum(units, axis=-1)
  return jnp.sum(summed, axis=tuple(range(lead, summed.ndim - 1)))


def _writes(spec: specs_lib.ParamSpec) -> bool:
  """Whether a parameter is what its module writes to the residual stream by."""
  return spec.kind == "matrix" and spec.axes[-1] == "embed" != spec.axes[-2]


def _stacked_paths(model: Any) -> Callable[[str], str]:
  """From a path of the per-layer view to the parameter as it is held."""
  if model.runs is None:
    return lambda path: path
  at = {
    f"layer_{k}": f"{run}/{body}"
    for (run, body), members in layers.places(model.runs).items()
    for k in members
  }

  def stacked(path: str) -> str:
    first, _, rest = path.partition("/")
    return f"{at[first]}/{rest}" if first in at else path

  return stacked


def _unrolled(
  model: Any, flat: Mapping[str, jax.Array]
) -> tuple[Any, dict[str, jax.Array]]:
  unrolled, tree = layers.unstack(model, tree_lib.unflatten(dict(flat)))
  return unrolled, tree_lib.flatten(tree)


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
  rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
  return rng.random(shape)


def _checked(name: str, scores: np.ndarray) -> np.ndarray:
  config.require(
    bool(np.all(np.isfinite(scores))), f"the scores of {name} are not all finite"
  )
  return scores
