"""The sparsity section of a training's config, and the wrapper it stands for."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import optax

from effjax.core import config as config_lib
from effjax.core import errors, registry
from effjax.core import select as select_lib
from effjax.core import tree as tree_lib
from effjax.ops.sparsity import amounts
from effjax.optim import base, sparse
from effjax.weights import leaf as leaf_lib

SPARSIFIERS = "effjax.optim.sparsifiers"
BUDGETS = ("uniform", "erk")
KINDS = ("matrix", "embedding")
DEFAULT_WHERE = select_lib.Where(kind=("matrix",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
  """How a training makes parameters sparse.

  Attributes:
    name: a sparsifier of `effjax list sparsifiers`.
    sparsity: share of the chosen weights that is zero in the end, in [0, 1).
    budget: "uniform", the same for each matrix, or "erk", denser where sides are short.
    where: which of the parameters that train (see core.select); None for matrices.
    options: fields of the sparsifier's options; missing ones get their defaults.

  Raises:
    InputError: a name, an option or a range is wrong.
  """

  name: str
  sparsity: float
  budget: str = "uniform"
  where: dict[str, Any] | None = None
  options: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    config_lib.require(
      0 <= self.sparsity < 1,
      f"sparsity={self.sparsity} must be at least 0 and below 1",
    )
    if self.budget not in BUDGETS:
      raise errors.unknown("budget", self.budget, BUDGETS)
    # Defaults are filled in, so that config.json says what really ran.
    where = config_lib.to_dict(select_lib.parse(self.where, DEFAULT_WHERE))
    object.__setattr__(self, "where", where)
    options = config_lib.to_dict(self.technique.options(self.options))
    object.__setattr__(self, "options", options)

  @property
  def technique(self) -> base.SparsityTechnique:
    """The registered technique."""
    return registry.find(SPARSIFIERS, self.name, "sparsifier")

  def check_fits(self, num_steps: int) -> None:
    """Raises InputError if masks would not change as asked for in `num_steps`."""
    if self.technique.fit is not None:
      self.technique.fit(self.technique.options(self.options), num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsifier:
  """A sparsifier with all that it needs but the optimizer.

  Attributes:
    config: the section.
    target: the chosen parameters, and what they keep.
    num_steps: updates of the training.
    key: random key of the masks.
  """

  config: SparsityConfig
  target: sparse.Target
  num_steps: int
  key: jax.Array

  def wrap(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, on the weights that are there."""
    technique = self.config.technique
    options = technique.options(self.config.options)
    return technique.make(inner, self.target, self.num_steps, options, self.key)

  def rate(self, rate: base.Schedule) -> base.Schedule:
    """The learning rate by updates of the optimizer, from that by steps."""
    technique = self.config.technique
    if technique.rate is None:
      return rate
    options = technique.options(self.config.options)
    return technique.rate(rate, self.num_steps, options)


def choose(
  config: SparsityConfig,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: Collection[str],
) -> sparse.Target:
  """The parameters that become sparse, and how many weights each matrix keeps.

  Args:
    config: the section.
    params: parameter tree, or its shapes.
    specs: tree of ParamSpecs of the same structure.
    paths: the parameters that train.

  Raises:
    InputError: nothing is chosen, or something that cannot be made sparse, or nothing
      would be left of a matrix.
  """
  where = select_lib.parse(config.where, DEFAULT_WHERE)
  chosen = sorted(select_lib.select(specs, where) & frozenset(paths))
  config_lib.require(
    bool(chosen), f"sparsity.where={where} selects no parameter that trains"
  )
  flat, about = tree_lib.flatten(params), tree_lib.flatten(specs)
  for path in chosen:
    leaf, kind = flat[path], about[path].kind
    config_lib.require(
      kind in KINDS,
      f"{config.name} cannot make {path} of kind {kind!r} sparse; it takes "
      f"{', '.join(KINDS)}",
    )
    config_lib.require(
      not (leaf_lib.is_leaf_kind(leaf) and leaf.pruned),
      f"{path} is already pruned and keeps its mask while it trains; start after an "
      "earlier stage, or leave it out of sparsity.where",
    )
    if leaf_lib.is_leaf_kind(leaf):
      raise errors.InputError(
        f"{path} is a {leaf.kind} leaf, and {config.name} makes plain weights sparse; "
        "start after an earlier stage, or leave it out of sparsity.where"
      )
  shapes = {path: tuple(flat[path].shape) for path in chosen}
  shares = amounts.shares(shapes, config.sparsity, config.budget)
  target = sparse.Target(shapes=shapes, shares=shares)
  for path, shape in shapes.items():
    config_lib.require(
      target.num_kept(path) > 0,
      f"nothing would be left of {path}, {shape[-2]} x {shape[-1]}, at sparsity="
      f"{config.sparsity} and budget={config.budget!r}; ask for less, or for another "
      "budget",
    )
  return target
