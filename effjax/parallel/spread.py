"""A mesh and the tables of its preset, as one thing: where everything of a run lies."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.core import errors
from effjax.core import shard as shard_lib
from effjax.parallel import grouping, pipeline, rules, sharding
from effjax.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Spread:
  """How a run is spread over devices.

  Attributes:
    mesh: the devices, with axes rules.AXES.
    config: what they are used for.
  """

  mesh: Mesh
  config: mesh_lib.MeshConfig = mesh_lib.MeshConfig()

  @property
  def preset(self) -> rules.Preset:
    """The tables."""
    return rules.find(self.config.preset)

  @property
  def whole(self) -> NamedSharding:
    """Of what every device holds all of."""
    return NamedSharding(self.mesh, PartitionSpec())

  def params(self, specs: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """NamedShardings of a parameter tree; see sharding.tree_shardings."""
    return sharding.tree_shardings(self.mesh, self.preset.params, specs, tree)

  def gradients(self, specs: Mapping[str, Any], tree: Any) -> Any:
    """NamedShardings of the gradients of (a part of) a parameter tree."""
    return sharding.state_shardings(self.mesh, self.preset.gradients, specs, tree)

  def state(self, specs: Mapping[str, Any], tree: Any) -> Any:
    """NamedShardings of an optimizer state."""
    return sharding.state_shardings(self.mesh, self.preset.state, specs, tree)

  def check(
    self, table: rules.Table, specs: Mapping[str, Any], tree: Any, shardings: Any
  ) -> None:
    """Raises InputError where a large array would be replicated; see sharding."""
    sharding.check_not_replicated(
      self.mesh,
      self.config.preset,
      table,
      specs,
      tree,
      shardings,
      self.config.replicate,
    )

  def check_used(self, specs: Mapping[str, Any]) -> None:
    """Raises InputError where devices would all do the same; see sharding."""
    sharding.check_used(self.mesh, self.config.preset, specs)

  @contextlib.contextmanager
  def active(self) -> Iterator[None]:
    """While open, models that are traced are split as the preset says."""
    with (
      shard_lib.use_rules(self.mesh, self.preset.activations),
      pipeline.use_schedule(self.schedule()),
    ):
      yield

  def schedule(self) -> pipeline.Schedule | None:
    """Of a pipeline over more than one stage; None without.

    Raises:
      InputError: too few micro-batches to go around.
    """
    num_stages = self.mesh.shape[grouping.AXIS]
    if num_stages == 1:
      return None
    micro_batches = self.config.micro_batches or num_stages
    return pipeline.Schedule(num_stages, micro_batches, self.config.repeats)

  @property
  def batch_axes(self) -> tuple[str, ...]:
    """Mesh axes of more than one device that the rows of a batch are split over."""
    axes = [name for axis, name in self.preset.activations if axis == "batch"]
    return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

  @property
  def batch_ways(self) -> int:
    """Parts that the rows of a batch are split into."""
    return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

  def share(self) -> tuple[int, int]:
    """`(index, count)`: the share of each global batch that this process reads.

    Processes whose devices hold the same rows, of split sequences or split layers, read
    the same share.

    Raises:
      InputError: processes hold rows that overlap, but are not the same.
    """
    mine, shares = self._blocks
    return shares.index(mine), len(shares)

  @functools.cached_property
  def _blocks(self) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Of `batch_ways` blocks of rows those of this process, and of each share."""
    blocks: dict[int, set[int]] = {}
    places = self._rows(self.batch_ways, 1).devices_indices_map((self.batch_ways,))
    for device, index in places.items():
      start, stop, _ = index[0].indices(self.batch_ways)
      blocks.setdefault(device.process_index, set()).update(range(start, stop))
    shares = sorted({tuple(sorted(held)) for held in blocks.values()})
    flat = sorted(block for share in shares for block in share)
    if flat != list(range(self.batch_ways)) or len({*map(len, shares)}) > 1:
      raise errors.InputError(
        f"mesh.shape {dict(self.mesh.shape)} gives the {len(blocks)} processes rows of "
        "a batch that overlap in part; make the axes that split it (data, fsdp, "
        "expert) a multiple or a divisor of the number of processes"
      )
    return tuple(sorted(blocks.get(jax.process_index(), shares[0]))), shares

  def put(self, rows: np.ndarray | jax.Array) -> jax.Array:
    """A process's share of the rows of a batch `[b, L, ...]`, as the global array.

    Where the devices of a process do not lie side by side, the rows of the batch do not
    either; which row stands where makes no difference to a training.

    Raises:
      InputError: the rows do not divide among the devices.
    """
    _, count = self.share()
    num_rows = rows.shape[0] * count
    if num_rows % self.batch_ways:
      raise errors.InputError(
        f"a batch of {num_rows} sequences does not divide among {self.batch_ways} "
        f"devices; make it a multiple of {self.batch_ways}, or use fewer devices"
      )
    spec = self._rows(num_rows, rows.ndim, rows.shape[1:])
    if count == 1 and jax.process_count() == 1:
      return jax.device_put(rows, spec)
    size, mine = num_rows // self.batch_ways, self._blocks[0]

    def block(place: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = place[0].indices(num_rows)
      first = mine.index(start // size) * size
      return np.asarray(rows)[(slice(first, first + stop - start), *place[1:])]

    shape = (num_rows, *rows.shape[1:])
    return jax.make_array_from_callback(shape, spec, block)

  def put_all(self, rows: np.ndarray) -> jax.Array:
    """All rows of a batch `[B, L, ...]`, which every process has, as a global array.

    They are split over devices as far as they divide.
    """
    spec = self._rows(rows.shape[0], rows.ndim, rows.shape[1:])
    return jax.make_array_from_callback(rows.shape, spec, lambda place: rows[place])

  def abstract(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """What `put` makes of a batch of a global shape `[B, L, ...]`."""
    sharding = self._rows(shape[0], len(shape), shape[1:])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def _rows(self, num_rows: int, ndim: int, rest: Sequence[int] = ()) -> NamedSharding:
    axes = ("batch", "length")[:ndim] + (None,) * (ndim - 2)
    spec = shard_lib.partition_spec(
      axes, (num_rows, *rest), self.mesh, self.preset.activations
    )
    return NamedSharding(self.mesh, spec)


def make(mesh_config: mesh_lib.MeshConfig) -> Spread:
  """The spread of a config over the devices at hand.

  Raises:
    InputError: see mesh.make and pipeline.Schedule.
  """
  spread = Spread(mesh_lib.make(mesh_config), mesh_config)
  spread.schedule()  # Raises what it would raise later, while a step is compiled.
  return spread


def over(preset: str = "dp", **fields: Any) -> Spread:
  """The spread of a preset over the devices at hand, such as `over("fsdp")`.

  Args:
    preset: see rules.find.
    **fields: of MeshConfig.
  """
  return make(mesh_lib.MeshConfig(preset=preset, **fields))
