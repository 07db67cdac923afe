"""Mixed precision: each matrix of each layer in a format of its own, under a budget.

Every choice of format is tried on every matrix, its damage is estimated
(compress.sensitivity), and the choices of least total damage that fit into the budget
are taken (compress.allocate). Sources: HAWQ-V2 and V3 (Dong et al. 2020,
arXiv:1911.03852; Yao et al. 2021, arXiv:2011.10680), with a choice of sensitivities and
allocations. Deviation: the budget is of the bytes that the selected weights really
hold, with scales and all else, not of code bits.

The estimates are sums of second-order terms, and mixed need not be better than one
format for all in truth: the log has every uniform choice beside the mixture, and a
recipe should have its row too.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effjax.compress import allocate, calibrate, derivatives, sensitivity
from effjax.compress.quantize import _mixture, gptq, rtn
from effjax.core import config, errors, layers, select, technique
from effjax.core import tree as tree_lib
from effjax.weights import verbs

log = logging.getLogger(__name__)

_ROUNDINGS = {
  "rtn": (rtn.quantize, rtn.RTNOptions),
  "gptq": (gptq.quantize, gptq.GPTQOptions),
}
_LOW = {"group": 32, "symmetric": False, "scale_dtype": "float16"}
CHOICES = ({"bits": 2} | _LOW, {"bits": 3} | _LOW, {"bits": 4} | _LOW, {"bits": 8})
_BITS_PER_WEIGHT = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedOptions:
  """Options of mixed precision; at most one of the two budgets.

  Attributes:
    choices: of each format, the options of the rounding (see `effjax list formats`).
      Of rounded activations the damage is not estimated, only that of weights.
    bits_per_weight: budget: most bits that the selected weights may hold for each of
      them, with scales and all else; 4 if no budget is given.
    bytes: budget: most bytes that the selected weights may hold.
    sensitivity: how damage is estimated: "gradient", "hessian" or "output".
    allocation: how choices are made: "exact" or "greedy".
    rounding: "rtn" or "gptq". The errors of GPTQ make up for one another, which
      "output" sees, and the other two sensitivities do not.
    probes: random vectors a batch, of "hessian".
    seed: of the probes.
  """

  choices: tuple[dict[str, Any], ...] = CHOICES
  bits_per_weight: float | None = None
  bytes: int | None = None
  sensitivity: str = "gradient"
  allocation: str = "exact"
  rounding: str = "rtn"
  probes: int = 8
  seed: int = 0

  def __post_init__(self):
    for name, known in (
      ("sensitivity", sensitivity.METHODS),
      ("allocation", allocate.METHODS),
      ("rounding", _ROUNDINGS),
    ):
      if getattr(self, name) not in known:
        raise errors.unknown(name, getattr(self, name), known)
    config.require(len(self.choices) > 0, "choices are empty; give at least one format")
    config.require(
      self.bits_per_weight is None or self.bytes is None,
      "bits_per_weight and bytes are both a budget; give one of them",
    )
    if self.bits_per_weight is None and self.bytes is None:
      object.__setattr__(self, "bits_per_weight", _BITS_PER_WEIGHT)
    for name in ("bits_per_weight", "bytes", "probes"):
      value = getattr(self, name)
      config.require(value is None or value > 0, f"{name}={value} must be positive")
    self.build()

  def build(self) -> tuple[rtn.RTNOptions, ...]:
    """The options of the rounding, for each choice."""
    cls = _ROUNDINGS[self.rounding][1]
    return tuple(
      config.build(cls, choice, f"choices[{i}]")
      for i, choice in enumerate(self.choices)
    )

  @property
  def collect(self) -> tuple[str, ...]:
    """The calibration statistics that are needed."""
    needed = {name for choice in self.build() for name in choice.collect}
    if self.sensitivity == "output" or self.rounding == "gptq":
      needed.add("hessian")
    return tuple(sorted(needed))

  def budget_bytes(self, num_weights: int) -> int:
    """The budget in bytes, for `num_weights` selected weights."""
    if self.bytes is not None:
      return self.bytes
    return int(self.bits_per_weight * num_weights / 8)


def plan(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  *,
  where: Any = None,
  options: Any = None,
) -> _mixture.Plan:
  """The table behind a mixture, without making the model; arguments as of a transform.

  Raises:
    InputError: see core.technique.ModelTransform; or the budget is too small.
  """
  if not isinstance(options, MixedOptions):
    options = TECHNIQUE.options(options)
  where = select.parse(where, TECHNIQUE.default_where)
  paths = select.select(specs, where)
  return _planned(model, params, specs, tuple(batches), paths, options)[0]


def quantize(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  paths: Collection[str],
  options: MixedOptions,
) -> tuple[Any, dict[str, Any]]:
  """Quantizes every selected matrix of every layer with the choice made for it.

  Memory: the selected weights in all choices at once, beside the model. Layers that
  came out equal are scanned together; a model that is not scanned stays so.

  Raises:
    InputError: a parameter that cannot be quantized, a budget that is too small, or
      what the sensitivity says of the model.
  """
  made, leaves = _planned(model, params, specs, batches, paths, options)
  _mixture.tell(made)
  unrolled, view = layers.unstack(model, params)
  flat = tree_lib.flatten(view)
  for unit in made.units:
    leaf = leaves[unit.choice][unit.path]
    if unit.index is not None:
      leaf = jax.tree.map(lambda a, i=unit.index: a[i], leaf)
    flat[unit.name] = leaf
  tree = tree_lib.unflatten(flat)
  return layers.restack_like(model, unrolled, tree)


def outcome(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: Collection[str],
  options: MixedOptions,
) -> tuple[Any, dict[str, Any]]:
  """The shapes with the largest choice everywhere, which no mixture exceeds.

  Which layers will differ is known only from values.

  Raises:
    InputError: a choice does not fit a parameter, the budget is below the cheapest
      choices, or the sensitivity is not for this model.
  """
  stats = None
  if options.collect:
    where = _only(paths)
    stats = calibrate.abstract(model, params, collect=options.collect, where=where)
  sensitivity.check(options.sensitivity, model, params, paths)
  parts = _parts(model, specs, paths)
  made = [
    jax.eval_shape(
      lambda params, stats, choice=choice: _rounded(
        params, specs, stats, paths, options.rounding, choice
      ),
      params,
      stats,
    )
    for choice in options.build()
  ]
  costs = _costs(made, parts)
  _budget(costs, parts, specs, options)
  largest = made[int(np.argmax(costs.sum(axis=0)))]
  return model, tree_lib.unflatten(tree_lib.flatten(params) | largest)


def _planned(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  paths: Collection[str],
  options: MixedOptions,
) -> tuple[_mixture.Plan, list[dict[str, Any]]]:
  """The table, and for each choice the leaves of the selected parameters."""
  stats = None
  if options.collect:
    where = _only(paths)
    stats = calibrate.calibrate(
      model, params, batches, collect=options.collect, where=where
    )
  leaves = [
    _rounded(params, specs, stats, paths, options.rounding, choice)
    for choice in options.build()
  ]
  parts = _parts(model, specs, paths)
  costs = _costs(leaves, parts)
  budget = _budget(costs, parts, specs, options)
  stacked = frozenset(path for path, names in parts.items() if names[0] != path)
  scores = _scores(model, params, batches, paths, stacked, stats, options)
  losses = _losses(params, specs, leaves, scores, stacked, parts, options)
  allocation = allocate.allocate(costs, losses, budget, options.allocation)
  names = tuple(
    " ".join(f"{key}={value}" for key, value in choice.items()) or "default"
    for choice in options.choices
  )
  places = _places(specs, parts, stacked)
  return _mixture.make(names, places, costs, losses, allocation, budget), leaves


def _parts(
  model: Any, specs: Mapping[str, Any], paths: Collection[str]
) -> dict[str, list[str]]:
  """Of each selected parameter the names of its units, one for each stacked layer."""
  stacked = layers.places(model.runs or ())
  parts = {}
  for path in (path for path in tree_lib.flatten(specs) if path in paths):
    run, _, rest = path.partition("/")
    body, _, name = rest.partition("/")
    members = stacked.get((run, body))
    parts[path] = [path] if members is None else [f"layer_{k}/{name}" for k in members]
  return parts


def _places(
  specs: Mapping[str, Any], parts: Mapping[str, list[str]], stacked: Collection[str]
) -> list[_mixture.Place]:
  """Where every unit is."""
  flat = tree_lib.flatten(specs)
  return [
    _mixture.Place(
      name, path, i if path in stacked else None, flat[path].size // len(names)
    )
    for path, names in parts.items()
    for i, name in enumerate(names)
  ]


def _rounded(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  rounding: str,
  choice: rtn.RTNOptions,
) -> dict[str, Any]:
  """The leaves of the selected parameters, all with one choice."""
  made = _ROUNDINGS[rounding][0](params, specs, stats, paths, choice)
  return {path: leaf for path, leaf in tree_lib.flatten(made).items() if path in paths}


def _costs(
  leaves: Sequence[Mapping[str, Any]], parts: Mapping[str, list[str]]
) -> np.ndarray:
  """Bytes held `[units, choices]`; layers that are stacked hold the same."""
  sizes = lambda leaf: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(leaf))
  rows = []
  for path, names in parts.items():
    row = [sizes(made[path]) // len(names) for made in leaves]
    rows += [row] * len(names)
  return np.array(rows, np.int64)


def _scores(
  model: Any,
  params: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  paths: Collection[str],
  stacked: Collection[str],
  stats: Any,
  options: MixedOptions,
) -> dict[str, jax.Array]:
  """What the sensitivity needs to know of each selected parameter."""
  if options.sensitivity == "output":
    return sensitivity.output_hessians(stats, batches, paths)
  if options.sensitivity == "gradient":
    return derivatives.fisher(model, params, batches, paths)
  traces = derivatives.hessian_traces(
    model, params, batches, paths, stacked, probes=options.probes, seed=options.seed
  )
  # At a minimum no trace is negative; a unit whose estimate is has no known damage.
  below = sorted(path for path, trace in traces.items() if (trace < 0).any())
  if below:
    log.warning(
      "mixed: negative traces of the Hessian count as 0 in %s; the model is not at a "
      "minimum, or more probes or batches are needed",
      ", ".join(below),
    )
  return {path: trace.clip(min=0) for path, trace in traces.items()}


def _losses(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  leaves: Sequence[Mapping[str, Any]],
  scores: Mapping[str, jax.Array],
  stacked: Collection[str],
  parts: Mapping[str, list[str]],
  options: MixedOptions,
) -> np.ndarray:
  """Estimated losses `[units, choices]`, all layers of a parameter in one program."""
  flat, flat_specs = tree_lib.flatten(params), tree_lib.flatten(specs)
  rows = []
  for path, names in parts.items():
    kinds = {
      "method": options.sensitivity,
      "stacked": path in stacked,
      "transposed": flat_specs[path].kind == "embedding",
    }
    columns = [
      np.asarray(_damage(flat[path], made[path], scores[path], **kinds))
      for made in leaves
    ]
    columns = [column.reshape(len(names)) for column in columns]
    rows.append(np.stack(columns, axis=1))
  return np.concatenate(rows).astype(np.float64)


@functools.partial(jax.jit, static_argnames=("method", "stacked", "transposed"))
def _damage(
  old: Any,
  new: Any,
  score: jax.Array,
  *,
  method: str,
  stacked: bool,
  transposed: bool,
) -> jax.Array:
  """The estimate of each layer of one parameter, from its leaves before and after."""
  change = verbs.dense(new) - verbs.dense(old)
  return sensitivity.estimate(
    method, score, change, stacked=stacked, transposed=transposed
  )


def _budget(
  costs_UC: np.ndarray,
  parts: Mapping[str, list[str]],
  specs: Mapping[str, Any],
  options: MixedOptions,
) -> int:
  """The budget in bytes; raises InputError if nothing fits into it."""
  flat = tree_lib.flatten(specs)
  num_weights = sum(flat[path].size for path in parts)
  budget, least = options.budget_bytes(num_weights), int(costs_UC.min(axis=1).sum())
  config.require(
    least <= budget,
    f"a budget of {budget} bytes ({8 * budget / num_weights:.3f} bits a weight) is too "
    f"small: the cheapest choices take {least} ({8 * least / num_weights:.3f})",
  )
  return budget


def _only(paths: Collection[str]) -> select.Where:
  return select.Where(path="^(?:" + "|".join(map(re.escape, sorted(paths))) + ")$")


TECHNIQUE = technique.ModelTransform(
  fn=quantize,
  options_cls=MixedOptions,
  default_where=select.Where(kind=("matrix",)),
  needs_batches=True,
  outcome=outcome,
  depends_on_values=True,
)
