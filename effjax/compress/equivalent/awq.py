"""AWQ: weights that large activations meet are scaled up before they are rounded.

Source: Lin et al. 2023, arXiv:2306.00978, section 3.2, with the constants of the
authors' code. A pair's channels get the scales

    s_j = mean|x_j|^(k / n), at least 1e-4, divided by sqrt(max s min s)

with the k in 0 ... n - 1 that changes the outcome least when the readers are rounded to
nearest; the producer is divided by s. Then every weight is clipped, per output and
group, at the share 1, 0.95, ... 0.55 of its largest magnitude with the least error of
its own outputs. What comes out is plain weights; a stage that quantizes them must
follow, with the same format (rtn, gptq).

Deviations: the error is that of the output of the whole layer, where the authors' code
measures after the attention, after the MLP, or after the linear itself, by tables of
modules; the experts of a layer have one k, each with scales of its own; values read by
grouped queries are scaled too; clipping uses all calibration tokens, not 512 of them,
since second moments hold all that matters. Not clipped are, in place of q and k by
name, projections to heads whose outputs no weight reads linearly: those that end in
scores and gates (`clip_skip` names more). Pairs outside the layers, such as the last
norm and the head, are left alone.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import blocks as blocks_lib
from effjax.compress import calibrate, merged
from effjax.compress.equivalent import _pairs, _search
from effjax.compress.quantize import rtn
from effjax.core import config, errors, technique
from effjax.core import layers as layers_lib
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQOptions(rtn.RTNOptions):
  """Options of AWQ, beside those of the format that weights will be rounded to.

  Integers are of 4 bits in groups of 32 where neither is given.

  Attributes:
    num_grid: n, exponents that are tried.
    clip: whether weights are clipped after they are scaled; without, the function stays
      what it was.
    clip_skip: regular expression of the paths that are not clipped, beside projections
      that end in scores or gates; empty for no more.
    max_tokens: most tokens that the searches run on, in whole rows of the batches.
  """

  num_grid: int = 20
  clip: bool = True
  clip_skip: str = ""
  max_tokens: int = 2048

  def __post_init__(self):
    if self.format == "int" and self.bits is None and self.group is None:
      object.__setattr__(self, "bits", 4)
      object.__setattr__(self, "group", 32)
    super().__post_init__()
    for name in ("num_grid", "max_tokens"):
      value = getattr(self, name)
      config.require(value > 0, f"{name}={value} must be positive")
    try:
      re.compile(self.clip_skip)
    except re.error as error:
      raise errors.InputError(
        f"clip_skip={self.clip_skip!r} is not a regular expression: {error}"
      ) from None

  def rounding(self) -> _search.Rounding:
    """What weights will be rounded to."""
    return _search.Rounding(self.build(), self.range, self.num_grid)


def transform(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  paths: Collection[str],
  options: AWQOptions,
) -> tuple[Any, dict[str, Any]]:
  """The model with scaled and clipped weights, plain as they were.

  Raises:
    InputError: nothing selected is a matrix of a layer, or one is quantized already or
      has inputs that the groups of the format do not divide.
  """
  del specs  # of the stacked tree; here layers stand alone
  inside, rest = blocks_lib.split(model, paths)
  config.require(
    bool(inside), "awq works on the matrices of layers, and none is selected"
  )
  unrolled, flat = layers_lib.unstack(model, params)
  of_layers = specs_lib.specs(unrolled)
  _check(flat, of_layers, inside, options)
  if rest:
    log.info("awq: left alone, in no layer: %s", ", ".join(sorted(rest)))
  parts = blocks_lib.Blocks(model)
  stream = parts.embed(flat, _first_rows(batches, options.max_tokens))
  for k in range(parts.num_layers):
    name, layer = f"layer_{k}", parts.layer(k)
    # All layers are searched on what the model was; scales change nothing of it.
    after = blocks_lib.run(layer, flat[name], stream)
    if k in inside:
      flows, about = (stream, after), {name: of_layers[name]}
      flat[name] = search_layer(
        layer, name, flat[name], about, flows, inside[k], options
      )
    stream = after
  return layers_lib.restack_like(model, unrolled, flat)


def search_layer(
  layer: blocks_lib.Layer,
  name: str,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  flows: tuple[blocks_lib.Stream, blocks_lib.Stream],
  chosen: frozenset[str],
  options: AWQOptions,
) -> dict[str, Any]:
  """The parameters of one layer, scaled and clipped.

  Args:
    layer, name, params: the layer.
    specs: of its parameters, under its name.
    flows: what flows into it and out of it.
    chosen: paths of the weights that will be rounded, as the layer names them.
    options: of the stage.
  """
  stream, after = flows
  whole = frozenset(f"{name}/{path}" for path in chosen)
  pairs = [p.within(f"{name}/") for p in _pairs.find({name: params}, specs, whole)]
  about = tree_lib.flatten(specs[name])
  clip = _to_clip(name, about, chosen, options) if options.clip else frozenset()
  readers = frozenset(r.path for pair in pairs for r in pair.readers)
  # Hessians are large: they are collected of what will be clipped alone.
  means = _observed(layer, params, stream, ("magnitudes",), readers)
  hessians = _observed(layer, params, stream, ("hessian",), clip)
  to = options.rounding()
  factors, expanded = {}, {}
  for pair in pairs:
    flows = (stream, after, {r.path: means[r.path] for r in pair.readers})
    rounded = chosen.intersection(r.path for r in pair.readers)
    found = _search.search(layer, params, *flows, pair, rounded, to)
    factors[pair.producer] = found.scales
    for reader in pair.readers:
      expanded[reader.path] = reader.expand(found.scales)
    _tell(f"{name}/{pair.producer}", found)
  flat = tree_lib.flatten(_pairs.apply(params, pairs, factors))
  for path in sorted(clip):
    w = _pairs.dense(flat[path])
    s = jnp.broadcast_to(expanded.get(path, jnp.ones(())), w.shape[:-1])
    w = _search.clipped(w, hessians[path].hessian, s, to)
    flat[path] = _pairs.with_values(flat[path], w)
  return tree_lib.unflatten(flat)


def _tell(producer: str, found: _search.Found) -> None:
  losses, best = jax.device_get((found.losses, found.best))
  log.info(
    "awq: %s exponent %d/%d, error %.4g, unscaled %.4g",
    *(producer, best, len(losses), losses[best], losses[0]),
  )


def _observed(
  layer: blocks_lib.Layer,
  params: Mapping[str, Any],
  stream: blocks_lib.Stream,
  collect: tuple[str, ...],
  paths: frozenset[str],
) -> dict[str, calibrate.InputStats]:
  """What flows into the weights of a layer, by path."""
  if not paths:
    return {}
  stats = blocks_lib.observe(layer, params, {}, stream, collect, paths)
  return tree_lib.flatten(calibrate.finished(stats))


def _to_clip(
  name: str, about: Mapping[str, Any], chosen: frozenset[str], options: AWQOptions
) -> frozenset[str]:
  """The selected weights of a layer that are clipped."""
  read = {spec.reads for spec in about.values()}

  def to_scores(path: str) -> bool:
    spec = about[path]
    has_heads = spec.head_dim and spec.axes[-1] not in specs_lib.GLOBAL_AXES
    return bool(has_heads) and f"{name}/{path}" not in read

  def skipped(path: str) -> bool:
    return bool(options.clip_skip and re.search(options.clip_skip, f"{name}/{path}"))

  return frozenset(p for p in chosen if not to_scores(p) and not skipped(p))


def _check(
  flat: Mapping[str, Any],
  specs: Mapping[str, Any],
  inside: Mapping[int, frozenset[str]],
  options: AWQOptions,
) -> None:
  """Raises InputError for a selected weight that cannot be rounded."""
  fmt = options.build()
  for k, chosen in inside.items():
    about = tree_lib.flatten(specs[f"layer_{k}"])
    leaves = tree_lib.flatten(flat[f"layer_{k}"])
    for path in sorted(chosen):
      where = f"layer_{k}/{path}"
      config.require(
        about[path].kind == "matrix",
        f"awq takes matrices; {where} is of kind {about[path].kind!r}",
      )
      merged.require("awq", where, leaves[path])
      if not _pairs.is_scalable(leaves[path]):
        raise errors.InputError(
          f"{where} is already a {leaves[path].kind} leaf; start this stage after a "
          "plain one"
        )
      try:
        fmt.group_of(about[path].shape[-2])
      except errors.InputError as error:
        raise errors.InputError(f"{where}: {error}") from None


def _first_rows(
  batches: Sequence[Mapping[str, Any]], max_tokens: int
) -> dict[str, jax.Array]:
  """As many whole rows of all batches as `max_tokens` allows, at least one."""
  length = batches[0]["inputs"].shape[1]
  num_rows = max(1, max_tokens // length)
  needed = math.ceil(num_rows / len(batches[0]["inputs"]))
  names = ("inputs", "positions", "segments")
  return {
    name: jnp.concatenate([jnp.asarray(b[name]) for b in batches[:needed]])[:num_rows]
    for name in names
    if name in batches[0]
  }


TECHNIQUE = technique.ModelTransform(
  fn=transform, options_cls=AWQOptions, needs_batches=True
)
