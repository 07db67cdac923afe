"""What is registered for optimization, and how it reads the parameters' specs.

Trees of updates and parameters may have holes: `None` where a parameter is frozen, and
optax's `MaskedNode` where another optimizer owns it. The specs tree may still hold a
spec there. Specs are therefore used as a prefix: whatever stands at a spec's place,
nothing, an array or a leaf with several arrays, belongs to that spec. What a leaf holds
of a grid (`grid_fields`: trained step sizes, offsets) is no matrix, whatever its spec.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from effjax.core import config
from effjax.core import specs as specs_lib
from effjax.weights import leaf as leaf_lib

Schedule = Callable[[Any], Any]
DECAYED_KINDS = frozenset({"matrix", "embedding", "conv", "router"})


@dataclasses.dataclass(frozen=True)
class OptimizerTechnique:
  """An optimizer the registry hands out.

  Attributes:
    make: `make(learning_rate, specs, options) -> optax.GradientTransformation`;
      `learning_rate` maps a step (from 0) to a positive rate, `specs` is the tree of
      ParamSpecs of the parameters.
    options_cls: frozen dataclass of its options, every field with a default.
  """

  make: Callable[[Schedule, Mapping[str, Any], Any], optax.GradientTransformation]
  options_cls: type

  def options(self, values: Mapping[str, Any], path: str = "options") -> Any:
    """Validated options; raises InputError with one line."""
    return config.build(self.options_cls, values, path)


@dataclasses.dataclass(frozen=True)
class ScheduleTechnique:
  """A learning rate schedule the registry hands out.

  Attributes:
    make: `make(peak, num_steps, options) -> fn`; `fn(step)` is the rate of update
      `step`, counted from 0, a float32 scalar; `step` may be traced.
    options_cls: frozen dataclass of its options, every field with a default.
  """

  make: Callable[[float, int, Any], Schedule]
  options_cls: type

  def options(self, values: Mapping[str, Any], path: str = "schedule_options") -> Any:
    """Validated options; raises InputError with one line."""
    return config.build(self.options_cls, values, path)


@dataclasses.dataclass(frozen=True)
class SparsityTechnique:
  """A kind of sparse training the registry hands out.

  Attributes:
    make: `make(inner, target, num_steps, options, key)`, the optimizer `inner` under
      masks (see optim.sparse); `target` is a sparse.Target.
    options_cls: frozen dataclass of its options, every field with a default.
    fit: `fit(options, num_steps)` raises InputError if its schedule does not fit.
    rate: `rate(rate, num_steps, options)`, the learning rate by updates of `inner`, for
      a kind that lets it leave out steps.
  """

  make: Callable[..., optax.GradientTransformation]
  options_cls: type
  fit: Callable[[Any, int], Any] | None = None
  rate: Callable[[Schedule, int, Any], Schedule] | None = None

  def options(self, values: Mapping[str, Any], path: str = "options") -> Any:
    """Validated options; raises InputError with one line."""
    return config.build(self.options_cls, values, path)


def map_with_specs(
  fn: Callable[..., Any], specs: Mapping[str, Any], tree: Any, *rest: Any
) -> Any:
  """Applies `fn(spec, array, *others)` to every array of `tree`; holes stay holes.

  Args:
    fn: gets `None` for each of `rest` that has nothing at the place of the array.
    specs: tree of ParamSpecs, a prefix of `tree`.
    tree: updates or parameters.
    *rest: trees with the structure of `tree`, or with `None` for some of its arrays.
  """

  def at_spec(spec, subtree, *others):
    return jax.tree.map(lambda *arrays: fn(spec, *arrays), subtree, *others)

  return jax.tree.map(at_spec, specs, tree, *rest)


def decay_mask(
  specs: Mapping[str, Any], decay_embedding: bool = True
) -> Callable[[Any], Any]:
  """The optax mask of the parameters that weight decay applies to.

  Matrices, convolutions, routers and (if asked for) embeddings decay; norms, biases,
  the parameters of a state space model's recurrence and step sizes never do.

  Returns:
    `mask(params)`, a tree of bools.
  """
  kinds = DECAYED_KINDS if decay_embedding else DECAYED_KINDS - {"embedding"}
  return labels(specs, lambda spec: spec.kind in kinds, False)


def labels(
  specs: Mapping[str, Any],
  of_spec: Callable[[specs_lib.ParamSpec], Any],
  of_grid: Any,
) -> Callable[[Any], Any]:
  """What optax is to do with each array of the parameters, as optax asks for it.

  Args:
    specs: tree of ParamSpecs.
    of_spec: the label of a parameter.
    of_grid: the label of what a leaf holds of a grid.

  Returns:
    `label(params)`, a tree of labels.
  """

  def one(part, label):
    if not leaf_lib.is_leaf_kind(part):
      return jax.tree.map(lambda _: label, part)
    fields = {
      name: one(getattr(part, name), of_grid if name in part.grid_fields else label)
      for name in part.data_fields
    }
    return dataclasses.replace(part, **fields)

  return lambda params: jax.tree.map(
    lambda spec, part: one(part, of_spec(spec)), specs, params
  )


def num_stacked(spec: specs_lib.ParamSpec, ndim: int) -> int:
  """How many leading axes of an array of rank `ndim` count separate blocks.

  A block is what a paper means by one parameter: one layer's vector, one matrix (so
  each expert is its own). Norms and ratios are taken over a block, so results do not
  depend on whether layers are stacked.
  """
  return ndim - 2 if spec.kind == "matrix" else len(spec.stack)


def block_axes(spec: specs_lib.ParamSpec, ndim: int) -> tuple[int, ...]:
  """The axes of an array of rank `ndim` that lie inside one block."""
  return tuple(range(num_stacked(spec, ndim), ndim))
