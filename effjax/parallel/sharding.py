"""Shardings of whole trees, computed from specs before anything is placed.

`jit(init)` on an Auto mesh would replicate the optimizer state, so every sharding is
worked out on shapes and passed as `out_shardings`.
"""

import dataclasses
import math
import re
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
# Mesh axes that split what a layer computes, and not only what devices hold.
_SPLIT_WORK = ("tensor", "expert")


def tree_shardings(
  mesh: Mesh, table: rules_lib.Table, specs: Mapping[str, Any], tree: Mapping[str, Any]
) -> dict[str, Any]:
  """A NamedSharding for every array of a parameter tree, inner arrays included.

  Args:
    mesh: the mesh.
    table: logical axis to mesh axis, such as `find("fsdp").params`.
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
    _, spec = spec_at(path, flat_specs)
    if spec is None:
      return NamedSharding(mesh, PartitionSpec())
    axes = _remaining_axes(spec, tuple(leaf.shape))
    return _array_sharding(mesh, table, axes, leaf.shape, spec)

  return jax.tree_util.tree_map_with_path(sharding, state)


def check_not_replicated(
  mesh: Mesh,
  preset: str,
  table: rules_lib.Table,
  specs: Mapping[str, Any],
  tree: Any,
  shardings: Any,
  replicate: str = "",
) -> None:
  """Fails where a large array would be replicated although the preset splits it.

  A preset like "fsdp" splits every array. Of the others an array counts that has an
  axis which the preset splits, but does not divide: heads, hidden units, experts; a
  matrix of these counts however small it is, since every device would compute all of
  it. Key heads may be replicated, since there are more queries (see `replicated_keys`).

  Args:
    mesh: the mesh.
    preset: see rules.find.
    table: the one the shardings come from.
    specs: tree of ParamSpecs.
    tree: parameters or what mirrors them, or their shapes.
    shardings: NamedShardings of the same structure.
    replicate: regular expression of the paths that may be replicated; empty for none.

  Raises:
    InputError: names the first such array, its axis and the nearest sizes that divide.
  """
  flat_specs = tree_lib.flatten(specs)
  splits_all = rules_lib.find(preset).splits_all
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  for (path, leaf), sharding in zip(flat, jax.tree.leaves(shardings), strict=True):
    name, spec = spec_at(path, flat_specs)
    if replicate and re.search(replicate, name):
      continue
    held = {axis for entry in sharding.spec for axis in _names(entry)}
    for axis in dict.fromkeys(pair[1] for pair in table):
      wanted = [logical for logical, over in table if over == axis]
      own = [] if spec is None else _remaining_axes(spec, tuple(leaf.shape))
      own = [a for a in own if a in wanted]
      own = [a for a in own if a not in ("kv", "layers")]
      if mesh.shape[axis] == 1 or axis in held or not (own or axis in splits_all):
        continue
      computed = axis in _SPLIT_WORK and spec.kind == "matrix" and own != ["vocab"]
      if _num_bytes(leaf) <= SMALL_BYTES and not computed:
        continue
      raise errors.InputError(
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} "
        f"({_num_bytes(leaf)} bytes) would be whole on each of the "
        f"{mesh.shape[axis]} devices along {axis!r}, which preset {preset!r} splits it "
        f"over: {_nearest(spec, own, mesh.shape[axis])}, or name it in mesh.replicate"
      )


def check_used(mesh: Mesh, preset: str, specs: Mapping[str, Any]) -> None:
  """Fails where the devices along a mesh axis would all hold and do the same.

  Raises:
    InputError: the preset splits nothing of this model along one of its axes.
  """
  chosen = rules_lib.find(preset)
  known = {axis for spec in tree_lib.flatten(specs).values() for axis in spec.all_axes}
  for axis in _SPLIT_WORK:
    wanted = [logical for logical, over in chosen.params if over == axis]
    if mesh.shape[axis] > 1 and not known & set(wanted):
      raise errors.InputError(
        f"preset {preset!r} splits {', '.join(wanted)} over the {mesh.shape[axis]} "
        f"devices along {axis!r}, and the model has none; choose another preset"
      )


def replicated_keys(
  mesh: Mesh, specs: Mapping[str, Any], shardings: Mapping[str, Any]
) -> list[str]:
  """Paths of the weights of key heads that are whole along "tensor", for a report.

  Args:
    mesh: the mesh.
    specs: tree of ParamSpecs.
    shardings: the parameters' (see `tree_shardings`).
  """
  if mesh.shape["tensor"] == 1:
    return []
  flat = tree_lib.flatten(shardings)
  return [
    path
    for path, spec in tree_lib.flatten(specs).items()
    if "kv" in spec.axes
    and spec.kind == "matrix"
    and not any(
      "tensor" in _names(entry)
      for sharding in jax.tree.leaves(flat[path])
      for entry in sharding.spec
    )
  ]


def spec_at(
  path: tuple[Any, ...], flat_specs: Mapping[str, ParamSpec]
) -> tuple[str, ParamSpec | None]:
  """The parameter whose path ends a key path of a tree that mirrors parameters.

  Args:
    path: of an array, as `jax.tree_util` gives it.
    flat_specs: ParamSpecs by path.

  Returns:
    The parameter's path and spec; the last name of the path and None if there is none.
  """
  names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
  for start in range(len(names)):
    name = "/".join(names[start:])
    if name in flat_specs:
      return name, flat_specs[name]
  return "/".join(names[-1:]), None


def held_bytes(tree: Any) -> int:
  """Bytes of a tree that one device holds, without padding.

  Args:
    tree: arrays or ShapeDtypeStructs with shardings.
  """
  return sum(
    math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    for array in jax.tree.leaves(tree)
  )


def _num_bytes(array: Any) -> int:
  return int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize


def _nearest(spec: ParamSpec | None, own: list[str], ways: int) -> str:
  """What could be changed so that an array divides."""
  if spec is None:
    return "it mirrors no parameter"
  units = dict(zip(spec.all_axes, _units(spec, spec.all_axes, spec.shape), strict=True))
  found = []
  for axis in own or [a for a in spec.axes if units[a] > ways]:
    below, above = units[axis] // ways * ways, -(-units[axis] // ways) * ways
    sizes = f"{below} or {above}" if below else str(above)
    found.append(f"its {units[axis]} {axis!r} do not divide by {ways} ({sizes} do)")
  return "; ".join(found) or "it has no axis that the preset knows"


def _names(entry: Any) -> tuple[str, ...]:
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


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
  return shard_lib.partition_spec(axes, _units(spec, axes, shape), mesh, table)


def _units(spec: ParamSpec, axes: Any, shape: Any) -> list[int]:
  """What an array may be cut between: sizes, of merged axes in heads."""
  head_axes = ("heads", "kv", "inner")
  return [
    size // spec.head_dim if spec.head_dim and axis in head_axes else size
    for axis, size in zip(axes, shape, strict=True)
  ]


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
