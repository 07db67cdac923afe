"""The one mesh of a run, and what a config may say about it.

pjit is `jax.jit` with shardings today; all axes are of type Auto, because with
Explicit axes `flax.linen.Embed` and `optax.contrib.muon` fail.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from effjax.core import config, errors
from effjax.parallel import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How devices are used.

  Attributes:
    preset: key of rules.PRESETS.
    shape: devices along ("data", "fsdp", "tensor"); None gives all of them to the
      preset's main axis.
    num_devices: how many devices to use; None for all there are.
  """

  preset: str = "dp"
  shape: tuple[int, int, int] | None = None
  num_devices: int | None = None

  def __post_init__(self):
    if self.preset not in rules.PRESETS:
      raise errors.unknown("preset", self.preset, rules.PRESETS)
    config.require(
      self.shape is None or all(n > 0 for n in self.shape),
      f"shape={self.shape} must be positive along {rules.AXES}",
    )


def make(mesh_config: MeshConfig) -> Mesh:
  """The mesh with axes ("data", "fsdp", "tensor") over the chosen devices.

  Raises:
    InputError: there are not as many devices as the config asks for.
  """
  devices = jax.devices()
  wanted = mesh_config.num_devices or len(devices)
  shape = mesh_config.shape
  if shape is None:
    main = rules.PRESETS[mesh_config.preset].main_axis
    shape = tuple(wanted if axis == main else 1 for axis in rules.AXES)
  elif mesh_config.num_devices is None:
    wanted = math.prod(shape)
  if math.prod(shape) != wanted or wanted > len(devices):
    raise errors.InputError(
      f"mesh shape {shape} over {rules.AXES} needs {math.prod(shape)} devices; "
      f"{len(devices)} are present"
    )
  grid = np.asarray(devices[:wanted]).reshape(shape)
  return Mesh(grid, rules.AXES, axis_types=(AxisType.Auto,) * len(rules.AXES))
