"""The one jitted train step; everything that varies between trainings is an argument.

Gradients are those of the summed loss, added in float32 over micro-batches and divided
once by the total weight of the targets: one big batch and any number of micro-batches
agree up to rounding, also when they hold unequal numbers of targets. Clipping and
masks belong to the optax chain (optim.config.build).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from effjax.core import errors, partition, precision
from effjax.core import shard as shard_lib
from effjax.optim import base as optim_base
from effjax.optim import sparse
from effjax.parallel import spread as spread_lib
from effjax.train import state as state_lib
from effjax.train.losses import base

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled update, `state, metrics = step(state, batch)`.

  The given state is donated: its arrays are deleted, unless the platform cannot.
  Metrics are float32 scalars on the device: `loss`, `grad_norm` (before clipping),
  `param_norm` (after the update), `lr`, `tokens` (summed weights of the targets),
  `finite` (1 while all of these are), `sparsity` (of what is made sparse while it
  trains, if anything is), and those of the loss.

  Attributes:
    fn: the jitted function `fn(state, fixed, batch)`.
    fixed: what updates read and never change: the parameters that do not train
      ("frozen"), and those of the teacher if there is one ("teacher").
    spread: the devices, and what lies where.
    micro_batches: parts a batch is cut into.
  """

  fn: Any
  fixed: dict[str, Any]
  spread: spread_lib.Spread
  micro_batches: int

  def __call__(
    self, state: state_lib.TrainState, batch: Batch
  ) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
    return self.fn(state, self.fixed, batch)

  @property
  def frozen(self) -> dict[str, Any]:
    """The parameters that do not train."""
    return self.fixed["frozen"]

  def put(self, batch: Batch) -> dict[str, jax.Array]:
    """A batch on the devices, each process giving its share of the rows.

    Raises:
      InputError: rows do not divide into micro-batches, or among the devices.
    """
    placed = {}
    for name, rows in batch.items():
      if rows.shape[0] % self.micro_batches:
        raise errors.InputError(
          f"a batch of {rows.shape[0]} sequences does not divide into "
          f"micro_batches={self.micro_batches}"
        )
      placed[name] = self.spread.put(rows)
    return placed

  def shapes(self, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What `put` makes of a batch of text, `[batch_size, length]` in all processes."""
    kinds = dict.fromkeys(("inputs", "targets", "segments", "positions"), jnp.int32)
    return {
      name: self.spread.abstract((batch_size, length), dtype)
      for name, dtype in (kinds | {"weights": jnp.float32}).items()
    }

  def num_compilations(self) -> int:
    """How often the step was compiled so far; more than once is a mistake."""
    return self.fn._cache_size()


def make(
  model: nn.Module,
  loss_fn: base.LossFn,
  tx: optax.GradientTransformation,
  lr_fn: optim_base.Schedule,
  frozen: dict[str, Any],
  shardings: state_lib.TrainState,
  *,
  specs: Mapping[str, Any],
  spread: spread_lib.Spread,
  micro_batches: int = 1,
  policy: precision.PrecisionConfig | None = None,
  teacher: base.Teacher | None = None,
) -> Step:
  """Builds the train step; nothing is compiled before its first call.

  Args:
    model: Linen module; its `precision`, where it has one, becomes `policy`.
    loss_fn: see losses.base.LossFn.
    tx: the whole update rule, clipping included.
    lr_fn: learning rate by update, for the log.
    frozen: the part of the parameters that does not train, already placed.
    shardings: NamedShardings of the state, see state.place.
    specs: tree of ParamSpecs.
    spread: the devices, and what lies where.
    micro_batches: parts a batch is cut into.
    policy: compute precision; float32 by default.
    teacher: what the loss learns from, where it needs one.
  """
  policy = policy or precision.PrecisionConfig()
  at_policy = lambda m: m.clone(precision=policy) if hasattr(m, "precision") else m
  model = at_policy(model)
  fixed = {"frozen": frozen}
  if teacher is not None:
    fixed["teacher"] = teacher.params
    teacher = dataclasses.replace(teacher, model=at_policy(teacher.model), params=None)

  def placed(gradients):
    return jax.lax.with_sharding_constraint(
      gradients, spread.gradients(specs, gradients)
    )

  def objective(trainable, fixed, collections, batch, rng):
    params = partition.merge(trainable, fixed["frozen"])
    given = {}
    if teacher is not None:
      given["teacher"] = dataclasses.replace(teacher, params=fixed["teacher"])
    loss = loss_fn(model, {"params": params, **collections}, batch, rng, **given)
    return loss.objective, loss

  def update(state, fixed, batch):
    with spread.active(), policy.context():
      key = jax.random.wrap_key_data(state.key_data)
      rng = jax.random.fold_in(key, state.step)
      gradients, loss = _accumulate(
        objective, placed, state, fixed, batch, rng, micro_batches
      )
      scale = jnp.where(loss.weight > 0, 1 / loss.weight, 0.0)
      gradients = jax.tree.map(lambda g: g * scale, gradients)
      updates, opt_state = tx.update(gradients, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      metrics = {
        "loss": loss.objective * scale,
        "grad_norm": _norm(gradients),
        "param_norm": _norm(params),
      }
      finite = jnp.stack([jnp.isfinite(m) for m in metrics.values()]).all()
      metrics |= {name: value * scale for name, value in loss.metrics.items()}
      metrics |= {
        "lr": jnp.asarray(lr_fn(state.step), jnp.float32),
        "tokens": loss.weight,
        "finite": finite.astype(jnp.float32),
      }
      if (made_sparse := sparse.find(opt_state)) is not None:
        metrics["sparsity"] = made_sparse.sparsity
      state = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        collections=loss.collections,
      )
    return state, metrics

  out_shardings = (shardings, spread.whole)
  fn = jax.jit(update, donate_argnums=0, out_shardings=out_shardings)
  return Step(fn, fixed, spread, micro_batches)


def _accumulate(objective, placed, state, fixed, batch, rng, micro_batches):
  """The gradient of the summed objective and the sums, over all micro-batches."""
  grad_fn = jax.value_and_grad(objective, has_aux=True)

  def one(collections, batch, rng):
    (_, loss), gradients = grad_fn(state.params, fixed, collections, batch, rng)
    return placed(jax.tree.map(lambda g: g.astype(jnp.float32), gradients)), loss

  if micro_batches == 1:
    return one(state.collections, batch, rng)

  def body(carry, xs):
    gradients, sums, collections = carry
    index, part = xs
    new, loss = one(collections, part, jax.random.fold_in(rng, index))
    add = lambda a, b: a + b
    gradients = jax.tree.map(add, gradients, new)
    sums = jax.tree.map(add, sums, loss._replace(collections={}))
    return (gradients, sums, loss.collections), None

  parts = jax.tree.map(lambda rows: _cut(rows, micro_batches), batch)
  first = jax.tree.map(lambda rows: rows[0], parts)
  _, shapes = jax.eval_shape(one, state.collections, first, rng)
  zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)
  start = (placed(zeros(state.params)), zeros(shapes._replace(collections={})))
  (gradients, sums, collections), _ = jax.lax.scan(
    body, (*start, state.collections), (jnp.arange(micro_batches), parts)
  )
  return gradients, sums._replace(collections=collections)


def _cut(rows: jax.Array, parts: int) -> jax.Array:
  """`[B, ...]` to `[parts, B / parts, ...]`, every device keeping its own rows.

  Part m takes rows m, m + parts, ...: a cut into consecutive rows would move nearly
  every row of a batch that is spread over devices.
  """
  cut = rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]).swapaxes(0, 1)
  return shard_lib.shard(cut, (None, "batch") + (None,) * (cut.ndim - 2))


def _norm(tree: Any) -> jax.Array:
  """Global L2 norm, float32."""
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares))
