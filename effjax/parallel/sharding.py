"""Shardings of whole trees, computed from specs before anything is placed.

`jit(init)` on an Auto mesh would replicate the optimizer state, so every sharding is
worked out on shapes and passed as `out_shardings`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.core import errors
from effjax.core import shard as shard_lib
from effjax.core import tree as tree_lib
from effjax.core.specs import ParamSpec
from effjax.parallel import rules as rules_lib

# Arrays up to this size may be replicated where they do not divide (scales, norms).
SMALL_BYTES = 1 << 20


def tree_shardings(
  mesh: Mesh, table: rules_lib.Table, specs: Mapping[str, Any], tree: Mapping[str, Any]
) -> dict[str, Any]:
  """A NamedSharding for every array of a parameter tree, inner arrays included.

  Args:
    mesh: the mesh.
    table: logical axis to mesh axis, such as `PRESETS["fsdp"].params`.
    specs: tree of ParamSpecs.
    tree: arrays, ShapeDtypeStructs, leaf dataclasses of them, or None holes.

  Raises:
    InputError: a shard would cut a quantization group or a packed byte.
  """
  return tree_lib.map_leaves(
    lambda path, leaf, spec: _leaf_shardings(mesh, table, path, leaf, spec), tree, specs
  )


def state_shardings(
  mesh: Mesh, table: rules_lib.Table, specs: Mapping[str, Any], state: Any
) -> Any:
  """Shardings of any pytree that mirrors parameters in places, such as Adam's moments.

  An array under the path of a parameter, with its shape, is sharded like it; a factored
  moment keeps the axes of the dimensions it has left; everything else is replicated.

  Args:
    mesh: the mesh.
    table: logical axis to mesh axis, for parameters.
    specs: tree of ParamSpecs.
    state: pytree of arrays or ShapeDtypeStructs.
  """
  flat_specs = tree_lib.flatten(specs)

  def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    for start in range(len(names)):
      spec = flat_specs.get("/".join(names[start:]))
      if spec is not None:
        axes = _remaining_axes(spec, tuple(leaf.shape))
        return _array_sharding(mesh, table, axes, leaf.shape, spec)
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(sharding, state)


def replicated_arrays(tree: Any, shardings: Any, limit: int = SMALL_BYTES) -> list[str]:
  """Paths of arrays above `limit` bytes that no device holds only a part of."""
  found = []
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  for (path, leaf), sharding in zip(flat, jax.tree.leaves(shardings), strict=True):
    num_bytes = int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
    if num_bytes > limit and sharding.is_fully_replicated:
      found.append(f"{jax.tree_util.keystr(path)} ({num_bytes} bytes)")
  return found


def check_not_replicated(mesh: Mesh, preset: str, tree: Any, shardings: Any) -> None:
  """Fails where a large array would be replicated although the preset splits it.

  Raises:
    InputError: names the arrays, under a preset that shards parameters.
  """
  table = rules_lib.PRESETS[preset].params
  if "embed" not in table or mesh.shape[rules_lib.PRESETS[preset].main_axis] == 1:
    return
  found = replicated_arrays(tree, shardings)
  if found:
    raise errors.InputError(
      f"preset {preset!r} would replicate large arrays: {', '.join(found[:3])}; make a "
      f"dimension divisible by the {mesh.size} devices or use fewer"
    )


def _leaf_shardings(
  mesh: Mesh, table: rules_lib.Table, path: str, leaf: Any, spec: ParamSpec
) -> Any:
  if leaf is None:
    return None
  if not dataclasses.is_dataclass(leaf):
    return _array_sharding(mesh, table, spec.all_axes, leaf.shape, spec)
  logical = tuple(_array_spec(mesh, table, spec.all_axes, leaf.shape, spec))
  rest = (None,) * (len(leaf.shape) - len(logical))
  return _inner_shardings(mesh, path, leaf, logical + rest)


def _inner_shardings(mesh: Mesh, path: str, leaf: Any, by_dim: tuple[Any, ...]) -> Any:
  """Inner arrays inherit the mesh axes of the dimensions they tile."""
  # inner_axes permutes and drops whatever it is given, so it can carry mesh axes.
  tokens = tuple(range(len(by_dim)))
  shardings = {}
  for name, dims in leaf.inner_axes(tokens).items():
    inner = getattr(leaf, name)
    if inner is None:
      shardings[name] = None
      continue
    entries = tuple(_entry(by_dim, d) for d in dims)
    if dataclasses.is_dataclass(inner):
      shardings[name] = _inner_shardings(mesh, path, inner, entries)
      continue
    fitted = [
      _fit(mesh, f"{path}.{name}", entry, size, inner, d)
      for d, (entry, size) in enumerate(zip(entries, inner.shape, strict=True))
    ]
    while fitted and fitted[-1] is None:
      fitted.pop()
    shardings[name] = NamedSharding(mesh, PartitionSpec(*fitted))
  return dataclasses.replace(leaf, **shardings)


def _entry(by_dim: tuple[Any, ...], dim: Any) -> Any:
  """The mesh axes of one logical dimension, or of several that are one in an array."""
  if not isinstance(dim, tuple):
    return None if dim is None else by_dim[dim]
  named = [() if by_dim[d] is None else by_dim[d] for d in dim]
  return sum(((n,) if isinstance(n, str) else n for n in named), ()) or None


def _fit(mesh: Mesh, name: str, entry: Any, size: int, inner: Any, dim: int) -> Any:
  """The mesh axes of one dimension, None if a small array does not divide by them."""
  if entry is None:
    return None
  axes = (entry,) if isinstance(entry, str) else entry
  ways = int(np.prod([mesh.shape[a] for a in axes]))
  if size % ways == 0:
    return entry
  if int(np.prod(inner.shape)) * inner.dtype.itemsize <= SMALL_BYTES:
    return None
  raise errors.InputError(
    f"{name}: its axis {dim} has {size} groups or packed rows, which {ways} devices do "
    f"not divide; choose a group size that gives a multiple of {ways}, or fewer devices"
  )


def _array_spec(
  mesh: Mesh, table: rules_lib.Table, axes: Any, shape: Any, spec: ParamSpec
) -> PartitionSpec:
  """Heads are never cut: a merged axis counts in whole heads."""
  head_axes = ("heads", "kv", "inner")
  units = [
    size // spec.head_dim if spec.head_dim and axis in head_axes else size
    for axis, size in zip(axes, shape, strict=True)
  ]
  return shard_lib.partition_spec(axes, units, mesh, table)


def _array_sharding(
  mesh: Mesh, table: rules_lib.Table, axes: Any, shape: Any, spec: ParamSpec
) -> NamedSharding:
  return NamedSharding(mesh, _array_spec(mesh, table, axes, shape, spec))


def _remaining_axes(spec: ParamSpec, shape: tuple[int, ...]) -> tuple[Any, ...]:
  """Axes of an array that mirrors a parameter, or a part of one.

  Of as many dimensions those of equal size are kept, such as one of a factor's two;
  else some were reduced away.
  """
  if len(shape) == len(spec.shape):
    pairs = zip(spec.all_axes, spec.shape, shape, strict=True)
    return tuple(axis if size == own else None for axis, size, own in pairs)
  kept, dim = [], 0
  for size in shape:
    while dim < len(spec.shape) and spec.shape[dim] != size:
      dim += 1
    if dim == len(spec.shape):
      return (None,) * len(shape)
    kept.append(spec.all_axes[dim])
    dim += 1
  return tuple(kept)
