"""Runs of layers: how a model applies its layers, scanned, unrolled or shared.

Shared by the decoder and the encoder. A layer is a module called as
`x_BLD, state, keys = layer(x_BLD, state, positions, segments, keys)`, where `keys` is
what the last layer that lends has lent; a maker builds the one of a config,
`make(layer_config, name=...)`, wherever it is called.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import errors
from effjax.core import layers as layers_lib
from effjax.parallel import pipeline

# Collections a scanned layer may write or own; each gets a leading axis of layers.
_STACKED = ("params", "losses", "metrics", "stats", "state")
_instead: contextvars.ContextVar[Any] = contextvars.ContextVar("instead", default=None)
# Axes of stages that what a layer computes gets in addition.
_stage_axes: contextvars.ContextVar[int] = contextvars.ContextVar(
  "stage_axes", default=0
)


class Body(nn.Module):
  """What one scan step of a run applies: `period` layers, one after the other."""

  layers: tuple[Any, ...]
  make: Any

  @nn.compact
  def __call__(
    self, carry: tuple[Any, ...], positions: jax.Array, segments: jax.Array
  ) -> tuple[tuple[Any, ...], None]:
    """Carry: activations, stacked states of the run (or None), step number.

    The states travel in the carry and are updated in place; as scan inputs and
    outputs the whole cache would be copied every step.
    """
    x_BLD, states, step = carry
    keys = None  # Lent and borrowed within a body, never from step to step.
    for j, layer in enumerate(self.layers):
      name = f"layer_{j}"
      state = None if states is None else _read(states[name], step)
      call = self.make(layer, name=name)
      x_BLD, state, keys = call(x_BLD, state, positions, segments, keys)
      if states is not None:
        states = {**states, name: _write(states[name], state, step)}
    return (x_BLD, states, step + 1), None


@contextlib.contextmanager
def _vectorized() -> Iterator[None]:
  """While open, layers are traced of which all stages will compute one at once."""
  token = _stage_axes.set(1)
  try:
    yield
  finally:
    _stage_axes.reset(token)


class Piped(nn.Module):
  """A run whose steps go through a pipeline; its parameters are those of the scan.

  Losses and metrics of layers are means over the micro-batches (as where gradients are
  accumulated over as many, if these have equal weights of targets), and the noise of a
  layer is another one for each of them. Other collections can only be read.

  Attributes:
    layers: configs of a body.
    make: builds the layer of a config.
    schedule: of the pipeline.
  """

  layers: tuple[Any, ...]
  make: Any
  schedule: pipeline.Schedule

  @nn.compact
  def __call__(
    self, x_BLD: jax.Array, positions: jax.Array, segments: jax.Array
  ) -> jax.Array:
    """Activations after all steps."""
    if self.is_mutable_collection("stats"):
      raise errors.InputError(
        "statistics cannot be collected in a pipeline: calibrate without preset 'pp'"
      )
    written_too = list(filter(self.is_mutable_collection, ("losses", "metrics")))
    variables = {
      name: values
      for name, values in self.variables.items()
      if name not in written_too and values
    }
    body = _Named(self.layers, self.make, self.name, parent=None)

    @_vectorized()
    def stage_fn(variables, x_bLD, rows, first, key):
      def one(x_bLD, xs):
        variables, step = xs
        rngs = {} if key is None else {"dropout": jax.random.fold_in(key, step)}
        given = {name: {self.name: values} for name, values in variables.items()}
        x_bLD, written = body.apply(given, x_bLD, *rows, rngs=rngs, mutable=written_too)
        return x_bLD, {name: written[name][self.name] for name in written}

      steps = first + jnp.arange(len(jax.tree.leaves(variables)[0]))
      return jax.lax.scan(one, x_bLD, (variables, steps))

    key = self.make_rng("dropout") if self.has_rng("dropout") else None
    rows = (positions, segments)
    x_BLD, written = pipeline.run(self.schedule, stage_fn, variables, x_BLD, rows, key)
    for collection, values in written.items():
      for name, value in values.items():
        self.put_variable(collection, name, value)
    return x_BLD


class _Creates(nn.Module):
  """Whether parameters are created in this call, of which a pipeline needs all."""

  def __call__(self) -> bool:
    return self.is_mutable_collection("params")


class _Named(nn.Module):
  """A body alone under the name of its run, so that paths are those of the model."""

  layers: tuple[Any, ...]
  make: Any
  run: str

  @nn.compact
  def __call__(
    self, x_BLD: jax.Array, positions: jax.Array, segments: jax.Array
  ) -> jax.Array:
    body = Body(self.layers, self.make, name=self.run)
    (x_BLD, _, _), _ = body((x_BLD, None, jnp.int32(0)), positions, segments)
    return x_BLD


@contextlib.contextmanager
def instead_of_layers(
  fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> Iterator[None]:
  """While open, a model has `x_BLD = fn(x_BLD, positions, segments)` for its layers.

  So what comes before the layers, and what comes after them, can be had alone; the
  parameters of the layers may be missing.
  """
  token = _instead.set(fn)
  try:
    yield
  finally:
    _instead.reset(token)


def apply(
  configs: Sequence[Any],
  runs: Sequence[layers_lib.Run] | None,
  make: Callable[..., Any],
  x_BLD: jax.Array,
  state: Mapping[str, Any] | None,
  positions: jax.Array,
  segments: jax.Array,
) -> tuple[jax.Array, dict[str, Any] | None]:
  """All layers in order; call it inside a compact method, which will own them.

  Args:
    configs: one config a layer.
    runs: how they are scanned (parameters under `run_<i>/layer_<j>`), or None for a
      loop over `layer_<k>`.
    make: builds the layer of a config.
    x_BLD: activations.
    state: decoding state by the name of the run or layer, or None.
    positions, segments: int32 `[B, L]`.

  Returns:
    Activations, and the new state (None without one).
  """
  instead = _instead.get()
  if instead is not None:
    return instead(x_BLD, positions, segments), None
  new_state = None if state is None else {}
  schedule = None if state is not None else pipeline.current()
  if schedule is not None and _Creates()():
    schedule = None
  piped = () if schedule is None else piped_runs(schedule, runs)
  if runs is None:
    keys = None
    for k, layer in enumerate(configs):
      name = f"layer_{k}"
      old = None if state is None else state[name]
      call = make(layer, name=name)
      x_BLD, new, keys = call(x_BLD, old, positions, segments, keys)
      if new_state is not None:
        new_state[name] = new
    return x_BLD, new_state
  start = 0
  for i, run in enumerate(runs):
    name = f"run_{i}"
    body_layers = tuple(configs[start : start + run.period])
    start += run.num_layers
    if i in piped:
      body = Piped(body_layers, make, schedule, name=name)
      x_BLD = body(x_BLD, positions, segments)
      continue
    scanned = nn.scan(
      Body,
      variable_axes=dict.fromkeys(_STACKED, 0),
      split_rngs={"params": True, "dropout": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=run.repeats,
    )
    body = scanned(body_layers, make, name=name)
    old = None if state is None else state[name]
    (x_BLD, new, _), _ = body((x_BLD, old, jnp.int32(0)), positions, segments)
    if new_state is not None:
      new_state[name] = new
  return x_BLD, new_state


def piped_runs(
  schedule: pipeline.Schedule, runs: Sequence[layers_lib.Run] | None
) -> tuple[int, ...]:
  """The numbers of the runs that go through a pipeline: all that divide.

  The others are computed on every stage, so the longest one must not be among them.

  Raises:
    InputError: it is, or the model is unrolled; says which numbers of stages could be.
  """
  if runs is None:
    raise errors.InputError(
      "preset 'pp' needs scanned layers, but the model's are unrolled; set scan=True"
    )
  longest = max(runs, key=lambda run: run.num_layers).repeats
  num_groups = schedule.num_groups
  if longest % num_groups == 0:
    return tuple(i for i, run in enumerate(runs) if run.repeats % num_groups == 0)
  num_stages, repeats = schedule.num_stages, schedule.repeats
  legal = [n for n in range(2, longest + 1) if longest % (n * repeats) == 0]
  near = {max(filter(num_stages.__gt__, legal), default=None)}
  near |= {min(filter(num_stages.__lt__, legal), default=None)}
  named = " or ".join(str(n) for n in legal if n in near)
  lengths = ", ".join(str(run.repeats) for run in runs)
  raise errors.InputError(
    f"mesh.shape stage={num_stages} x mesh.repeats={repeats} = {num_groups} groups do "
    f"not divide the longest of the model's runs of equal layers ({lengths}); "
    + (f"with these repeats it could be {named} stages" if named else "use no 'pp'")
  )


def shared(layer: nn.Module, times: int) -> Callable[..., tuple[jax.Array, Any, Any]]:
  """A layer applied `times` times in a row, always with the same parameters.

  Its parameters exist once, and their gradient is the sum over the uses. A decoding
  state is a tuple with one of each use.
  """
  if times == 1:
    return layer

  def once(
    layer: nn.Module, x_BLD: jax.Array, positions: jax.Array, segments: jax.Array
  ) -> tuple[jax.Array, None]:
    return layer(x_BLD, None, positions, segments, None)[0], None

  def call(
    x_BLD: jax.Array, state: Any, positions: jax.Array, segments: jax.Array, keys: None
  ) -> tuple[jax.Array, Any, None]:
    if state is not None:
      new = []
      for old in state:
        x_BLD, used, _ = layer(x_BLD, old, positions, segments, None)
        new.append(used)
      return x_BLD, tuple(new), keys
    # What a use writes is read by the next one: a scan could not carry variables that
    # the first use creates.
    written = any(map(layer.is_mutable_collection, ("params", "stats", "state")))
    if written:
      for _ in range(times):
        x_BLD, _ = once(layer, x_BLD, positions, segments)
      return x_BLD, state, keys
    scanned = nn.scan(
      once,
      variable_broadcast=("params", "state"),
      variable_axes={"losses": 0, "metrics": 0},
      split_rngs={"params": False, "dropout": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=times,
    )
    return scanned(layer, x_BLD, positions, segments)[0], state, keys

  return call


def rematerialized(cls: type[nn.Module], remat: str, scanned: bool) -> type[nn.Module]:
  """The layer class that recomputes in the backward pass; see config.REMAT."""
  if remat == "none":
    return cls
  policies = {"full": jax.checkpoint_policies.nothing_saveable, "dots": _products()}
  policy = policies[remat]
  return nn.remat(cls, policy=policy, prevent_cse=not scanned)


def _products() -> Callable[..., bool]:
  """A policy that saves products with parameters, and not those within a batch."""
  num_axes = _stage_axes.get()

  def saveable(primitive: Any, *_: Any, **params: Any) -> bool:
    if primitive is not jax.lax.dot_general_p:
      return False
    _, (batch, _) = params["dimension_numbers"]
    return len(batch) <= num_axes

  return saveable


def scanned_as(config: Any, runs: tuple[layers_lib.Run, ...] | None) -> Any:
  """The config of the same model scanned as given, or unrolled for None."""
  changed = (
    {"runs": None, "scan": False}
    if runs is None
    else {"runs": tuple((r.period, r.repeats) for r in runs), "scan": True}
  )
  return dataclasses.replace(config, **changed)


def _read(stacked: Any, step: jax.Array) -> Any:
  """The state of one scan step, out of the stacked ones."""
  return jax.tree.map(
    lambda a: jax.lax.dynamic_index_in_dim(a, step, keepdims=False), stacked
  )


def _write(stacked: Any, state: Any, step: jax.Array) -> Any:
  return jax.tree.map(
    lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, step, 0), stacked, state
  )
