"""Softmax attention over sequences that are split between devices in a ring.

Liu et al. 2023, arXiv:2310.01889, section 3 (blocks of keys and values travel around a
ring of devices while each attends to those it has); the order of the tokens is in
`ring_order`, the sums are those of `blocks`. Memory is linear in the tokens of a
device. The backward pass (their appendix A) computes weights again from the logarithms
of their sums; keys travel once more, and float32 gradients of the keys behind them,
until they are home. So k - 1 transfers of keys and values bring a forward pass over k
steps, and as many, and k of their gradients, a backward pass. All of them go along
with products that do not wait for them.

Deviations: tokens are brought into balanced order, and back, around the attention
itself, so that all other layers see contiguous slices; two blocks of queries and of
keys meet by their numbers on each device (`ring_order.products`), without a condition.

Patterns: `Full`, `Causal` and `Window` compute what is seen, by blocks. The others are
exact, but compute all pairs (causal ones: half of them).

Local letters: R query heads a group, C queries of one block, J keys of one block, W
size of a value head, I and N numbers of blocks of a device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core.config import require
from effjax.ops.attention import blocks, blockwise, masks, patterns, ring_order, xla

# `visit(step, offset, carry, held)`: the carry after a step with the keys it has.
_Visit = Callable[[ring_order.Step, Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class _Static:
  """What is known when tracing."""

  order: ring_order.Order
  axis_name: ring_order.AxisName
  logit_cap: float | None

  def scoring(self, step: ring_order.Step) -> blocks.Scoring:
    return blocks.Scoring(step.pattern, self.order.block, self.logit_cap)

  def pairs(self, step: ring_order.Step, offset: Any) -> Any:
    device = lax.axis_index(self.axis_name)
    return ring_order.block_pairs(self.order, step, offset, device)


def attention(
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGW: jax.Array,
  q_tokens: masks.Tokens,
  kv_tokens: masks.Tokens,
  slopes_H: jax.Array | None = None,
  *,
  axis_name: ring_order.AxisName,
  pattern: patterns.Pattern = patterns.CAUSAL,
  by_index: bool = True,
  logit_cap: float | None = None,
  scale: float | None = None,
  block: int | None = None,
  platform: str = "cpu",
) -> jax.Array:
  """What one device computes of `api.attention`, inside `jax.shard_map`.

  Args:
    q_BLHK, k_BLGK, v_BLGW: its slice of the sequence.
    q_tokens, kv_tokens: the same slice of both sides of `masks.tokens` of the whole
      sequence.
    slopes_H: slopes of its heads (ALiBi), or None.
    axis_name: mesh axis that the sequence is split over.
    pattern: who sees whom.
    by_index: whether the positions of a document are in the order of the indices.
    logit_cap, scale: see `api.attention`.
    block: tokens of a block, by default those of `blockwise.block_size`; does not
      change results.
    platform: what it runs on, as `choice.PLATFORMS` has it; for the block.

  Returns:
    y_BLHW of the slice in the dtype of q.

  Raises:
    InputError: H not a multiple of G; as many keys as queries there are not; a causal
      pattern and an odd slice.
  """
  xla.check_heads(q_BLHK, k_BLGK)
  slice_len, num_groups = k_BLGK.shape[1:3]
  require(
    q_BLHK.shape[1] == slice_len,
    f"a ring is for as many queries as keys, a device has {q_BLHK.shape[1]} and "
    f"{slice_len}",
  )
  order = order_of(
    pattern,
    lax.axis_size(axis_name),
    slice_len,
    by_index=by_index,
    block=block,
    platform=platform,
  )
  whole = (q_BLHK, k_BLGK, v_BLGW, q_tokens, kv_tokens)
  parts = ring_order.to_zigzag(whole, axis_name) if order.zigzag else (whole,)
  qs, ks, vs, *_ = zip(*parts, strict=True)
  sides = [blocks.padded(*part[3:], order.block) for part in parts]
  y_NBGRCW = _attend(
    _Static(order, axis_name, logit_cap),
    blocks.queries(qs, num_groups, order.block, scale),
    blocks.keys(ks, order.block),
    blocks.keys(vs, order.block),
    *(_joined(tokens) for tokens in zip(*sides, strict=True)),
    blocks.slopes(slopes_H, num_groups),
  )
  ys = jnp.split(blocks.heads(y_NBGRCW), len(parts), axis=1)
  ys = [y_BLHW[:, : order.part_len] for y_BLHW in ys]
  return ring_order.from_zigzag(*ys, axis_name) if order.zigzag else ys[0]


def order_of(
  pattern: patterns.Pattern,
  num_devices: int,
  slice_len: int,
  *,
  by_index: bool = True,
  block: int | None = None,
  platform: str = "cpu",
) -> ring_order.Order:
  """The order that `attention` takes.

  Raises:
    InputError: a causal pattern and an odd slice.
  """
  size = lambda part: block or blockwise.block_size(pattern, part, part, platform)
  return ring_order.choose(pattern, num_devices, slice_len, size, by_index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  static: _Static,
  q_NBGRCK: jax.Array,
  k_IBGJK: jax.Array,
  v_IBGJW: jax.Array,
  q_tokens: masks.Tokens,
  kv_tokens: masks.Tokens,
  slopes_GR: jax.Array | None,
) -> jax.Array:
  """Blocks of scaled queries over those of all devices; y_NBGRCW in the dtype of q."""
  return _forward(static, q_NBGRCK, k_IBGJK, v_IBGJW, q_tokens, kv_tokens, slopes_GR)[0]


def _forward(static: _Static, *args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
  q_NBGRCK, k_IBGJK, v_IBGJW, q_tokens, kv_tokens, slopes_GR = args

  def visit(step: Any, offset: Any, sums: blocks.Sums, held: Any) -> blocks.Sums:
    k_IBGJK, v_IBGJW, kv_tokens = held
    operands = (q_NBGRCK, k_IBGJK, v_IBGJW, q_tokens, kv_tokens, slopes_GR)
    return blocks.add(
      static.scoring(step), static.pairs(step, offset), sums, blocks.Operands(*operands)
    )

  start = blocks.no_sums(q_NBGRCK, v_IBGJW)
  sums = _around(static, visit, start, (k_IBGJK, v_IBGJW, kv_tokens))
  y_NBGRCW, log_sum_NBGRC = blocks.finished(sums, q_NBGRCK.dtype)
  return y_NBGRCW, (args, y_NBGRCW, log_sum_NBGRC)


def _backward(
  static: _Static, residuals: tuple[Any, ...], dy_NBGRCW: jax.Array
) -> tuple[Any, ...]:
  args, y_NBGRCW, log_sum_NBGRC = residuals
  q_NBGRCK, k_IBGJK, v_IBGJW, q_tokens, kv_tokens, slopes_GR = args
  delta_NBGRC = blocks.delta_NBGRC(y_NBGRCW, dy_NBGRCW)
  kept = blocks.Kept(log_sum_NBGRC, dy_NBGRCW, delta_NBGRC)
  zeros = lambda *arrays: tuple(jnp.zeros(x.shape, jnp.float32) for x in arrays)

  def visit(step: Any, offset: Any, carry: Any, held: Any) -> Any:
    dq_NBGRCK, behind = carry
    # Those of the keys at hand, from the devices that had them before. They arrive
    # while this device computes its own.
    behind = _send(behind, step.arrives, static)
    k_IBGJK, v_IBGJW, kv_tokens = held
    operands = (q_NBGRCK, k_IBGJK, v_IBGJW, q_tokens, kv_tokens, slopes_GR)
    dq_NBGRCK, *own = blocks.add_gradients(
      static.scoring(step),
      static.pairs(step, offset),
      (dq_NBGRCK, *zeros(k_IBGJK, v_IBGJW)),
      blocks.Operands(*operands),
      kept,
    )
    return dq_NBGRCK, tuple(a + b for a, b in zip(behind, own, strict=True))

  start = (zeros(q_NBGRCK)[0], zeros(k_IBGJK, v_IBGJW))
  carry = _around(static, visit, start, (k_IBGJK, v_IBGJW, kv_tokens))
  dq_NBGRCK, behind = carry
  home = -static.order.steps[-1].offset % static.order.num_devices
  grads = (dq_NBGRCK, *_send(behind, home, static))
  grads = [d.astype(x.dtype) for d, x in zip(grads, args[:3], strict=True)]
  dslopes = None if slopes_GR is None else jnp.zeros_like(slopes_GR)
  return (*grads, None, None, dslopes)


_attend.defvjp(_forward, _backward)


def _around(static: _Static, visit: _Visit, carry: Any, held: Any) -> Any:
  """The carry after all steps; `held` is what travels."""
  for steps in static.order.groups:

    def one(state: Any, offset: Any, step: Any = steps[0]) -> tuple[Any, None]:
      carry, held = state
      # What the next step needs is on its way while this one computes.
      ahead = _send(held, step.leaves, static)
      return (visit(step, offset, carry, held), ahead), None

    if len(steps) == 1:
      (carry, held), _ = one((carry, held), steps[0].offset)
    else:
      offsets = np.array([step.offset for step in steps], np.int32)
      (carry, held), _ = lax.scan(one, (carry, held), offsets)
  return carry


def _send(tree: Any, hop: int, static: _Static) -> Any:
  """What the device `hop` before this one has sent."""
  count = static.order.num_devices
  if hop % count == 0:
    return tree
  route = [(i, (i + hop) % count) for i in range(count)]
  return jax.tree.map(lambda x: lax.ppermute(x, static.axis_name, route), tree)


def _joined(parts: tuple[masks.Tokens, ...]) -> masks.Tokens:
  """The tokens of parts behind each other."""
  join = lambda *xs: None if xs[0] is None else jnp.concatenate(xs, axis=1)
  return masks.Tokens(*(join(*xs) for xs in zip(*parts, strict=True)))
