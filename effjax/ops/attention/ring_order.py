"""In which order keys travel around a ring, and which blocks meet on which device.

Liu et al. 2023, arXiv:2310.01889, section 3: every device keeps its queries, and keys
and values go from each to the next. Causal patterns would leave the first devices of a
contiguous split without work in most steps (Brandon et al. 2023, arXiv:2311.09431,
section 2), so they are balanced as in Llama 3 (arXiv:2407.21783, section 3.3.2): of 2n
chunks device i works on chunks i and 2n - 1 - i ("zigzag"). In every step but the
first, two of the four products of a chunk of queries and a chunk of keys are wholly
seen, and two not at all, on every device.

In contiguous order one distance lies between the queries of a device and the keys of
a step, so windows skip blocks, and steps in which nothing is seen.

Nothing here but `to_zigzag` and `from_zigzag` looks at an array of tokens.

Local letters: P pairs of a block of queries and a block of keys.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core.config import require
from effjax.ops.attention import patterns

# A mesh axis, or several as if they were one.
AxisName = str | tuple[str, ...]


class Step(NamedTuple):
  """One step of the ring.

  Attributes:
    offset: device i has the keys of device i - offset (modulo their number).
    arrives: by how many devices keys have moved since the step before.
    leaves: by how many they move to the next one; 0 in the last.
    pattern: who sees whom among what is multiplied.
    pairs_P2: which block of queries is multiplied with which block of keys, int32; in
      zigzag order, but for step 0, of one chunk with one chunk.
  """

  offset: int
  arrives: int
  leaves: int
  pattern: patterns.Pattern
  pairs_P2: np.ndarray

  @property
  def kind(self) -> tuple[Any, ...]:
    """Steps of one kind differ in their offset only."""
    shape = self.pairs_P2.shape
    return self.arrives, self.leaves, self.pattern, shape, self.pairs_P2.tobytes()


@dataclasses.dataclass(frozen=True)
class Order:
  """How the tokens of a sequence lie on the devices of a ring.

  Attributes:
    pattern: who sees whom.
    num_devices: n.
    slice_len: tokens of a device.
    block: tokens of a block, at most those of a part.
    zigzag: whether a device holds chunks i and 2n - 1 - i of 2n, in place of its slice.
    by_index: whether positions in a document are in the order of the indices.
  """

  pattern: patterns.Pattern
  num_devices: int
  slice_len: int
  block: int
  zigzag: bool
  by_index: bool = True

  @property
  def part_len(self) -> int:
    """Tokens that lie together: of a chunk in zigzag order, else of a slice."""
    return self.slice_len // 2 if self.zigzag else self.slice_len

  @property
  def num_blocks(self) -> int:
    """Blocks of a part, the last of which may be padded."""
    return -(-self.part_len // self.block)

  @property
  def steps(self) -> tuple[Step, ...]:
    """All steps in which any device has something to do."""
    return _steps(self)

  @property
  def groups(self) -> tuple[tuple[Step, ...], ...]:
    """The steps, those of one kind that follow each other together."""
    grouped = itertools.groupby(self.steps, key=lambda step: step.kind)
    return tuple(tuple(steps) for _, steps in grouped)

  @property
  def num_pairs(self) -> int:
    """Pairs of a query and a key that a device multiplies, masked ones included."""
    per_step = 2 if self.zigzag else 1
    counts = [
      len(step.pairs_P2) * (per_step if step.offset else 1) for step in self.steps
    ]
    return self.block**2 * sum(counts)


def chunk_of(device: Any, half: Any, num_devices: int) -> Any:
  """Number of a chunk of 2n in zigzag order: half 0 or 1 of a device."""
  return half * (2 * num_devices - 1 - device) + (1 - half) * device


def products(device: Any, source: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
  """The two products of a step after the first, in zigzag order.

  Keys of an earlier device: its first chunk comes before both chunks of queries, its
  second one after both. Of a later one: both chunks come before the second chunk of
  queries and after the first.

  Args:
    device: the one that multiplies, an integer, traced or not.
    source: the one whose keys it has, another one.

  Returns:
    Twice the half of the queries and the half of the keys, 0 or 1.
  """
  half = (source > device) * 1
  return (1, 0), (half, half)


def block_pairs(order: Order, step: Step, offset: Any, device: Any) -> Any:
  """What a device multiplies in a step: pairs of blocks of its parts, int32 [P, 2].

  Args:
    order: the order.
    step: the step, or one of its kind.
    offset: of the step, an integer, traced or not.
    device: number of the device, traced or not.
  """
  if not order.zigzag or step.offset == 0:
    return step.pairs_P2
  chosen = products(device, (device - offset) % order.num_devices)
  starts = [jnp.stack([jnp.int32(half) for half in pair]) for pair in chosen]
  moved = [step.pairs_P2 + order.num_blocks * start[None] for start in starts]
  return jnp.concatenate(moved)


@functools.lru_cache(maxsize=256)
def _steps(order: Order) -> tuple[Step, ...]:
  count = order.num_devices
  found = [(offset, _layout_pairs(order, offset)) for offset in range(count)]
  found = [(offset, pairs) for offset, pairs in found if len(pairs)]
  offsets = [offset for offset, _ in found]
  steps = []
  for k, (offset, pairs) in enumerate(found):
    pattern = order.pattern
    if order.zigzag and offset and isinstance(pattern, patterns.Causal):
      pattern = patterns.FULL  # Nothing that is multiplied is hidden.
    leaves = offsets[k + 1] - offset if k + 1 < len(offsets) else 0
    arrives = offset - offsets[k - 1] if k else offset
    steps.append(Step(offset, arrives, leaves, pattern, pairs))
  return tuple(steps)


def _layout_pairs(order: Order, offset: int) -> np.ndarray:
  """The pairs of a step; see Step."""
  count, part = order.num_blocks, order.part_len
  if not order.zigzag:
    behind = _layout(order, offset * part)
    # The devices before number `offset` have keys from the other end of the sequence.
    ahead = _layout(order, (offset - order.num_devices) * part) if offset else behind
    return np.argwhere(behind | ahead).astype(np.int32)
  whole = np.ones((count, count), bool)
  if offset:
    return np.argwhere(whole).astype(np.int32)
  none, own = np.zeros((count, count), bool), _layout(order, 0)
  return np.argwhere(np.block([[own, none], [whole, own]])).astype(np.int32)


def _layout(order: Order, distance: int) -> np.ndarray:
  """Which blocks of queries see anything in which blocks of keys, bool [N, N].

  Args:
    order: the order.
    distance: from the first key of a part to the first query of one.
  """
  closest, furthest = _reach(order)
  first = np.arange(order.num_blocks) * order.block
  last = np.minimum(first + order.block, order.part_len) - 1
  most = distance + last[:, None] - first[None]
  least = distance + first[:, None] - last[None]
  return (most >= closest) & (least <= furthest)


def _reach(order: Order) -> tuple[float, float]:
  """Least and largest difference between the indices of a query and of what it sees."""
  if not order.by_index:
    return -np.inf, np.inf
  pattern = order.pattern
  if not isinstance(pattern, patterns.Window):
    return (0.0 if pattern.causal else -np.inf), np.inf
  if pattern.causal:
    return 0.0, pattern.window - 1.0
  return -float(pattern.window // 2), float(pattern.window // 2)


def choose(
  pattern: patterns.Pattern,
  num_devices: int,
  slice_len: int,
  block_size: Callable[[int], int],
  by_index: bool,
) -> Order:
  """The order in which the busiest device multiplies fewest pairs.

  Args:
    pattern: who sees whom.
    num_devices: n.
    slice_len: tokens of a device.
    block_size: tokens of a block, of the tokens of a part.
    by_index: see Order.

  Raises:
    InputError: chunks are needed, and a slice does not divide into two.
  """
  size = lambda part: max(1, min(block_size(part), part))
  fixed = (pattern, num_devices, slice_len)
  plain = Order(*fixed, size(slice_len), zigzag=False, by_index=by_index)
  if not (pattern.causal and by_index and num_devices > 1):
    return plain
  if slice_len > 1:
    zigzag = Order(*fixed, size(slice_len // 2), zigzag=True)
    if zigzag.num_pairs >= plain.num_pairs:
      return plain
  length, unit = num_devices * slice_len, 2 * num_devices
  require(
    slice_len % 2 == 0,
    f"sequences of {length} tokens do not divide into {unit} chunks, two for each of "
    f"the {num_devices} devices that a causal pattern is balanced over; use "
    f"{nearest(length, unit)} tokens, or a preset without 'ring'",
  )
  return zigzag


def nearest(count: int, unit: int) -> str:
  """The multiples of a unit next to a count, for a message."""
  below, above = count // unit * unit, -(-count // unit) * unit
  return f"{below} or {above}" if below else str(above)


def to_zigzag(tree: Any, axis_name: AxisName) -> tuple[Any, Any]:
  """From the slice of every device to its two chunks.

  Args:
    tree: arrays `[., L / n, ...]`.
    axis_name: of the mesh.

  Returns:
    The tree of chunk i and that of chunk 2n - 1 - i, on device i.
  """
  even, routes = _routes(axis_name)

  def one(x_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    halves = jnp.split(x_BL, 2, axis=1)
    a, b = (
      lax.ppermute(half, axis_name, route)
      for half, route in zip(halves, routes, strict=True)
    )
    return jnp.where(even, a, b), jnp.where(even, b, a)

  flat, structure = jax.tree.flatten(tree)
  parts = [one(x) for x in flat]
  return tuple(structure.unflatten([pair[half] for pair in parts]) for half in (0, 1))


def from_zigzag(
  first_BL: jax.Array, second_BL: jax.Array, axis_name: AxisName
) -> jax.Array:
  """The slice of every device from its two chunks: undoes `to_zigzag`."""
  even, routes = _routes(axis_name)
  chunks = (jnp.where(even, first_BL, second_BL), jnp.where(even, second_BL, first_BL))
  halves = [
    lax.ppermute(chunk, axis_name, [(target, start) for start, target in route])
    for chunk, route in zip(chunks, routes, strict=True)
  ]
  return jnp.concatenate(halves, axis=1)


def _routes(axis_name: AxisName) -> tuple[jax.Array, list[list[tuple[int, int]]]]:
  """Whether this device is even; where the first and the second half of a slice go.

  A device gets one chunk of an even number and one of an odd number: all first halves
  are even, all second halves odd, so each set moves by a permutation of the devices.
  """
  count = lax.axis_size(axis_name)
  holder = lambda chunk: min(chunk, 2 * count - 1 - chunk)
  routes = [[(i, holder(2 * i + half)) for i in range(count)] for half in (0, 1)]
  return lax.axis_index(axis_name) % 2 == 0, routes
