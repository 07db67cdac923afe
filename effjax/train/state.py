"""The train state, and where each of its arrays lives."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from effjax.core import errors, partition
from effjax.optim import sparse
from effjax.parallel import spread as spread_lib


class TrainState(flax.struct.PyTreeNode):
  """Everything an update changes, and all that a checkpoint holds.

  Attributes:
    step: updates done, int32 scalar.
    params: the trainable part of the parameters (see core.partition).
    opt_state: state of the optax chain, float32 like the parameters.
    collections: model state other than parameters: `{"state": ...}` or `{}`.
    key_data: raw data of the stage's random key; update n draws from
      `fold_in(key, n)`.
  """

  step: Any
  params: Any
  opt_state: Any
  collections: Any
  key_data: Any


def split(
  params: Mapping[str, Any], paths: frozenset[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """`(trainable, frozen)`, checked to be something gradients can be taken of.

  Raises:
    InputError: nothing trains, or a selected parameter is not floating point.
  """
  trainable, frozen = partition.partition(params, paths)
  flat, _ = jax.tree_util.tree_flatten_with_path(trainable)
  for path, array in flat:
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise errors.InputError(
        f"{jax.tree_util.keystr(path)} is {array.dtype} and cannot be trained; select "
        "floating-point parameters with `where`"
      )
  if not flat:
    raise errors.InputError("`where` selects no trainable parameter")
  return trainable, frozen


class Laid(NamedTuple):
  """A first state before there is one: its shapes, and where everything belongs.

  Attributes:
    first: `first(trainable, key_data)` computes it.
    shapes: the state, of ShapeDtypeStructs.
    shardings: NamedShardings of the state.
    trainable, frozen: the two parts of the parameters.
    frozen_shardings: NamedShardings of the frozen ones.
  """

  first: Callable[[Any, jax.Array], TrainState]
  shapes: TrainState
  shardings: TrainState
  trainable: dict[str, Any]
  frozen: dict[str, Any]
  frozen_shardings: dict[str, Any]

  def abstract(self) -> tuple[TrainState, dict[str, Any]]:
    """The state and the frozen parameters as ShapeDtypeStructs with shardings."""
    placed = lambda tree, shardings: jax.tree.map(
      lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to), tree, shardings
    )
    return (
      placed(self.shapes, self.shardings),
      placed(self.frozen, self.frozen_shardings),
    )


def lay_out(
  model: nn.Module,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: frozenset[str],
  tx: optax.GradientTransformation,
  spread: spread_lib.Spread,
) -> Laid:
  """Works out the first state, on shapes alone.

  `jit(tx.init)` alone would replicate the optimizer state: every sharding is computed
  before anything is placed.

  Args:
    model: the model.
    params: its parameters, or their ShapeDtypeStructs.
    specs: tree of ParamSpecs.
    paths: which of them train.
    tx: the update rule.
    spread: the devices, and what lies where.

  Raises:
    InputError: the selection cannot be trained, or a large array would be replicated
      although the preset splits it.
  """
  spread.check_used(specs)
  placed = spread.params(specs, params)
  trainable, frozen = split(params, paths)
  trainable_shardings, frozen_shardings = partition.partition(placed, paths)

  wrap = jax.random.wrap_key_data
  init = lambda data: model.init(wrap(data), *model.example_inputs())
  key_data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
  has_state = "state" in jax.eval_shape(init, key_data)

  def first(trainable, key_data):
    opt_state = tx.init(trainable)
    copies = jax.tree.map(jnp.copy, trainable)
    return TrainState(
      step=jnp.int32(0),
      params=sparse.masked_params(copies, opt_state),
      opt_state=opt_state,
      collections={"state": init(key_data)["state"]} if has_state else {},
      key_data=jnp.copy(key_data),
    )

  shapes = jax.eval_shape(first, trainable, key_data)
  whole = spread.whole
  shardings = TrainState(
    step=whole,
    params=trainable_shardings,
    opt_state=spread.state(specs, shapes.opt_state),
    collections=jax.tree.map(lambda _: whole, shapes.collections),
    key_data=whole,
  )
  tables = spread.preset
  spread.check(tables.params, specs, trainable, trainable_shardings)
  spread.check(tables.params, specs, frozen, frozen_shardings)
  spread.check(tables.state, specs, shapes.opt_state, shardings.opt_state)
  return Laid(first, shapes, shardings, trainable, frozen, frozen_shardings)


def place(
  model: nn.Module,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: frozenset[str],
  tx: optax.GradientTransformation,
  key: jax.Array,
  spread: spread_lib.Spread,
) -> tuple[TrainState, dict[str, Any], TrainState]:
  """The first state and the frozen parameters, each array where it belongs.

  The state's arrays are copies, since a step that donates them would otherwise delete
  the caller's parameters.

  Returns:
    `(state, frozen, shardings)`; `shardings` mirrors the state.

  Raises:
    InputError: see `lay_out`.
  """
  laid = lay_out(model, params, specs, paths, tx, spread)
  inputs = jax.device_put(
    (laid.trainable, jax.random.key_data(key)),
    (laid.shardings.params, spread.whole),
    may_alias=True,
  )
  state = jax.jit(laid.first, out_shardings=laid.shardings)(*inputs)
  frozen = jax.device_put(laid.frozen, laid.frozen_shardings)
  return state, frozen, laid.shardings


def describe(tree: Any) -> dict[str, Any]:
  """A tree's arrays as `{"path": array}`, in one fixed order."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat
  }
