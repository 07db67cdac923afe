"""What TPU chips can do, from their makers' pages, and how a slice of them is wired.

Rates are peaks: what a program reaches of them is `roofline`'s and `calibration`'s.
"""

import dataclasses
import math

from effjax.core import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One generation of TPU.

  Attributes:
    flops: bfloat16 FLOPs a second.
    int8_ops: int8 operations a second; the bfloat16 rate where it has no faster one.
    hbm_bytes: memory that programs may use, which the compiler says when one needs
      more; 16, 95 and 32 GB are built in.
    hbm_rate: bytes a second of it.
    link_rate: bytes a second that one link to a neighbour sends.
    axes: of the network: 2 or 3; two links each.
    wraps_at: an axis of the network closes to a ring where its size is a multiple.
    source: where the numbers are from.
  """

  flops: float
  int8_ops: float
  hbm_bytes: int
  hbm_rate: float
  link_rate: float
  axes: int
  wraps_at: int
  source: str


_GIB = 2**30
_PAGE = "https://cloud.google.com/tpu/docs/"
# Links: the page's bidirectional bandwidth of a chip over two directions and its links.
# Rings: axes of 16 of v5e and v6e, of multiples of 4 of v5p ("How to scale your model",
# chapter 2: https://jax-ml.github.io/scaling-book/tpus).
CHIPS = {
  "v5e": Chip(
    flops=197e12,
    int8_ops=393e12,
    hbm_bytes=int(15.75 * _GIB),
    hbm_rate=819e9,
    link_rate=400e9 / 2 / 4,
    axes=2,
    wraps_at=16,
    source=_PAGE + "v5e",
  ),
  "v5p": Chip(
    flops=459e12,
    int8_ops=918e12,
    hbm_bytes=int(95.74 * _GIB),
    hbm_rate=2765e9,
    link_rate=1200e9 / 2 / 6,
    axes=3,
    wraps_at=4,
    source=_PAGE + "v5p; int8: How to scale your model, chapter 2",
  ),
  "v6e": Chip(
    flops=918e12,
    int8_ops=1836e12,
    hbm_bytes=int(31.25 * _GIB),
    hbm_rate=1638e9,
    link_rate=800e9 / 2 / 4,
    axes=2,
    wraps_at=16,
    source=_PAGE + "v6e",
  ),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips of one generation in a box.

  Attributes:
    name: such as "v5e:16x16".
    chip: what each can do.
    shape: chips along each axis of the network.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def num_chips(self) -> int:
    """All of them."""
    return math.prod(self.shape)

  def is_ring(self, axis: int) -> bool:
    """Whether the last chip of an axis is next to its first."""
    return self.shape[axis] % self.chip.wraps_at == 0


def parse(name: str) -> Slice:
  """A slice from its name.

  Raises:
    InputError: an unknown generation, or a shape that is none of its.
  """
  generation, _, shape = name.partition(":")
  if generation not in CHIPS:
    raise errors.unknown("TPU generation", generation, sorted(CHIPS))
  chip = CHIPS[generation]
  sizes = shape.split("x")
  if len(sizes) != chip.axes or not all(n.isdigit() and int(n) > 0 for n in sizes):
    example = "16x16" if chip.axes == 2 else "4x4x8"
    raise errors.InputError(
      f"topology {name!r}: {generation} has chips along {chip.axes} axes, "
      f"such as {generation}:{example}"
    )
  return Slice(name, chip, tuple(map(int, sizes)))
