"""Pipeline parallelism: groups of consecutive layers on different devices.

Sources: Huang et al. 2018, arXiv:1811.06965 (GPipe: a batch goes through the stages in
micro-batches); Narayanan et al. 2021, arXiv:2104.04473, section 2.2 (interleaved: each
stage has several groups of layers, which shortens the bubble); Xu et al. 2021,
arXiv:2105.04663, section 3.3 (one program for all stages: a step of the pipeline is one
vectorized call over a buffer with an axis of stages, which is then shifted by one).

With S stages, M micro-batches and V repeats there are `V M + S - 1` steps, in S - 1 of
which a stage holds no micro-batch: the bubble, `(S - 1) / (V M + S - 1)` of the time.
Group g of layers belongs to stage `g mod S`. A stage starts micro-batch m of its repeat
v in step `v M + m + stage`; what leaves the last stage waits until the first one is
done with the micro-batches before it, which needs `M >= S` where `V > 1`.

Deviations: backward steps are those of the forward steps in reverse order (no 1F1B), so
the activations of all micro-batches are held, unless layers are recomputed (remat). In
bubbles a stage computes on copies of real activations, whose results nothing reads.

Costs beside the layers: a step sends one micro-batch of activations from each stage to
the next. Parameters outside the pipeline (embedding, head, other runs of layers) are on
every stage. What comes before it is computed by every stage, on the whole batch; of
what comes after it each has a part of the rows, which the last stage sends ("rows_out"
in the rules). Parameters of a run lie in consecutive blocks of layers, which is what
GPipe wants; with `V > 1` every stage sends its groups to where they are used and gets
their gradients back once a call, and reads the group of each step out of V, whose
gradient is added into all V. Where a layer casts its parameters, the cast ones are held
for every step, unless it is recomputed.

Letters: S stages, M micro-batches, b rows of one, V repeats, k scan steps of a group, R
of the whole run (`R = V S k`).
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core import config, errors
from effjax.core import shard as shard_lib
from effjax.parallel import grouping

# `stage_fn(params, x_bLD, rows, first, key) -> (x_bLD, written)`: a group of layers.
StageFn = Callable[..., tuple[jax.Array, Any]]

_ACTIVATIONS = ("stages", "batch", "length", "embed_act")


class Place(NamedTuple):
  """What a stage works on in a step.

  Attributes:
    repeat: how often the micro-batch has been here before.
    micro_batch: its number.
    valid: whether there is one; if not, the others say what is computed instead.
  """

  repeat: jax.Array
  micro_batch: jax.Array
  valid: jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Which stage works on what, and when.

  Attributes:
    num_stages: S.
    micro_batches: M.
    repeats: V, groups of layers a stage has; 1 is GPipe.
  """

  num_stages: int
  micro_batches: int
  repeats: int = 1

  def __post_init__(self):
    config.require(
      self.repeats == 1 or self.micro_batches >= self.num_stages,
      f"mesh.repeats={self.repeats} over {self.num_stages} stages needs as many "
      f"micro-batches, not mesh.micro_batches={self.micro_batches}; make them "
      f"{self.num_stages} or more, or repeats 1",
    )

  @property
  def num_groups(self) -> int:
    """Groups of layers, S V."""
    return self.num_stages * self.repeats

  @property
  def num_steps(self) -> int:
    """Steps of the pipeline, V M + S - 1."""
    return self.repeats * self.micro_batches + self.num_stages - 1

  @property
  def bubble(self) -> float:
    """The share of the steps in which a stage has nothing to do."""
    return (self.num_stages - 1) / self.num_steps

  def at(self, step: Any, stage: Any) -> Place:
    """What a stage works on in a step; numbers or arrays of them."""
    count = self.repeats * self.micro_batches
    done = step - stage
    valid = (done >= 0) & (done < count)
    repeat, micro_batch = jnp.divmod(jnp.clip(done, 0, count - 1), self.micro_batches)
    return Place(repeat, micro_batch, valid)


_active: contextvars.ContextVar[Schedule | None] = contextvars.ContextVar(
  "active_schedule", default=None
)


@contextlib.contextmanager
def use_schedule(schedule: Schedule | None) -> Iterator[None]:
  """While open, runs of scanned layers go through a pipeline; None for no pipeline."""
  token = _active.set(schedule)
  try:
    yield
  finally:
    _active.reset(token)


def current() -> Schedule | None:
  """The schedule that is active."""
  return _active.get()


