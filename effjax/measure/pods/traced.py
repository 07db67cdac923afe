"""What a training step of a model keeps and multiplies, from traces of its gradient.

Traced once for a model, its recomputation and its length, with shapes, as on one chip;
nothing is compiled. What a layer keeps for the backward pass is what the forward scan
over layers writes and the backward scan reads; how many rows of a batch it belongs to
is told by tracing two batches, and what may be split over "tensor" by the names that
its dimensions inherit from parameters (`labels`).
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from effjax.core import config as config_lib
from effjax.core import partition
from effjax.core import shard as shard_lib
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.measure.pods import labels
from effjax.ops import flops as ops_flops
from effjax.parallel import sharding
from effjax.parallel import spread as spread_lib
from effjax.train import lowering

# Rows of the batches that are traced: one row alone could be mistaken for no batch.
_FEW, _MANY = 2, 4
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
  """An array that every layer of a run keeps for the backward pass.

  Attributes:
    shape: of one layer's, for `_FEW` rows.
    axes: logical axis of each dimension; "batch" where it grows with the rows.
    row_bytes: of all layers, for one row.
    once_bytes: of all layers, however many rows there are.
  """

  shape: tuple[int, ...]
  axes: labels.Axes
  row_bytes: float
  once_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
  """A parameter that activations are multiplied by.

  Attributes:
    path: of the parameter.
    spec: its ParamSpec.
    layers: how many such matrices are stacked.
    row_flops: of a forward pass of one row, all layers together.
    is_last: whether its part of a layer (its mixer or its MLP) is the last one.
  """

  path: str
  spec: specs_lib.ParamSpec
  layers: int
  row_flops: int
  is_last: bool

  @property
  def dims(self) -> tuple[int, int]:
    """Places in the spec's axes of what is contracted, and of what comes out.

    Embeddings are contracted in their width, as a tied head.
    """
    last = len(self.spec.axes) - 1
    return (last, last - 1) if self.spec.kind == "embedding" else (last - 1, last)

  def size(self, dim: int) -> int:
    """Of a dimension of `dims`."""
    return self.spec.shape[len(self.spec.stack) + dim]

  @property
  def read(self) -> float:
    """Entries of activations that a row's product reads, all layers together."""
    return self.row_flops / (2 * self.size(self.dims[1]))

  @property
  def made(self) -> float:
    """Entries that it makes."""
    return self.row_flops / (2 * self.size(self.dims[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """Of a training step, whatever it is spread over.

  Attributes:
    steps: the training, and the shape of its batches.
    params: what trains, of shapes.
    frozen: what does not.
    opt_state: the optimizer's state.
    collections: of the model's state.
    other_bytes: of the rest of the state, which every device holds.
    products: parameters that activations are multiplied by, in order of use.
    kept: see Kept.
    model_flops: of a step of all rows that the model needs, as it is told.
    row_flops: of one row that run, recomputed ones and attention included.
    unowned_flops: of the forward pass of one row, products of two activations.
    mixed: bytes that these read and make in a forward pass of one row, in float32 and
      but for kernels: of all layers, and of the layer that has most.
  """

  steps: lowering.Steps
  params: Any
  frozen: Any
  opt_state: Any
  collections: Any
  other_bytes: int
  products: tuple[Product, ...]
  kept: tuple[Kept, ...]
  model_flops: float
  row_flops: int
  unowned_flops: int
  mixed: tuple[float, float]

  @functools.cached_property
  def specs(self) -> dict[str, specs_lib.ParamSpec]:
    """ParamSpecs by path."""
    return tree_lib.flatten(self.steps.training.specs)

  @property
  def remat(self) -> str:
    """What the backward pass recomputes."""
    return self.steps.training.model.config.remat


def facts(steps: lowering.Steps, one: spread_lib.Spread, model_flops: float) -> Facts:
  """Traces a training.

  Args:
    steps: the training; its layers must be scanned for what they keep to be seen.
    one: a single device of the kind that it will run on, which decides what is traced
      (attention by a kernel).
    model_flops: of a step that the model needs, for its utilization.

  Raises:
    InputError: the training has a teacher.
  """
  training = steps.training
  config_lib.require(
    training.teacher is None,
    "a training with a teacher has no closed form; compile its step",
  )
  state, fixed = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), steps.shapes(one)
  )
  forward = _forward(steps, state.collections)
  found = Facts(
    steps=steps,
    params=state.params,
    frozen=fixed["frozen"],
    opt_state=state.opt_state,
    collections=state.collections,
    other_bytes=_num_bytes((state.step, state.collections, state.key_data)),
    products=_products(forward, tree_lib.flatten(training.specs)),
    kept=(),
    model_flops=model_flops,
    row_flops=0,
    unowned_flops=forward[""],
    mixed=(0.0, 0.0),
  )
  found = dataclasses.replace(found, mixed=_mixed(found, one))
  return recomputing(found, training.model.config.remat, one)


def recomputing(facts: Facts, remat: str, one: spread_lib.Spread) -> Facts:
  """The facts of the same training with other recomputation; see `facts`."""
  changed = dataclasses.replace(facts, steps=_with_remat(facts.steps, remat))
  return dataclasses.replace(
    changed,
    kept=_kept(changed, one),
    row_flops=ops_flops.dot_flops(*_gradient(changed, 1)),
  )


def _with_remat(steps: lowering.Steps, remat: str) -> lowering.Steps:
  model = steps.training.model
  config = dataclasses.replace(model.config, remat=remat)
  training = dataclasses.replace(steps.training, model=model.clone(config=config))
  return dataclasses.replace(steps, training=training)


def _num_bytes(tree: Any) -> int:
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _products(
  forward: Mapping[str, int], specs: Mapping[str, specs_lib.ParamSpec]
) -> tuple[Product, ...]:
  found = {
    path: cost
    for path, cost in forward.items()
    if cost and path in specs and len(specs[path].axes) > 1
  }
  # Of run_0/layer_0/mixer/q/kernel: the layer, and which part of it comes last.
  part = lambda path: path.split("/")[:3]
  last = {tuple(part(path)[:2]): part(path) for path in found}
  return tuple(
    Product(
      path=path,
      spec=specs[path],
      layers=math.prod(specs[path].shape[: len(specs[path].stack)]),
      row_flops=cost,
      is_last=last[tuple(part(path)[:2])] == part(path),
    )
    for path, cost in found.items()
  )


def _loss(steps: lowering.Steps, variables: Any, batch: Any) -> jax.Array:
  """What a step differentiates."""
  config = steps.config
  model = steps.training.model.clone(precision=config.precision)
  with config.precision.context():
    loss_fn = config.make_loss()
    return loss_fn(model, variables, batch, jax.random.key(0)).objective


def _batch(steps: lowering.Steps, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  shape = (rows, steps.length)
  kinds = dict.fromkeys(("inputs", "targets", "segments", "positions"), jnp.int32)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, dtype in (kinds | {"weights": jnp.float32}).items()
  }


def _forward(steps: lowering.Steps, collections: Any) -> dict[str, int]:
  """FLOPs of the loss of one row, by the parameter multiplied with."""
  flat = tree_lib.flatten(steps.training.params)

  def fn(flat: Any, collections: Any, batch: Any) -> jax.Array:
    variables = {"params": tree_lib.unflatten(flat), **collections}
    return _loss(steps, variables, batch)

  return ops_flops.per_parameter(fn, flat, collections, _batch(steps, 1))


def _objective(facts: Facts, rows: int) -> tuple[Any, ...]:
  """The loss as a function of what trains and of the rest, and all their shapes."""

  def objective(params: Any, frozen: Any, collections: Any, batch: Any) -> jax.Array:
    variables = {"params": partition.merge(params, frozen), **collections}
    return _loss(facts.steps, variables, batch)

  batch = _batch(facts.steps, rows)
  return objective, facts.params, facts.frozen, facts.collections, batch


def _gradient(facts: Facts, rows: int) -> tuple[Any, ...]:
  """The same of the loss and its gradient."""
  objective, *args = _objective(facts, rows)
  return jax.value_and_grad(objective), *args


def _walked(facts: Facts, one: spread_lib.Spread, fn: Any, *args: Any) -> labels.Labels:
  """The names of what a function of `_objective`'s arguments computes on a device."""
  with shard_lib.use_rules(one.mesh, ()):
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  jaxpr = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
  walked = labels.Labels()
  walked.walk(jaxpr[0], _named(facts, args))
  return walked


def _mixed(facts: Facts, one: spread_lib.Spread) -> tuple[float, float]:
  """See Facts.mixed."""
  # What is recomputed at once stands in one equation: a layer.
  whole = dataclasses.replace(facts, steps=_with_remat(facts.steps, "full"))
  walked = _walked(whole, one, *_objective(whole, _FEW))
  repeats = {id(scan): scan.params["length"] for scan in walked.scans}
  total, layers = 0.0, Counter()
  for around, (eqn, times) in walked.products.items():
    entries = sum(var.aval.size for var in (*eqn.invars, *eqn.outvars))
    moved = entries * times * _FLOAT32 / _FEW
    total += moved
    layers[around[:2]] += moved / repeats.get(around[0], 1)
  return total, max(layers.values(), default=0.0)


def _kept(facts: Facts, one: spread_lib.Spread) -> tuple[Kept, ...]:
  few, many = (_stacked(facts, rows, one) for rows in (_FEW, _MANY))
  found = []
  for (aval, axes), (larger, _) in zip(few, many, strict=True):
    row = (larger.size - aval.size) / (_MANY - _FEW)
    grows = [a != b for a, b in zip(aval.shape, larger.shape, strict=True)]
    named = ["batch" if g else a for a, g in zip(axes, grows, strict=True)]
    itemsize = aval.dtype.itemsize
    found.append(
      Kept(
        shape=aval.shape[1:],
        axes=tuple(named[1:]),
        row_bytes=row * itemsize,
        once_bytes=(aval.size - _FEW * row) * itemsize,
      )
    )
  return tuple(found)


def _stacked(
  facts: Facts, rows: int, one: spread_lib.Spread
) -> list[tuple[Any, labels.Axes]]:
  """What forward scans write and backward scans read, and its axes."""
  walked = _walked(facts, one, *_gradient(facts, rows))
  read = {
    id(var)
    for eqn in walked.scans
    if eqn.params["reverse"]
    for var in eqn.invars[eqn.params["num_consts"] + eqn.params["num_carry"] :]
  }
  found = []
  for eqn in walked.scans:
    carried = eqn.params["num_carry"]
    results = zip(eqn.outvars, walked.axes[id(eqn)], strict=True)
    for var, axes in list(results)[carried:]:
      if not eqn.params["reverse"] and id(var) in read:
        found.append((var.aval, axes))
  return found


def _named(facts: Facts, args: Any) -> list[labels.Axes]:
  """Axes of the arguments of `_gradient`."""
  named = []
  for path, array in jax.tree_util.tree_flatten_with_path(tuple(args))[0]:
    _, spec = sharding.spec_at(path, facts.specs)
    if spec is not None and spec.shape == array.shape:
      named.append(spec.all_axes)
    elif (
      isinstance(path[0], jax.tree_util.SequenceKey) and path[0].idx == len(args) - 1
    ):
      named.append(("batch", "length"))
    else:
      named.append((None,) * array.ndim)
  return named
