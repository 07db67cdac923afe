"""Activations name their logical axes; a table maps those to the axes of the mesh."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Pairs of a logical axis and a mesh axis it may be split over, preferred ones first.
Rules = tuple[tuple[str, str], ...]

# The device that code is traced for, also where no rules are active.
_device: contextvars.ContextVar[Any] = contextvars.ContextVar("device", default=None)
_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
  "active_rules", default=None
)


@contextlib.contextmanager
def use_rules(mesh: Mesh | None, rules: Rules = ()) -> Iterator[None]:
  """While open, `shard` constrains activations on `mesh` by `rules`.

  Args:
    mesh: the device mesh; None for code that must not be split, such as what runs
      inside `jax.shard_map` already.
    rules: table of the activations.
  """
  token = _active.set(None if mesh is None else (mesh, rules))
  device = _device.get() if mesh is None else mesh.devices.flat[0]
  device_token = _device.set(device)
  try:
    yield
  finally:
    _active.reset(token)
    _device.reset(device_token)


def current() -> tuple[Mesh, Rules] | None:
  """The mesh and the rules that are active, for what splits itself over devices."""
  return _active.get()


def device() -> Any:
  """A device that what is traced will run on: of the mesh, or the default one."""
  return _device.get() or jax.devices()[0]


def platform() -> str:
  """The platform of `device()`, as `jax.default_backend()` names it."""
  name = device().platform
  return "gpu" if name in ("cuda", "rocm") else name


def shard(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Constrains the sharding of an activation; does nothing without active rules.

  Args:
    x: activation.
    axes: logical axis of each dimension; None leaves a dimension replicated.
  """
  active = _active.get()
  if active is None:
    return x
  mesh, rules = active
  spec = partition_spec(axes, x.shape, mesh, rules)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def partition_spec(
  axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules
) -> PartitionSpec:
  """The PartitionSpec of an array from its logical axes.

  Rules are tried in order. A mesh axis is used once in an array, by the first rule that
  names one of its dimensions and divides it; a dimension may take several.
  """
  chosen: list[list[str]] = [[] for _ in axes]
  ways = [1] * len(axes)
  used: set[str] = set()
  for logical, name in rules:
    size = mesh.shape.get(name, 1)
    if size == 1 or name in used:
      continue
    for dim, axis in enumerate(axes):
      if axis == logical and shape[dim] % (ways[dim] * size) == 0:
        chosen[dim].append(name)
        ways[dim] *= size
        used.add(name)
        break
  entries = [
    tuple(names) if len(names) > 1 else (names[0] if names else None)
    for names in chosen
  ]
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def split_over(logical: str) -> tuple[str, ...]:
  """Mesh axes of more than one device that the active rules give a logical axis."""
  active = _active.get()
  if active is None:
    return ()
  mesh, rules = active
  return tuple(n for axis, n in rules if axis == logical and mesh.shape.get(n, 1) > 1)


def split_of(logical: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
  """Mesh axes over which `on_devices`, given the same sizes, splits a logical axis."""
  active = _active.get()
  if active is None or logical not in sizes:
    return ()
  return _cut(sizes, *active).get(logical, ())


def _cut(
  sizes: Mapping[str, int], mesh: Mesh, rules: Rules
) -> dict[str, tuple[str, ...]]:
  """Mesh axes of the logical axes that are split."""
  spec = partition_spec(tuple(sizes), tuple(sizes.values()), mesh, rules)
  named = zip(sizes, spec, strict=False)
  return {axis: (by,) if isinstance(by, str) else by for axis, by in named if by}


def on_devices(
  fn: Callable[..., Any],
  args: Sequence[Any],
  axes: Sequence[Sequence[str | None] | None],
  out_axes: Any,
  sizes: Mapping[str, int],
) -> Any:
  """`fn` on what each device holds of its arguments, under the active rules.

  Inside, no rules are active: what `fn` wants to know of other devices it asks for with
  collectives over `split_over(...)`.

  Args:
    fn: function of arrays.
    args: its arguments; None where there is none.
    axes: of each argument the logical axis of each dimension; None with a None.
    out_axes: the same of each result: one tuple of axes, or a (nested) tuple of them.
    sizes: units of every logical axis that may be split, such as the key heads of
      "heads": one that they do not divide into is not split, in any argument.

  Returns:
    What `fn` returns, put together.
  """
  mesh, rules = _active.get()
  by_axis = _cut(sizes, mesh, rules)
  spec = lambda axes: PartitionSpec(*(by_axis.get(axis) for axis in axes))
  given = [i for i, arg in enumerate(args) if arg is not None]

  def inside(*present: Any) -> Any:
    whole = [None] * len(args)
    for i, arg in zip(given, present, strict=True):
      whole[i] = arg
    with use_rules(None):
      return fn(*whole)

  is_axes = lambda x: (
    isinstance(x, tuple) and all(axis is None or isinstance(axis, str) for axis in x)
  )
  mapped = jax.shard_map(
    inside,
    mesh=mesh,
    in_specs=tuple(spec(axes[i]) for i in given),
    out_specs=jax.tree.map(spec, out_axes, is_leaf=is_axes),
    check_vma=False,
  )
  return mapped(*(args[i] for i in given))
