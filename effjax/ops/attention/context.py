"""Attention where the active rules split the length of sequences between devices.

Context parallelism, one entry for two ways: `ring` sends keys around, `ulysses` splits
heads in place of the length. A rule for the logical axis "whole_heads" asks for the
second. Batch and heads stay split as the rules have them; key heads that do not divide
are repeated if the query heads do, so that every device has those that it needs.

Local letter: W size of a value head.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from effjax.core import errors, shard
from effjax.core.config import require
from effjax.ops.attention import choice, masks, ring, ring_order, ulysses

# What a ring can be asked for by name; it computes by blocks.
_OF_RING = ("auto", "blockwise")


def facts() -> dict[str, Any]:
  """What the active rules split, as fields of a `choice.Problem`."""
  return {
    "length_ways": _ways("length"),
    "head_ways": _ways("kv"),
    "whole_heads": bool(shard.split_over("whole_heads")),
  }


def explain(implementation: str, problem: choice.Problem) -> choice.Choice:
  """What `attention` runs, and why.

  Raises:
    InputError: it cannot be done (one line that says what can).
  """
  ways = problem.length_ways
  if not problem.whole_heads:
    zigzag = _ring_order(implementation, problem).zigzag
    reason = f"the length is split over {ways} devices, "
    reason += "in an order that balances them" if zigzag else "in contiguous order"
    if not problem.pattern.relative:
      name = type(problem.pattern).__name__
      reason += f"; it masks what {name} hides, and multiplies it"
    return choice.Choice("ring", reason)
  inner = choice.explain(implementation, of_one_device(problem))
  return choice.Choice(
    "ulysses",
    f"the length is split over {ways} devices, and heads in its place; each runs "
    f"{inner.name} because {inner.reason}",
  )


def of_one_device(problem: choice.Problem) -> choice.Problem:
  """What preset "ulysses" runs on each device: whole sequences, some of the heads.

  Raises:
    InputError: the heads or the length do not divide.
  """
  _check_length(problem)
  ways, held = problem.length_ways, problem.head_ways
  num_heads, num_groups = problem.q_shape[2], problem.k_shape[2]
  if num_heads % held:
    held = 1  # They are whole on each.
  ulysses.check_heads(num_heads // held, ways, held)
  num_groups = num_groups * ulysses.num_repeats(num_groups, held) // held
  num_groups = num_groups * ulysses.num_repeats(num_groups, ways) // ways
  cut = lambda shape, count: (*shape[:2], count, shape[3])
  return dataclasses.replace(
    problem,
    q_shape=cut(problem.q_shape, num_heads // held // ways),
    k_shape=cut(problem.k_shape, num_groups),
    v_shape=cut(problem.v_shape, num_groups),
    length_ways=1,
    head_ways=1,
    whole_heads=False,
  )


def attention(
  q_BLHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGW: jax.Array,
  problem: choice.Problem,
  run: Callable[..., jax.Array],
  *,
  implementation: str,
  q_positions_BL: jax.Array | None,
  kv_positions_BS: jax.Array | None,
  q_segments_BL: jax.Array | None,
  kv_segments_BS: jax.Array | None,
  slopes_H: jax.Array | None,
  logit_cap: float | None,
  scale: float | None,
) -> jax.Array:
  """`api.attention` under active rules that split the length.

  Args:
    q_BLHK, k_BSGK, v_BSGW: whole arrays.
    problem: of this call, with the `facts`.
    run: `run(q, k, v, problem, **options)`, attention on one device, which preset
      "ulysses" runs on each.
    implementation: of that one; for a ring "auto" or "blockwise".
    q_positions_BL, kv_positions_BS, q_segments_BL, kv_segments_BS, slopes_H, logit_cap,
      scale: see there.

  Returns:
    y_BLHW in the dtype of q.

  Raises:
    InputError: it cannot be done (one line that says what can).
  """
  if q_BLHK.shape[2] % problem.head_ways == 0:
    k_BSGK, v_BSGW = (ulysses.divisible(x, problem.head_ways) for x in (k_BSGK, v_BSGW))
  sides = (q_positions_BL, kv_positions_BS, q_segments_BL, kv_segments_BS)
  options = {"logit_cap": logit_cap, "scale": scale}
  axis_name = shard.split_over("length")
  if problem.whole_heads:
    tokens, length = sides, None
    inner = functools.partial(run, implementation=implementation, **options)
    fn = functools.partial(_whole_heads, inner, of_one_device(problem), axis_name)
  else:
    _ring_order(implementation, problem)
    tokens, length = _tokens(problem, sides), "length"
    fn = functools.partial(_ring, problem, axis_name, options)
  heads = ("batch", "length", "kv", None)
  rows = lambda x: "batch" if x.shape[0] == q_BLHK.shape[0] else None
  axes = [heads, heads, heads, None if slopes_H is None else ("kv",)]
  axes += [None if x is None else (rows(x), length) for x in tokens]
  sizes = {"batch": q_BLHK.shape[0], "length": q_BLHK.shape[1], "kv": k_BSGK.shape[2]}
  args = (q_BLHK, k_BSGK, v_BSGW, slopes_H, *tokens)
  return shard.on_devices(fn, args, axes, heads, sizes)


def _ring(
  problem: choice.Problem,
  axis_name: ring_order.AxisName,
  options: Mapping[str, Any],
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGW: jax.Array,
  slopes_H: jax.Array | None,
  *tokens: jax.Array | None,
) -> jax.Array:
  """What a device of a ring computes; `tokens` are the fields of both sides."""
  return ring.attention(
    q_BLHK,
    k_BLGK,
    v_BLGW,
    masks.Tokens(*tokens[:3]),
    masks.Tokens(*tokens[3:]),
    slopes_H,
    axis_name=axis_name,
    pattern=problem.pattern,
    by_index=not problem.positions,
    platform=problem.platform,
    **options,
  )


def _whole_heads(
  run: Callable[..., jax.Array],
  problem: choice.Problem,
  axis_name: ring_order.AxisName,
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGW: jax.Array,
  slopes_H: jax.Array | None,
  *sides: jax.Array | None,
) -> jax.Array:
  """What a device computes that has whole sequences of some heads."""
  names = ("q_positions_BL", "kv_positions_BS", "q_segments_BL", "kv_segments_BS")
  given = dict(zip(names, sides, strict=True))
  whole = lambda q, k, v, slopes: run(q, k, v, problem, slopes_H=slopes, **given)
  return ulysses.attention(
    q_BLHK, k_BLGK, v_BLGW, slopes_H, axis_name=axis_name, run=whole
  )


def _ring_order(implementation: str, problem: choice.Problem) -> ring_order.Order:
  """The order of a ring, if it can do it."""
  ways = problem.length_ways
  if implementation not in _OF_RING:
    choice.refusal(implementation, problem)  # Says which names there are.
    raise errors.InputError(
      f"attention implementation={implementation!r} is for whole sequences, and preset "
      f"'ring' splits them over {ways} devices; use 'auto', or preset 'ulysses'"
    )
  _check_length(problem)
  return ring.order_of(
    problem.pattern,
    ways,
    problem.q_shape[1] // ways,
    by_index=not problem.positions,
    platform=problem.platform,
  )


def _check_length(problem: choice.Problem) -> None:
  q_len, kv_len, ways = problem.q_shape[1], problem.k_shape[1], problem.length_ways
  require(
    q_len == kv_len,
    f"attention of {q_len} queries over {kv_len} keys cannot be split by length: it "
    "takes as many queries as keys, or a preset without 'ring' and 'ulysses'",
  )
  require(
    q_len % ways == 0,
    f"sequences of {q_len} tokens do not divide over {ways} devices; use "
    f"{ring_order.nearest(q_len, ways)} tokens, or a preset without 'ring' and "
    "'ulysses'",
  )


def _tokens(
  problem: choice.Problem, sides: tuple[jax.Array | None, ...]
) -> tuple[jax.Array | None, ...]:
  """The fields of both sides of the mask, of whole sequences."""
  q_positions, kv_positions, *segments = sides
  if not problem.pattern.relative:
    # Where a document starts and ends is looked for in whole rows.
    whole = lambda x: None if x is None else shard.shard(x, ("batch", None))
    segments = [whole(x) for x in segments]
  length = problem.q_shape[1]
  q_tokens, kv_tokens = masks.tokens(
    problem.pattern, length, length, q_positions, kv_positions, *segments
  )
  return (*q_tokens, *kv_tokens._replace(lengths=None))


def _ways(logical: str) -> int:
  """Devices that the active rules split a logical axis over."""
  names = shard.split_over(logical)
  return math.prod(shard.current()[0].shape[name] for name in names)
