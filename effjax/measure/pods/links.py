"""How long a collective keeps the links between the chips of a slice busy.

A group of devices that fills an axis of the network (or several) talks around rings,
in both directions. Where an axis does not close to a ring, data goes one way at a time
in the worst place; where the group's devices are not neighbours, as many groups as the
gap is wide share each link. Latency of hops is added once a hop.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from effjax.measure.pods import chips
from effjax.parallel import collectives

# "How to scale your model", chapter 3: about a microsecond a hop.
HOP_SECS = 1e-6


@dataclasses.dataclass(frozen=True)
class Wiring:
  """Where the devices of a program are in a slice.

  Attributes:
    slice: the chips.
    coords: place of every device of the program, in its numbering.
  """

  slice: chips.Slice
  coords: Sequence[tuple[int, ...]]

  def secs(self, one: collectives.Collective) -> float:
    """Of one run of a collective."""
    if one.kind == "collective-permute":
      return self._permute(one)
    if one.group_size == 1:
      return 0.0
    ways, hops = self._spanned(one.groups[0])
    rate = ways * self.slice.chip.link_rate
    if one.kind == "all-to-all":
      # Of what a chip sends half goes around each way, on average a quarter of a ring.
      return one.num_bytes * hops / 4 / rate / 2 + hops * HOP_SECS
    once = dataclasses.replace(one, times=1)
    passes = 2 if one.kind == "all-reduce" else 1
    return once.wire_bytes / rate + passes * hops * HOP_SECS

  def _spanned(self, group: Sequence[int]) -> tuple[float, int]:
    """Links that carry a group's data at once, and its longest way."""
    places = [self.coords[device] for device in group]
    ways, hops = 0.0, 0
    for axis, size in enumerate(self.slice.shape):
      along = sorted({place[axis] for place in places})
      if len(along) == 1:
        continue
      gap = min(b - a for a, b in zip(along, along[1:], strict=False))
      closed = self.slice.is_ring(axis) and len(along) * gap == size
      ways += (2 if closed else 1) / gap
      hops += (len(along) * gap) // (2 if closed else 1)
    return max(ways, 1e-9), hops

  def _permute(self, one: collectives.Collective) -> float:
    """All pairs at once, each by the shortest way, the busiest link decides."""
    load: dict[tuple, int] = {}
    longest = 0
    for source, target in one.groups:
      hops = 0
      for link in self._way(self.coords[source], self.coords[target]):
        load[link] = load.get(link, 0) + 1
        hops += 1
      longest = max(longest, hops)
    busiest = max(load.values(), default=0)
    return busiest * one.num_bytes / self.slice.chip.link_rate + longest * HOP_SECS

  def _way(self, start: tuple[int, ...], end: tuple[int, ...]) -> Iterator[tuple]:
    """Links from one chip to another, axis by axis."""
    here = list(start)
    for axis, size in enumerate(self.slice.shape):
      forward = (end[axis] - here[axis]) % size
      step, count = 1, forward
      if self.slice.is_ring(axis):
        if forward > size - forward:
          step, count = -1, size - forward
      elif end[axis] < here[axis]:
        step, count = -1, here[axis] - end[axis]
      for _ in range(count):
        yield (tuple(here), axis, step)
        here[axis] = (here[axis] + step) % size


def of_mesh(slice_: chips.Slice, mesh: Mesh) -> Wiring:
  """The wiring of a mesh's devices, which a program numbers in their order."""
  rank = len(slice_.shape)
  return Wiring(slice_, [tuple(d.coords)[:rank] for d in mesh.devices.flat])
