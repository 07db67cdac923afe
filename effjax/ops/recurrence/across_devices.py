"""Recurrences over sequences that are split over devices, a slice of tokens on each.

All recurrences here are affine in their state: over a slice, S_after = A S_before + B,
where A is its decay (or transition matrix) and B the state after it from none before.
So no device waits for its neighbour to finish: each finds A and B of its slice, and
log2(n) messages from ever further away compose them, the exclusive prefix of Hillis and
Steele 1986 (Data parallel algorithms, Comm. ACM 29). A message is one A and one B,
however long the sequence is. Gradients travel the same way from the last device to the
first.

Documents do not meet on different devices either: a slice that begins with a new one
has A = 0 (see `segments.documents`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core import shard

# Mesh axes that the sequence is split over, inside `shard.on_devices`; () for none.
Over = tuple[str, ...]


def run(
  op: Callable[..., Any],
  args: Mapping[str, jax.Array | None],
  outs: tuple[str, ...] | str,
  split: Mapping[str, str],
  state: str | None = None,
) -> Any:
  """`op(**args)`, on slices of the sequence where the active rules split it.

  Args:
    op: function of arrays by name; on slices also of `over`.
    args: its arrays; what follows the last "_" of a name is one letter a dimension.
    outs: the letters of each result.
    split: logical axis of the letters whose dimensions may be split, "L" among them.
      Letters of one axis have sizes of which the smallest divides the others.
    state: name of the argument that is the state before the first token, and of which
      the last result is the one after the last token. The first device's slice starts
      from it, the others' from none, and what the last device returns is the result.

  Returns:
    What `op` returns for the whole sequence.
  """
  if not shard.split_over("length"):
    return op(**args)
  given = {name: z for name, z in args.items() if z is not None}
  letters = {name: name.rpartition("_")[2] for name in given}
  sizes: dict[str, int] = {}
  for name, z in given.items():
    for letter, size in zip(letters[name], z.shape, strict=True):
      if letter in split:
        sizes[split[letter]] = min(size, sizes.get(split[letter], size))
  over = shard.split_of("length", sizes)
  if not over:  # the length does not divide
    return op(**args)

  def on_slice(*arrays: jax.Array) -> Any:
    here = dict(args) | dict(zip(given, arrays, strict=True))
    if state in given:
      here[state] = jnp.where(lax.axis_index(over) == 0, here[state], 0)
    results = op(**here, over=over)
    if state is None:
      return results
    *others, after = results
    return (*others, of_one(after, lax.axis_index(over) == num_slices(over) - 1, over))

  axes = lambda letters: tuple(split.get(letter) for letter in letters)
  return shard.on_devices(
    on_slice,
    tuple(given.values()),
    tuple(axes(letters[name]) for name in given),
    axes(outs) if isinstance(outs, str) else tuple(axes(out) for out in outs),
    sizes,
  )


def arriving(
  decay: jax.Array,
  added: jax.Array,
  over: Over,
  *,
  times: Callable[[jax.Array, jax.Array], jax.Array] = jnp.multiply,
  reverse: bool = False,
) -> jax.Array:
  """The state that each device's slice receives from all those before it.

  Args:
    decay: A of the device's slice.
    added: B of the device's slice, with what the slice itself starts from.
    over: the mesh axes.
    times: the product of an A with an A or with a state.
    reverse: whether states go from the last device to the first.

  Returns:
    S of the first device is 0, then S' = A S + B from device to device.
  """
  take = functools.partial(receive, over=over, reverse=reverse)
  # What each device has composed: the slices `reach` to 1 places before its own. Where
  # there are fewer, zeros were received, and A times no state adds nothing.
  reach, last = 1, num_slices(over) - 1
  added = take(added, 1)
  if reach < last:
    decay = take(decay, 1)
  while reach < last:
    added = times(decay, take(added, reach)) + added
    if 2 * reach < last:
      decay = times(decay, take(decay, reach))
    reach *= 2
  return added


def joined(
  met: jax.Array,
  after: jax.Array,
  decay: jax.Array,
  axis: int,
  over: Over,
  *,
  reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """States of the chunks of a slice, once those of the slices before have arrived.

  Args:
    met: the state that each chunk meets, from what the slice itself starts from.
    after: the state after the last chunk.
    decay: over each chunk, with the axes of `met` (of size 1 where all are equal).
    axis: of the chunks.
    over: the mesh axes.
    reverse: whether chunks and devices follow each other from the last to the first.

  Returns:
    Both with the states of the slices before.
  """
  passed = lax.cumprod(decay, axis, reverse=reverse)
  num_chunks = decay.shape[axis]
  whole = lax.index_in_dim(passed, 0 if reverse else num_chunks - 1, axis, False)
  state = arriving(whole, after, over, reverse=reverse)
  one = jnp.ones_like(lax.slice_in_dim(passed, 0, 1, axis=axis))
  if reverse:
    before = [lax.slice_in_dim(passed, 1, num_chunks, axis=axis), one]
  else:
    before = [one, lax.slice_in_dim(passed, 0, num_chunks - 1, axis=axis)]
  met += jnp.concatenate(before, axis) * jnp.expand_dims(state, axis)
  return met, after + whole * state


def starts_anew(segments_BL: jax.Array, over: Over) -> jax.Array:
  """Whether the first token of a slice is of another segment than the last before it.

  Tokens are those that are no padding; a slice without any, and one before which there
  is none, starts nothing anew. One segment id a row and device is exchanged.
  """
  ids_B2 = first_and_last(segments_BL)
  last_nB = lax.all_gather(ids_B2[:, 1], over)
  place_n1 = jnp.arange(last_nB.shape[0])[:, None]
  earlier_nB = (last_nB != 0) & (place_n1 < lax.axis_index(over))
  newest_1B = jnp.max(jnp.where(earlier_nB, place_n1, 0), axis=0, keepdims=True)
  previous_B = jnp.take_along_axis(
    jnp.where(earlier_nB, last_nB, 0), newest_1B, axis=0
  )[0]
  return (previous_B != 0) & (ids_B2[:, 0] != 0) & (ids_B2[:, 0] != previous_B)


def first_and_last(segments_BL: jax.Array) -> jax.Array:
  """The segments of the first and the last token of each row, 0 without any: `[B, 2]`.

  Tokens are those that are no padding.
  """
  real_BL = segments_BL != 0
  first_B = jnp.argmax(real_BL, axis=1)
  last_B = real_BL.shape[1] - 1 - jnp.argmax(real_BL[:, ::-1], axis=1)
  return jnp.take_along_axis(segments_BL, jnp.stack([first_B, last_B], 1), axis=1)


def of_one(z: jax.Array, chosen: jax.Array, over: Over) -> jax.Array:
  """The array of the device where `chosen` holds, on all of them."""
  return lax.psum(jnp.where(chosen, z, 0), over)


def anywhere(flag: jax.Array) -> jax.Array:
  """Whether the flag holds on any device, of all axes of the mesh.

  Branches with messages in them have to be taken by all devices alike.
  """
  axes = jax.sharding.get_abstract_mesh().axis_names
  return lax.pmax(flag.astype(jnp.int32), axes) > 0


def num_slices(over: Over) -> int:
  """How many devices share a sequence."""
  return lax.axis_size(over)


def receive(
  z: jax.Array, distance: int, over: Over, *, reverse: bool = False
) -> jax.Array:
  """The array of the device `distance` places before (after), zeros without one."""
  from_to = [(i, i + distance) for i in range(num_slices(over) - distance)]
  return lax.ppermute(z, over, [(j, i) for i, j in from_to] if reverse else from_to)
