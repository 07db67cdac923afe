"""The devices of one process, for what cannot be done by all processes together.

Some work needs whole arrays that one process can read, such as a transform of a model.
Where no array is split over processes, each of them can do it by itself, on its own
devices, and all get the same.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from effjax.parallel import rules
from effjax.parallel import spread as spread_lib


def spread_of_process(spread: spread_lib.Spread) -> spread_lib.Spread:
  """The part of a spread that lies on this process's devices.

  A mesh of one device if they do not fill a box of the mesh.
  """
  devices, me = spread.mesh.devices, jax.process_index()
  ours = np.reshape(
    [device.process_index == me for device in devices.flat], devices.shape
  )
  places = np.argwhere(ours)
  box = devices[tuple(map(slice, places.min(axis=0), places.max(axis=0) + 1))]
  if box.size != len(places):
    box = devices[tuple(map(slice, places[0], places[0] + 1))]
  mesh = Mesh(box, rules.AXES, axis_types=(AxisType.Auto,) * len(rules.AXES))
  return spread_lib.Spread(mesh, spread.config)


def is_split_over_processes(spread: spread_lib.Spread, shardings: Any) -> bool:
  """Whether arrays with some NamedShardings are in parts on other processes."""
  own = spread_of_process(spread).mesh.shape
  return any(
    own[axis] != spread.mesh.shape[axis]
    for sharding in jax.tree.leaves(shardings)
    for axis in _axes(sharding)
  )


def give_to_all(tree: Any, shardings: Any) -> Any:
  """Arrays that every process has, as global arrays.

  Args:
    tree: pytree of arrays on this process's devices; the same in every process.
    shardings: of the same structure, over the devices of all.
  """

  def give(array: Any, sharding: NamedSharding) -> jax.Array:
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda place: host[place])

  return jax.tree.map(give, tree, shardings)


def _axes(sharding: NamedSharding) -> Iterator[str]:
  for entry in sharding.spec:
    if entry is not None:
      yield from (entry,) if isinstance(entry, str) else entry
