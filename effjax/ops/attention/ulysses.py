"""Attention over split sequences by exchanging the split for one of the heads.

Jacobs et al. 2023, arXiv:2309.14509, section 3: an all-to-all brings whole sequences of
1 / n of the heads to each of n devices, any attention runs on them, another one brings
the outputs back.
Deviation: with fewer key heads than devices, or a number that n does not divide, key
heads are sent to every device with query heads that need them, and to no other (twice,
if they would else serve different numbers of them).

Local letters: W size of a value head, G key heads.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core.config import require
from effjax.ops.attention import ring_order


def attention(
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGW: jax.Array,
  slopes_H: jax.Array | None = None,
  *,
  axis_name: ring_order.AxisName,
  run: Callable[..., jax.Array],
) -> jax.Array:
  """What one device computes of `api.attention`, inside `jax.shard_map`.

  Args:
    q_BLHK, k_BLGK, v_BLGW: its slice of the sequence.
    slopes_H: slopes of the heads (ALiBi), or None.
    axis_name: mesh axis that the sequence is split over.
    run: `run(q, k, v, slopes)`, attention over whole sequences of fewer heads.

  Returns:
    y_BLHW of the slice in the dtype of q.

  Raises:
    InputError: the devices do not divide the query heads.
  """
  num_heads, ways = q_BLHK.shape[2], lax.axis_size(axis_name)
  check_heads(num_heads, ways)
  to_heads = lambda x: lax.all_to_all(x, axis_name, 2, 1, tiled=True)
  k_BLGK, v_BLGW = (divisible(x, ways) for x in (k_BLGK, v_BLGW))
  own_slopes = None
  if slopes_H is not None:
    size = num_heads // ways
    start = lax.axis_index(axis_name) * size
    own_slopes = lax.dynamic_slice_in_dim(slopes_H, start, size)
  y_BLHW = run(to_heads(q_BLHK), to_heads(k_BLGK), to_heads(v_BLGW), own_slopes)
  return lax.all_to_all(y_BLHW, axis_name, 1, 2, tiled=True)


def check_heads(num_heads: int, ways: int, held: int = 1) -> None:
  """Raises InputError unless the devices divide the query heads.

  Args:
    num_heads: query heads that a device has of its slice.
    ways: devices that the length is split over.
    held: parts that the heads are already in, for the message.
  """
  devices = f"{ways} devices" if held == 1 else f"{held} x {ways} devices"
  near = ring_order.nearest(num_heads * held, ways * held)
  require(
    num_heads % ways == 0,
    f"num_heads={num_heads * held} do not divide over the {devices} of preset "
    f"'ulysses'; use {near} heads, fewer devices, or preset 'ring'",
  )


def num_repeats(num_groups: int, ways: int) -> int:
  """How often each key head is repeated, so that so many devices divide them."""
  return ways // math.gcd(num_groups, ways)


def divisible(x_BSGK: jax.Array, ways: int) -> jax.Array:
  """Key heads, or those of values, repeated until so many devices divide them.

  Consecutive query heads share a key head as before, if the devices divide them.
  """
  *rows, num_groups, size = x_BSGK.shape
  times = num_repeats(num_groups, ways)
  if times == 1:
    return x_BSGK
  x_BSGRK = jnp.broadcast_to(x_BSGK[:, :, :, None], (*rows, num_groups, times, size))
  return x_BSGRK.reshape(*rows, num_groups * times, size)
