"""AdaRound with whole blocks: each weight learns whether it is rounded up or down.

Source: Nagel et al. 2020, arXiv:2004.10568, eq. 21 to 25: weights between their two
neighbours on the grid, with a variable each, a rectified sigmoid and a regularizer; and
Li et al. 2021 (BRECQ), arXiv:2102.05426, section 3: all weights of a block at once, so
that the block's output changes least, block after block. A block is a layer of the
model. Its inputs are those that the quantized layers before it produce, and its targets
what the unquantized model has there, as in BRECQ's code; padding does not count.

Every format of `effjax list formats` serves, since each knows the neighbours of a value
(the paper has integers only). Grids are fitted before and stay.

Deviations: the block's error counts in units of that of rounding to nearest, one for
each weight, so that the regularizer's factor has no unit and serves small and large
blocks (BRECQ's code: squares summed over channels, and 0.01). BRECQ weights outputs by
their Fisher information, which is left out. Steps are few by default and learn faster
(the papers: 10,000 to 20,000 with a rate of 1e-3): raise `num_steps` where time allows.
If the learned rounding is worse than the nearest on the calibration text, the nearest
is kept, and the log says so. What stands outside the layers, a head or an embedding, is
rounded to nearest before all else, and the log names it. Activations are not rounded
while learning; the errors of the log are those of the leaves that serve.
"""

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import blocks as blocks_lib
from effjax.compress.quantize import _reconstruct, rtn
from effjax.core import config, technique
from effjax.core import layers as layers_lib
from effjax.core import specs as specs_lib

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaRoundOptions(rtn.RTNOptions):
  """Options of AdaRound, beside those of the format (of integers, 4 bits by default).

  Attributes:
    range: as rtn's, with the least squared error by default.
    num_steps: of Adam, for each block (the papers: 10,000 to 20,000).
    learning_rate: of Adam.
    batch_size: sequences a step, drawn anew each time (the papers: 32 images).
    regularizer: factor of the sum of 1 - |2h - 1|^beta over the weights, where the
      block's error with rounding to nearest counts as their number.
    beta_start, beta_end: beta after the warm-up and at the end, linear in between.
    warmup: share of the steps without the regularizer.
    seed: of the draws.
  """

  range: str = "mse"
  num_steps: int = 500
  learning_rate: float = 0.05
  batch_size: int = 8
  regularizer: float = 100.0
  beta_start: float = 20.0
  beta_end: float = 2.0
  warmup: float = 0.2
  seed: int = 0

  def __post_init__(self):
    if self.format == "int" and self.bits is None:
      object.__setattr__(self, "bits", 4)
    super().__post_init__()
    config.require(
      not self.static_activations,
      f"activation_scale={self.activation_scale!r}: adaround gathers no statistics of "
      "activations; use 'dynamic'",
    )
    for name in ("num_steps", "batch_size", "learning_rate", "beta_start", "beta_end"):
      value = getattr(self, name)
      config.require(value > 0, f"{name}={value} must be positive")
    for name in ("regularizer", "seed"):
      value = getattr(self, name)
      config.require(value >= 0, f"{name}={value} must not be negative")
    config.require(
      0 <= self.warmup < 1, f"warmup={self.warmup} must be at least 0 and below 1"
    )