def run(
  schedule: Schedule,
  stage_fn: StageFn,
  params: Any,
  x_BLD: jax.Array,
  rows: Any = (),
  key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
  """A batch through all layers of a run.

  Micro-batch m is rows m, m + M, ..., as where gradients are accumulated. What a bubble
  computes reaches neither results nor gradients, whatever it is.

  Args:
    schedule: see Schedule.
    stage_fn: a group of layers, `(params, x_bLD, rows, first, key)` to `(x_bLD,
      written)`; `first` is the number of its first scan step in the run, and the arrays
      of `written` have an axis of its k scan steps first. It may not close over what
      gradients are taken of.
    params: pytree of arrays `[R, ...]`; integers get no gradient.
    x_BLD: activations.
    rows: pytree of integer arrays `[B, ...]` that belong to the rows.
    key: random key; `stage_fn` gets another one for each micro-batch. None for none.

  Returns:
    Activations, and `written` as `[R, ...]`, the means over the micro-batches.

  Raises:
    InputError: the rows do not divide into micro-batches, or those among devices.
  """
  size = schedule.micro_batches
  _check_rows(x_BLD.shape[0], size)
  x_MbLD = _cut(x_BLD, size)
  travelling = {"rows": jax.tree.map(lambda a: _cut(a, size), rows)}
  if key is not None:
    travelling["keys"] = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(size))
  leaves, treedef = jax.tree.flatten(params)
  trains = [jnp.issubdtype(a.dtype, jnp.inexact) for a in leaves]
  groups = [grouping.by_stage(a, schedule.num_stages, schedule.repeats) for a in leaves]
  apply_fn = _all_stages(stage_fn, treedef, trains)
  floating = [a for a, t in zip(groups, trains, strict=True) if t]
  fixed = [a for a, t in zip(groups, trains, strict=True) if not t]
  length = groups[0].shape[2]
  stages_S = jnp.arange(schedule.num_stages)

  def step(carry: Any, step: jax.Array) -> tuple[Any, Any]:
    x_SbLD, store_MSbLD = carry
    take_at, put_at = _slots(schedule, step)
    taken_SbLD, store_MSbLD = _take(store_MSbLD, take_at)
    starts = (stages_S == 0)[:, None, None, None]
    x_SbLD = shard_lib.shard(jnp.where(starts, taken_SbLD, x_SbLD), _ACTIVATIONS)
    place = schedule.at(step, stages_S)
    travels = jax.tree.map(lambda a: a[place.micro_batch], travelling)
    travels["rows"] = jax.tree.map(
      lambda a: shard_lib.shard(a, _ACTIVATIONS[: a.ndim]), travels["rows"]
    )
    first_S = (place.repeat * schedule.num_stages + stages_S) * length
    x_SbLD, written = apply_fn(floating, fixed, x_SbLD, travels, first_S, place)
    # The last stage's output lies where the first stage's did, for the next repeat or
    # as the result.
    x_SbLD = shard_lib.shard(_shift(x_SbLD), _ACTIVATIONS)
    store_MSbLD = lax.dynamic_update_index_in_dim(store_MSbLD, x_SbLD, put_at, 0)
    return (x_SbLD, shard_lib.shard(store_MSbLD, (None, *_ACTIVATIONS))), written

  shape = (size, schedule.num_stages, *x_MbLD.shape[1:])
  store_MSbLD = jnp.broadcast_to(x_MbLD[:, None], shape)
  store_MSbLD = shard_lib.shard(store_MSbLD, (None, *_ACTIVATIONS))
  steps_T = jnp.arange(schedule.num_steps)
  # Until the first micro-batches arrive, stages compute on the first one's input.
  (_, store_MSbLD), written = lax.scan(step, (store_MSbLD[0], store_MSbLD), steps_T)
  written = jax.tree.map(lambda a: _means(schedule, a), written)
  x_BLD = store_MSbLD[:, 0].swapaxes(0, 1).reshape(x_BLD.shape)
  return shard_lib.shard(x_BLD, ("rows_out", "length", "embed_act")), written


def _check_rows(num_rows: int, micro_batches: int) -> None:
  axes, ways = shard_lib.split_over("batch"), 1
  if axes:
    mesh, _ = shard_lib.current()
    ways = math.prod(mesh.shape[axis] for axis in axes)
  if num_rows % (micro_batches * ways):
    among = f" for {ways} devices along {', '.join(axes)}" if axes else ""
    raise errors.InputError(
      f"a batch of {num_rows} sequences does not divide into mesh.micro_batches="
      f"{micro_batches} of the pipeline{among}; make it a multiple of "
      f"{micro_batches * ways}"
    )


