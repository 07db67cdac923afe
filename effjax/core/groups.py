"""Structured groups: heads, neurons, experts, as index sets of axis instances.

Unit j of an axis instance, in every parameter that carries it, is one group: column j
of `gate` and `up` and row j of `down` are one neuron. What a unit is (one entry, or a
head of several), which units must stay equally many together, and which other axes go
with it, modules declare where they declare weights (core.specs): nothing here knows
any architecture.

All of this is about the per-layer view of a model (core.layers.unstack).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from effjax.core import specs as specs_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carrier:
  """A parameter in which an axis instance lies.

  Attributes:
    path: of the parameter.
    axis: its name, that of the family or of one within it.
    dim: of the axis, counted from the last (negative).
    unit: consecutive entries of one unit.
    kind: of the parameter.
    num_dims: of the parameter, without stacked layers.
  """

  path: str
  axis: str
  dim: int
  unit: int
  kind: str
  num_dims: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """All groups of one axis instance, and of those that lie within it.

  Attributes:
    module: path of the module whose axis it is, such as "layer_3/mixer".
    axis: name of the axis, such as "heads".
    num_units: groups of it.
    parts: how many equal parts of consecutive units there are; each must keep as many.
    num_experts: of a mixture whose experts have the axis, each with units of its own;
      None elsewhere. Each must keep as many.
    carriers: every parameter in which its units lie.
    outputs: paths of those by which they write into the residual stream.
  """

  module: str
  axis: str
  num_units: int
  parts: int
  num_experts: int | None
  carriers: tuple[Carrier, ...]
  outputs: tuple[str, ...]

  @property
  def rows(self) -> int:
    """Sets of units that must stay equally large."""
    return self.parts * (self.num_experts or 1)

  @property
  def row_units(self) -> int:
    """Units of one of them."""
    return self.num_units // self.parts


@dataclasses.dataclass
class _Instance:
  """What the parameters of an axis instance say of it, gathered."""

  places: list[tuple[str, int]]  # path, dimension from the last
  num_units: int | None = None
  parts: int = 1
  within: str | None = None


def families(specs: Mapping[str, specs_lib.ParamSpec], axis: str) -> list[Family]:
  """The families of an axis, in the order of their modules.

  An axis whose every unit is a part of its own (one query head a key head) stands for
  the axis it is within: removing one removes the other.

  Args:
    specs: by path, of parameters without stacked layers.
    axis: name of a logical axis, not one of the whole model.
  """
  instances = _gather(specs)
  roots = []
  for name in instances:
    module, _, own = name.rpartition(":")
    if own == axis:
      root = _root(instances, module, axis)
      if root not in roots:
        roots.append(root)
  return [_family(specs, instances, *name.rsplit(":", 1)) for name in roots]


def entries(units: np.ndarray, size: int) -> np.ndarray:
  """Indices of the entries of units, `[..., n] -> [..., n * size]`."""
  units = np.asarray(units)
  spread = units[..., None] * size + np.arange(size)
  return spread.reshape(*units.shape[:-1], -1)


def _gather(specs: Mapping[str, specs_lib.ParamSpec]) -> dict[str, _Instance]:
  found: dict[str, _Instance] = {}
  for path, spec in specs.items():
    own = [d for d, a in enumerate(spec.axes) if a not in specs_lib.GLOBAL_AXES]
    for d in own:
      instance = found.setdefault(spec.instances[d], _Instance([]))
      instance.places.append((path, d - len(spec.axes)))
    if not own:
      continue
    # Head size and parts are those of the last axis that is the module's own.
    instance = found[spec.instances[own[-1]]]
    if spec.head_dim:
      instance.num_units = spec.shape[own[-1] - len(spec.axes)] // spec.head_dim
    instance.parts = max(instance.parts, spec.parts)
    instance.within = instance.within or spec.within
  for instance in found.values():
    path, dim = instance.places[0]
    instance.num_units = instance.num_units or specs[path].shape[dim]
  return found


def _root(instances: Mapping[str, _Instance], module: str, axis: str) -> str:
  """The instance that an axis of a module stands for."""
  instance = instances[f"{module}:{axis}"]
  outer = f"{module}:{instance.within}"
  if outer in instances and instance.parts == instance.num_units:
    return _root(instances, module, str(instance.within))
  return f"{module}:{axis}"


def _family(
  specs: Mapping[str, specs_lib.ParamSpec],
  instances: Mapping[str, _Instance],
  module: str,
  axis: str,
) -> Family:
  root = instances[f"{module}:{axis}"]
  inside = _inside(instances, module, axis)
  carriers, outputs = [], []
  for name in inside:
    for path, dim in instances[name].places:
      spec = specs[path]
      unit = spec.shape[dim] // root.num_units
      carriers.append(
        Carrier(
          path=path,
          axis=spec.axes[dim],
          dim=dim,
          unit=unit,
          kind=spec.kind,
          num_dims=len(spec.shape),
        )
      )
      if spec.kind == "matrix" and dim != -1 and spec.axes[-1] == "embed":
        outputs.append(path)
  return Family(
    module=module,
    axis=axis,
    num_units=root.num_units,
    parts=root.parts,
    num_experts=None if axis == "experts" else _num_experts(specs, root),
    carriers=tuple(carriers),
    outputs=tuple(outputs),
  )


def _inside(
  instances: Mapping[str, _Instance], module: str, axis: str
) -> Sequence[str]:
  """An axis of a module and those whose units lie within its own, at any depth."""
  found = [axis]
  for name in found:
    found += [
      own
      for key, instance in instances.items()
      for owner, _, own in [key.rpartition(":")]
      if owner == module and instance.within == name and own not in found
    ]
  return [f"{module}:{name}" for name in found]


def _num_experts(
  specs: Mapping[str, specs_lib.ParamSpec], instance: _Instance
) -> int | None:
  """E, if every parameter of the instance holds one for each expert."""
  paths = [path for path, _ in instance.places]
  if not all("experts" in specs[path].axes for path in paths):
    return None
  return specs[paths[0]].shape[specs[paths[0]].axes.index("experts")]
