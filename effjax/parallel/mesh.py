"""The one mesh of a run, and what a config may say about it.

pjit is `jax.jit` with shardings today; all axes are of type Auto, because with
Explicit axes `flax.linen.Embed` and `optax.contrib.muon` fail.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from effjax.core import config, errors
from effjax.parallel import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How devices are used.

  Attributes:
    preset: a key of rules.PRESETS, or several joined by "+", as in "fsdp+tp".
    shape: devices along axes of rules.AXES that the preset splits something over. What
      is not said is 1; but if the main axis of the first preset is not, it takes the
      devices that are left.
    num_devices: how many devices to use; None for all there are.
    micro_batches: of "pp", the parts a batch goes through the stages in; None for
      as many as there are stages.
    repeats: of "pp", how often a batch goes around the stages, each of which then has
      that many groups of consecutive layers (circular, or interleaved); 1 is GPipe.
    replicate: regular expression found in the paths of parameters that may be whole on
      every device, however large they are; empty for none.
  """

  preset: str = "dp"
  shape: dict[str, int] = dataclasses.field(default_factory=dict)
  num_devices: int | None = None
  micro_batches: int | None = None
  repeats: int = 1
  replicate: str = ""

  def __post_init__(self):
    preset = rules.find(self.preset)
    for axis, size in self.shape.items():
      if axis not in rules.AXES:
        raise errors.unknown("axis of shape", axis, rules.AXES)
      config.require(size > 0, f"shape: {axis}={size} must be positive")
      config.require(
        size == 1 or axis in preset.axes,
        f"shape: preset {self.preset!r} splits nothing over {axis!r}, only over "
        f"{', '.join(preset.axes)}; the {size} would all do the same",
      )
    config.require(
      self.num_devices is None or self.num_devices > 0,
      f"num_devices={self.num_devices} must be positive",
    )
    config.require(self.repeats > 0, f"repeats={self.repeats} must be positive")
    config.require(
      self.micro_batches is None or self.micro_batches > 0,
      f"micro_batches={self.micro_batches} must be positive",
    )
    config.require(
      "stage" in preset.axes or (self.repeats == 1 and self.micro_batches is None),
      f"repeats and micro_batches are of 'pp', which preset {self.preset!r} is not; "
      "a train stage has micro_batches of its own",
    )


def make(mesh_config: MeshConfig) -> Mesh:
  """The mesh with axes rules.AXES over the chosen devices.

  Raises:
    InputError: the shape does not multiply to the devices there are.
  """
  devices = jax.devices()
  shape = sizes(mesh_config, len(devices), _num_slices(devices))
  placed = grid(devices[: math.prod(shape)], shape)
  return Mesh(placed, rules.AXES, axis_types=(AxisType.Auto,) * len(rules.AXES))


def sizes(
  mesh_config: MeshConfig, num_present: int, num_slices: int = 1
) -> tuple[int, ...]:
  """Devices along each of rules.AXES.

  Args:
    mesh_config: what is wanted.
    num_present: devices there are.
    num_slices: groups of them that a slower network joins; replicas of "hsdp", unless
      the shape says otherwise.

  Raises:
    InputError: the shape does not multiply to the devices.
  """
  given = dict(mesh_config.shape)
  preset = rules.find(mesh_config.preset)
  wanted = mesh_config.num_devices
  if "data" in preset.axes and preset.main_axis != "data" and num_slices > 1:
    given.setdefault("data", num_slices)
  taken = math.prod(given.values())
  if wanted is None:
    wanted = num_present if preset.main_axis not in given else taken
  main = given.get(preset.main_axis)
  if wanted > num_present or wanted % taken or (main is not None and wanted != taken):
    named = {axis: given.get(axis, 1) for axis in preset.axes}
    if main is None:
      del named[preset.main_axis]
    raise errors.InputError(
      f"mesh.shape {named} of preset {mesh_config.preset!r} takes "
      f"{_times(named)} devices, {wanted} are asked for and {num_present} are present; "
      + _hint(taken, wanted, num_present, main)
    )
  given.setdefault(preset.main_axis, wanted // taken)
  return tuple(given.get(axis, 1) for axis in rules.AXES)


def grid(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
  """Devices in an array of the shape of the mesh, laid out as the hardware is wired.

  Groups of devices that a slower network joins (slices of TPUs) lie along the axes of
  stages and replicas, which talk least.

  Raises:
    InputError: stages and replicas are not a multiple of the slices.
  """
  slices = _num_slices(devices)
  if slices > 1:
    return _hybrid(devices, shape, slices)
  if devices[0].platform == "tpu":
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  # Devices come process by process: hosts lie along the first axes.
  return np.asarray(devices).reshape(shape)


def _num_slices(devices: Sequence[Any]) -> int:
  return len({getattr(device, "slice_index", 0) for device in devices})


def _hybrid(devices: Sequence[Any], shape: tuple[int, ...], slices: int) -> np.ndarray:
  across, inside, left = [], [], slices
  for axis, size in zip(rules.AXES, shape, strict=True):
    ways = math.gcd(size, left) if axis in ("stage", "data") else 1
    across.append(ways)
    inside.append(size // ways)
    left //= ways
  if left > 1:
    raise errors.InputError(
      f"the devices are {slices} slices joined by a slower network, which only stages "
      f"and replicas may cross: make mesh.shape's stage x data a multiple of {slices} "
      "(presets 'pp', 'dp', 'hsdp')"
    )
  return mesh_utils.create_hybrid_device_mesh(
    tuple(inside), tuple(across), devices, allow_split_physical_axes=True
  )


def _times(named: Mapping[str, int]) -> str:
  if len(named) < 2:
    return str(math.prod(named.values()))
  return f"{' x '.join(map(str, named.values()))} = {math.prod(named.values())}"


def _hint(taken: int, wanted: int, num_present: int, main: int | None) -> str:
  if wanted > num_present:
    return f"use at most {num_present}"
  if main is None:
    return f"choose sizes whose product divides {wanted}"
  return f"choose sizes whose product is {wanted}, or num_devices={taken}"