def _all_stages(
  stage_fn: StageFn, treedef: Any, trains: list[bool]
) -> Callable[..., tuple[jax.Array, Any]]:
  """The stage function, of every stage with one of its groups of parameters.

  Its derivative is taken here, of one step, since what it needs of a step is held for
  all steps: not the parameters, which are picked again. And where a stage is in a
  bubble, its gradients are replaced by zero; products with zero could be no number.
  """

  def call(floating, fixed, x, travels, first):
    given = (iter(fixed), iter(floating))
    params = jax.tree.unflatten(treedef, [next(given[t]) for t in trains])
    return stage_fn(params, x, travels["rows"], first, travels.get("keys"))

  # A scan over the k steps takes parameters `[k, S, ...]` as they are.
  axes = (1, 1, 0, 0, 0)
  vectorized = jax.vmap(call, in_axes=axes, spmd_axis_name=grouping.AXIS)

  def pick(groups, repeat_S):
    if groups and groups[0].shape[0] == 1:
      return [a[0].swapaxes(0, 1) for a in groups]
    one = lambda a, repeat: lax.dynamic_index_in_dim(a, repeat, keepdims=False)
    return [jax.vmap(one, (1, 0), 1)(a, repeat_S) for a in groups]

  @jax.custom_vjp
  def apply(floating, fixed, x_SbLD, travels, first_S, place):
    picked = (pick(a, place.repeat) for a in (floating, fixed))
    return vectorized(*picked, x_SbLD, travels, first_S)

  def forward(floating, fixed, x_SbLD, travels, first_S, place):
    fn = lambda *args: vectorized(*args, travels, first_S)
    picked = (pick(a, place.repeat) for a in (floating, fixed))
    out, pullback = jax.vjp(fn, *picked, x_SbLD)
    pullback.args_res[:2] = (None, None)
    return out, (pullback, floating, fixed, place)

  def backward(residuals, cotangents):
    pullback, *groups, place = residuals
    pullback.args_res[:2] = (pick(a, place.repeat) for a in groups)
    new, _, x_SbLD = pullback(cotangents)
    valid = lax.broadcast_in_dim(place.valid, x_SbLD.shape, (0,))
    x_SbLD = jnp.where(valid, x_SbLD, 0)

    def placed(group, new):
      of_VS = place.repeat[None] == jnp.arange(len(group))[:, None]
      of_VS &= place.valid[None]
      new = jnp.broadcast_to(new.swapaxes(0, 1)[None], group.shape)
      return jnp.where(lax.broadcast_in_dim(of_VS, group.shape, (0, 1)), new, 0)

    return [*map(placed, groups[0], new)], None, x_SbLD, None, None, None

  apply.defvjp(forward, backward)
  return apply


def _slots(schedule: Schedule, step: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Where the first stage takes its micro-batch from, and the last one's output goes.

  Each slot of the store holds a micro-batch between two repeats, from the input on to
  the result. Before the first output arrives, what the last stage computes goes to the
  slot that was just emptied; after the last input, the last slot is read again.
  """
  size, num_stages = schedule.micro_batches, schedule.num_stages
  take_at = jnp.minimum(step, schedule.repeats * size - 1) % size
  arrived = (step - num_stages + 1) % size
  return take_at, jnp.where(step < num_stages - 1, jnp.minimum(step, size - 1), arrived)


@jax.custom_vjp
def _take(store: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A slot's content and the store, in which nothing may read that slot again.

  So the gradient of the content goes into the slot; to add it to the gradient of the
  store would pass over all of it in every step.
  """
  return lax.dynamic_index_in_dim(store, slot, keepdims=False), store


def _take_forward(store: jax.Array, slot: jax.Array) -> tuple[Any, jax.Array]:
  return _take(store, slot), slot


def _take_backward(slot: jax.Array, cotangents: Any) -> tuple[jax.Array, None]:
  taken, store = cotangents
  return lax.dynamic_update_index_in_dim(store, taken, slot, 0), None


_take.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def _shift(x_SbLD: jax.Array) -> jax.Array:
  """What each stage has, at the next stage: one collective permute, and one back."""
  return jnp.roll(x_SbLD, 1, axis=0)


_shift.defvjp(
  lambda x_SbLD: (_shift(x_SbLD), None),
  lambda _, cotangent: (jnp.roll(cotangent, -1, axis=0),),
)


def _cut(rows: jax.Array, parts: int) -> jax.Array:
  """`[B, ...]` to `[M, B / M, ...]`, every device keeping its own rows."""
  cut = rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]).swapaxes(0, 1)
  return shard_lib.shard(cut, (None, *_ACTIVATIONS[1 : cut.ndim]))


def _means(schedule: Schedule, written_TSk: jax.Array) -> jax.Array:
  """Means over the micro-batches, `[R, ...]`, of what every step has written."""
  stage = jnp.arange(schedule.num_stages)[None, :, None]
  first = jnp.arange(schedule.repeats)[:, None, None] * schedule.micro_batches + stage
  steps_VSM = first + jnp.arange(schedule.micro_batches)[None, None]
  written_VSMk = written_TSk[steps_VSM, jnp.broadcast_to(stage, steps_VSM.shape)]
  means_VSk = jnp.mean(written_VSMk, axis=2)
  return means_VSk.reshape(-1, *means_VSk.shape[3:])
