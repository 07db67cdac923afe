"""Structured pruning: whole neurons, heads, experts or layers go, and a model remains.

It is smaller in its config and in every parameter, and computes what the model before
did with those groups at zero (experts: were they never chosen; layers of a post-norm
encoder are not nothing at zero, so there it does not). Any score (`_group_scores`) goes
with any groups and any budget; groups are index sets of the axes that modules declare
(core.groups), so that a new mixer can be pruned once its options say how they become
narrower.

| groups      | of an axis | what one takes along                                      |
|-------------|------------|-----------------------------------------------------------|
| "neurons"   | mlp        | a hidden unit; of each expert its own                     |
| "heads"     | heads      | a query head; of every key head equally many              |
| "kv_groups" | kv         | a key head with all query heads it serves                 |
| "experts"   | experts    | an expert and its column of the router                    |
| "ssm_heads" | inner      | a head (or, of Mamba, a channel) of a recurrent mixer     |
| "layers"    |            | a layer; the residual stream passes by                    |

Where each query head has a key head of its own, "heads" removes both. The budgets
"params", "flops" and "latency" choose among sizes of all layers such that the scores of
what goes sum to the least (compress.allocate, greedy), as knapsack formulations of
structured pruning do (Shen et al. 2022, arXiv:2110.10811, section 3).
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.compress import blocks
from effjax.compress.prune import _group_scores, _group_sizes, _removal
from effjax.core import config, errors, groups, layers, select, technique
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib

log = logging.getLogger(__name__)

AXES = {
  "neurons": "mlp",
  "heads": "heads",
  "kv_groups": "kv",
  "experts": "experts",
  "ssm_heads": "inner",
}
GROUPS = (*AXES, "layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOptions:
  """Options of structured pruning.

  Attributes:
    groups: one of GROUPS, or several that are not parts of the same modules.
    score: see `_group_scores`; "influence" and "loss" are of layers. The default is as
      good as "fisher" where both were measured, and takes no gradients.
    sparsity: share to remove, in [0, 1): of the groups ("uniform", "global"), or of the
      parameters, FLOPs or time of all layers of the model.
    budget: "uniform" (the same share everywhere), "global" (one threshold over all
      scores), "params", "flops" or "latency" (measured on the device at hand).
    multiple_of: how many groups of a module stay is a multiple of it.
    tokens: length of the one sequence that FLOPs and latency are of.
    seed: of score="random".
  """

  groups: str | tuple[str, ...] = "neurons"
  score: str = "wanda"
  sparsity: float = 0.25
  budget: str = "uniform"
  multiple_of: int = 1
  tokens: int = 128
  seed: int = 0

  def __post_init__(self):
    if isinstance(self.groups, str):
      object.__setattr__(self, "groups", (self.groups,))
    config.require(len(self.groups) > 0, f"groups is empty; name one of {GROUPS}")
    for name in self.groups:
      if name not in GROUPS:
        raise errors.unknown("groups", name, GROUPS)
    config.require(
      "layers" not in self.groups or self.groups == ("layers",),
      "groups='layers' goes alone; prune the others in a stage of their own",
    )
    scores = _group_scores.OF_ALL
    if self.groups == ("layers",):
      scores += _group_scores.OF_LAYERS
    if self.score not in scores:
      raise errors.unknown(f"score of {'/'.join(self.groups)}", self.score, scores)
    if self.budget not in _group_sizes.BUDGETS:
      raise errors.unknown("budget", self.budget, _group_sizes.BUDGETS)
    config.require(
      0.0 <= self.sparsity < 1.0,
      f"sparsity={self.sparsity} must be at least 0 and below 1",
    )
    for name in ("multiple_of", "tokens"):
      value = getattr(self, name)
      config.require(value > 0, f"{name}={value} must be positive")
    config.require(self.seed >= 0, f"seed={self.seed} must not be negative")

  @property
  def needs_batches(self) -> bool:
    """Whether the score is of text."""
    return self.score in _group_scores.NEEDS_TEXT


class Scorers(NamedTuple):
  """Where scores come from.

  Attributes:
    families: of the units of each family, `[E or 1, units]`.
    layers: of all layers, by the specs of the per-layer view, `[layers]`.
  """

  families: Callable[[Sequence[groups.Family]], list[np.ndarray]]
  layers: Callable[[Mapping[str, Any]], np.ndarray]


def prune(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  paths: Collection[str],
  options: StructuredOptions,
) -> tuple[Any, dict[str, Any]]:
  """The smaller model and its parameters.

  A module takes part if every parameter is selected by which its groups write into the
  residual stream; a layer, if any of its parameters is.

  Raises:
    InputError: nothing selected has such groups, nothing would be left of a module, its
      config cannot do without a group, or a parameter is held in another leaf kind.
  """
  del specs
  given = (options.score, model, params, batches)
  score = Scorers(
    families=lambda found: _group_scores.of_families(*given, found, options.seed),
    layers=lambda about: _group_scores.of_layers(*given, about, options.seed),
  )
  return _changed(model, params, paths, options, score)


def _outcome(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: Collection[str],
  options: StructuredOptions,
) -> tuple[Any, dict[str, Any]]:
  """What `prune` makes, of shapes; the model as it is where scores tell the sizes."""
  del specs
  if options.budget != "uniform":
    # A device is asked only when the stage runs.
    options = dataclasses.replace(
      options, budget={"latency": "global"}.get(options.budget, options.budget)
    )
    unrolled = model.with_runs(None)
    flat = jax.eval_shape(lambda p: layers.unstack(model, p)[1], dict(params))
    _prepared(model, unrolled, tree_lib.flatten(flat), paths, options)
    return model, dict(params)
  # Which groups go changes no shape; of layers that differ the smallest go.
  any_scores = Scorers(
    families=lambda found: [np.zeros((f.num_experts or 1, f.num_units)) for f in found],
    layers=lambda about: _layer_sizes(model, about),
  )
  changed = []

  def make(params: Mapping[str, Any]) -> dict[str, Any]:
    made = _changed(model, params, paths, options, any_scores)
    changed.append(made[0])
    return made[1]

  shapes = jax.eval_shape(make, dict(params))
  return changed[0], shapes


def _changed(
  model: Any,
  params: Mapping[str, Any],
  paths: Collection[str],
  options: StructuredOptions,
  score: Scorers,
) -> tuple[Any, dict[str, Any]]:
  """The smaller model, by any scores."""
  unrolled, tree = layers.unstack(model, params)
  flat = tree_lib.flatten(tree)
  about = tree_lib.flatten(specs_lib.specs(unrolled))
  found, sizes = _prepared(model, unrolled, flat, paths, options)
  if options.groups == ("layers",):
    kept = _group_sizes.layers(unrolled, score.layers(about), found, sizes)
    _tell_layers(len(model.config.layers), kept)
    return _removal.restacked(model, *_removal.without_layers(unrolled, flat, kept))
  scores = score.families(found)
  counts = sizes
  if options.budget != "uniform":
    counts = _group_sizes.budgeted(found, scores, sizes)
  kept = [
    _group_sizes.best(family, s, count)
    for family, s, count in zip(found, scores, counts, strict=True)
  ]
  _tell(found, kept)
  smaller = _removal.remove(unrolled, flat, list(zip(found, kept, strict=True)))
  return _removal.restacked(model, *smaller)


def _prepared(
  model: Any,
  unrolled: Any,
  flat: Mapping[str, Any],
  paths: Collection[str],
  options: StructuredOptions,
) -> tuple[Any, Any]:
  """What may go and how much of it, checked before anything is scored.

  Returns:
    Numbers of layers and their choices; else the families, and how many units of each
    stay, or the choices of a budget.
  """
  if options.groups == ("layers",):
    inside, _ = blocks.split(model, paths)
    candidates = [k for k in sorted(inside) if model.config.layers[k].keys != "lent"]
    return candidates, _group_sizes.layer_choices(unrolled, candidates, options)
  about = tree_lib.flatten(specs_lib.specs(unrolled))
  found = _families(model, unrolled, about, paths, options)
  for family in found:
    _removal.require_removable(flat, family)
  if options.budget != "uniform":
    return found, _group_sizes.choices(unrolled, found, options)
  counts = _group_sizes.uniform(found, options)
  for family, count in zip(found, counts, strict=True):
    _removal.narrowed(unrolled, family, count)
  return found, counts


def _layer_sizes(model: Any, about: Mapping[str, Any]) -> np.ndarray:
  """Parameters of each layer."""
  sizes = np.zeros(len(model.config.layers))
  for path, spec in about.items():
    if path.startswith("layer_"):
      sizes[int(path.split("/")[0].removeprefix("layer_"))] += spec.size
  return sizes


def _families(
  model: Any,
  unrolled: Any,
  about: Mapping[str, Any],
  paths: Collection[str],
  options: StructuredOptions,
) -> list[groups.Family]:
  """The selected families with such groups, of which none is part of another."""
  inside, _ = blocks.split(model, paths)
  chosen = {f"layer_{k}/{name}" for k, names in inside.items() for name in names}
  kinds = model.config.layers
  found: list[groups.Family] = []
  for name in options.groups:
    own = [
      family
      for family in groups.families(about, AXES[name])
      if family.outputs and chosen.issuperset(family.outputs)
    ]
    config.require(
      len(own) > 0,
      f"no selected module has {name} (axis {AXES[name]!r}); there are layers of "
      + ", ".join(dict.fromkeys(f"{c.mixer} and {c.mlp}" for c in kinds)),
    )
    for family in own:
      config.require(
        not any(_overlap(family, other) for other in found),
        f"groups={options.groups} overlap in {family.module}; prune them in stages of "
        "their own",
      )
    found += own
  for family in found:
    # What cannot be narrowed at all says so before anything is scored.
    _removal.narrowed(unrolled, family, family.num_units)
  return found


def _overlap(one: groups.Family, other: groups.Family) -> bool:
  return bool({c.path for c in one.carriers} & {c.path for c in other.carriers})


def _tell(found: Sequence[groups.Family], kept: Sequence[np.ndarray]) -> None:
  for family, units in zip(found, kept, strict=True):
    log.info(
      "structured: %s keeps %d of %d %s%s",
      family.module,
      units.shape[-1],
      family.num_units,
      family.axis,
      "" if family.num_experts is None else " of each expert",
    )


def _tell_layers(number: int, kept: Sequence[int]) -> None:
  gone = sorted(set(range(number)) - set(kept))
  log.info("structured: %d of %d layers stay, %s go", len(kept), number, gone or "none")


TECHNIQUE = technique.ModelTransform(
  fn=prune,
  options_cls=StructuredOptions,
  default_where=select.Where(kind=("matrix",)),
  outcome=_outcome,
  depends_on_values=True,
)