def quantize(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  paths: Collection[str],
  options: AdaRoundOptions,
) -> tuple[Any, dict[str, Any]]:
  """Replaces the selected parameters by leaves of the format, layer by layer.

  A `Masked` parameter keeps its zeros, and of a `LowRank` one each factor is quantized.
  The activations of all batches are held twice, as they are with and without
  quantization.

  Raises:
    InputError: a parameter is no matrix or quantized already, a group that does not
      divide, or the output of a layer is not finite.
  """
  outcome(model, params, specs, paths, options)  # Mistakes show before anything runs.
  inside, rest = blocks_lib.split(model, paths)
  unrolled, flat = layers_lib.unstack(model, params)
  specs = specs_lib.specs(unrolled)
  made = flat | _outside(flat, specs, rest, options)
  parts = blocks_lib.Blocks(model)
  full, ours = (
    jax.tree.map(
      lambda *a: jnp.stack(a), *(parts.embed(tree, batch) for batch in batches)
    )
    for tree in (flat, made)
  )
  for k in range(max(inside, default=-1) + 1):
    name, layer = f"layer_{k}", parts.layer(k)
    full = _reconstruct.run(layer, flat[name], full)
    if k not in inside:
      ours = _reconstruct.run(layer, flat[name], ours)
      continue
    block = _reconstruct.block(layer, specs[name], inside[k], options)
    key = jax.random.fold_in(jax.random.key(options.seed), k)
    made[name], ours = _rounded(name, block, flat[name], ours, full.x_BLD, key)
  return layers_lib.restack_like(model, unrolled, made)


def outcome(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: Collection[str],
  options: AdaRoundOptions,
) -> tuple[Any, dict[str, Any]]:
  """The model and the shapes of its parameters; those of rounding to nearest."""
  models = []

  def trace(params: Mapping[str, Any]) -> dict[str, Any]:
    made = rtn.quantize(params, specs, None, paths, options)
    stacked, made = layers_lib.restack_like(model, *layers_lib.unstack(model, made))
    models.append(stacked)
    return made

  shapes = jax.eval_shape(trace, dict(params))
  return models[0], shapes


def _outside(
  flat: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: frozenset[str],
  options: AdaRoundOptions,
) -> dict[str, Any]:
  """What stands outside the layers, with `paths` of it rounded to nearest."""
  outside = blocks_lib.outside(flat)
  if not paths:
    return outside
  log.info(
    "adaround: rounded to nearest, outside the layers: %s", ", ".join(sorted(paths))
  )
  about = {name: specs[name] for name in outside}
  return rtn.quantize(outside, about, None, paths, options)


def _rounded(
  name: str,
  block: _reconstruct.Block,
  params: Mapping[str, Any],
  inputs: blocks_lib.Stream,
  targets: jax.Array,
  key: jax.Array,
) -> tuple[dict[str, Any], blocks_lib.Stream]:
  """A layer's parameters, and what it puts out with them; logs the errors.

  Args:
    name: of the layer.
    block, params, inputs, targets, key: see _reconstruct.learned.
  """
  matrices = _reconstruct.prepare(block, params)
  nearest = {path: matrix.nearest for path, matrix in matrices.items()}

  def outcome_of(params: dict[str, Any]) -> tuple[Any, blocks_lib.Stream, float]:
    stream = _reconstruct.run(block.layer, params, inputs)
    return params, stream, float(_reconstruct.error(stream, targets))

  *plain, before = outcome_of(_reconstruct.rounded(block, params, matrices, nearest))
  config.require(
    math.isfinite(before),
    f"adaround: with weights rounded to nearest, {name} puts out what is not finite",
  )
  codes, soft, flipped = _reconstruct.learned(
    block, params, matrices, inputs, targets, jnp.float32(before), key
  )
  *_, between = outcome_of(soft)
  *best, after = outcome_of(_reconstruct.rounded(block, params, matrices, codes))
  log.info(
    "adaround: %s: mean squared error %.3g rounded to nearest, %.3g learned, %.3g with "
    "what was learned rounded (%.1f %% of the codes are not the nearest)",
    *(name, before, between, after, 100 * float(flipped)),
  )
  if not after <= before:
    log.warning(
      "adaround: %s: the learned rounding is worse than the nearest, which is kept; "
      "try more steps (num_steps) or another learning_rate",
      name,
    )
    best = plain
  return best[0], best[1]


TECHNIQUE = technique.ModelTransform(
  fn=quantize, options_cls=AdaRoundOptions, needs_batches=True, outcome=outcome
)
