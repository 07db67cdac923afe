"""Activations name their logical axes; a table maps those to the axes of the mesh."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, str | tuple[str, ...] | None]

_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
  "active_rules", default=None
)


@contextlib.contextmanager
def use_rules(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """While open, `shard` constrains activations on `mesh` by `rules`.

  Args:
    mesh: the device mesh.
    rules: logical axis to mesh axis or axes; a missing or None entry replicates.
  """
  token = _active.set((mesh, rules))
  try:
    yield
  finally:
    _active.reset(token)


def current() -> tuple[Mesh, Rules] | None:
  """The mesh and the rules that are active, for what splits itself over devices."""
  return _active.get()


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

  A mesh axis is used once, by the first dimension that asks for it, and only where it
  divides the dimension.
  """
  used: set[str] = set()
  entries = []
  for axis, size in zip(axes, shape, strict=True):
    wanted = rules.get(axis) if axis is not None else None
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
    chosen, ways = [], 1
    for name in names:
      if name in used or mesh.shape.get(name, 1) == 1:
        continue
      if size % (ways * mesh.shape[name]) == 0:
        chosen.append(name)
        ways *= mesh.shape[name]
    used.update(chosen)
    entries.append(
      tuple(chosen) if len(chosen) > 1 else (chosen[0] if chosen else None)
    )
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)
