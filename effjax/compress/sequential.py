"""A transform applied layer by layer, each calibrated on what the ones before leave.

Source: Frantar et al. 2022, arXiv:2210.17323, section 3.3 and the authors' code: the
inputs of a layer are those that the layers before it produce as they are then, and with
`true_sequential` also within a layer the inputs of a weight are those that the weights
used before it produce. Only one layer's statistics exist at a time.

What stands outside the layers comes last: a head, or a tied embedding, is calibrated on
what flows into it, and an embedding that is only looked up has no inputs.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from effjax.compress import blocks as blocks_lib
from effjax.compress import calibrate
from effjax.core import config, technique
from effjax.core import layers as layers_lib
from effjax.core import specs as specs_lib


def transform(
  change: technique.Transform,
  model: Any,
  params: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  paths: Collection[str],
  options: Any,
  *,
  true_sequential: bool = False,
  limit_bytes: int = calibrate.LIMIT_BYTES,
) -> tuple[Any, dict[str, Any]]:
  """The model and its parameters after a transform that needs statistics.

  Args:
    change: the transform.
    model: a decoder or an encoder.
    params: its parameters, as the model holds them.
    batches: dicts of arrays, all of one shape; see calibrate.calibrate.
    paths: of the selected parameters.
    options: of the transform.
    true_sequential: whether the weights of a layer are changed in the order in which
      they are used, those that read the same activations together.
    limit_bytes: most memory the statistics of one layer may take.

  Returns:
    The model, stacked again where it was, and its parameters.

  Raises:
    InputError: as calibrate.calibrate and the transform raise it, with the path.
  """
  config.require(bool(batches), "calibration needs at least one batch")
  collect = change.collected(options)
  inside, rest = blocks_lib.split(model, paths)
  unrolled, flat = layers_lib.unstack(model, params)
  specs = specs_lib.specs(unrolled)
  parts = blocks_lib.Blocks(model)
  streams = [parts.embed(flat, batch) for batch in batches]
  for k in range(parts.num_layers):
    name, layer = f"layer_{k}", parts.layer(k)
    chosen = inside.get(k, frozenset())
    for together in _steps(layer, flat[name], streams[0], chosen, true_sequential):
      stats: dict[str, Any] = {}
      _check_limit(layer, flat[name], streams[0], collect, together, limit_bytes)
      for stream in streams:
        stats = blocks_lib.observe(layer, flat[name], stats, stream, collect, together)
      flat[name] = _changed(
        change, name, flat[name], specs[name], stats, together, options
      )
    streams = [blocks_lib.run(layer, flat[name], stream) for stream in streams]
  if rest:
    stats = {}
    for stream in streams:
      stats = parts.observe_head(flat, stats, stream, collect, rest)
    found = calibrate.finished(stats) if stats else {}
    outside = blocks_lib.outside(flat)
    about = {key: specs[key] for key in outside}
    flat |= change.fn(outside, about, found, frozenset(rest), options)
  return layers_lib.restack_like(model, unrolled, flat)


def _steps(
  layer: blocks_lib.Layer,
  params: Mapping[str, Any],
  stream: blocks_lib.Stream,
  chosen: frozenset[str],
  true_sequential: bool,
) -> tuple[frozenset[str], ...]:
  """The selected weights of a layer, those that are changed together."""
  if not chosen:
    return ()
  if not true_sequential:
    return (chosen,)
  used = blocks_lib.uses(layer, params, stream, chosen)
  # What reads nothing goes with the last, for the transform to say what it says.
  unused = chosen.difference(*used)
  steps = [frozenset(paths) for paths in used] or [frozenset()]
  return (*steps[:-1], steps[-1] | unused)


def _check_limit(
  layer: blocks_lib.Layer,
  params: Mapping[str, Any],
  stream: blocks_lib.Stream,
  collect: Sequence[str],
  paths: Collection[str],
  limit_bytes: int,
) -> None:
  shapes = jax.eval_shape(
    lambda p, s: blocks_lib.observe(layer, p, {}, s, collect, paths), params, stream
  )
  calibrate.require_fits(shapes, limit_bytes)


def _changed(
  change: technique.Transform,
  name: str,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Mapping[str, Any],
  paths: Collection[str],
  options: Any,
) -> dict[str, Any]:
  """A layer's parameters after the transform; in messages it has its whole path."""
  whole = frozenset(f"{name}/{path}" for path in paths)
  # Only what is chosen is handed over: the rest may be of kinds it does not take.
  found = {name: calibrate.finished(stats) if stats else {}}
  changed = change.fn({name: params}, {name: specs}, found, whole, options)
  return changed[name]
