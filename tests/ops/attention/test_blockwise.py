"""Blockwise attention: equal to the naive form, in the blocks the layout names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from effjax.core import errors
from effjax.ops import flops
from effjax.ops.attention import alibi, api, blockwise, masks, patterns, reference, xla

LENGTH = 75
BLOCKS = tuple(tuple((i * j) % 3 == 0 for j in range(6)) for i in range(6))
PATTERNS = {
  "full": patterns.Full(),
  "causal": patterns.Causal(),
  "window": patterns.Window(13),
  "both sides": patterns.Window(13, causal=False),
  "longformer": patterns.Longformer(12, 3),
  "causal longformer": patterns.Longformer(12, 3, causal=True),
  "bigbird": patterns.BigBird(8),
  "causal bigbird": patterns.BigBird(8, causal=True),
  "blocks": patterns.BlockMask(BLOCKS, 13),
}
# Rows that are packed, and rows of one document with and without padding.
PACKED = np.repeat([[1, 2, 4, 0], [1, 1, 1, 1]], [20, 30, 15, 10], axis=1)
ALONE = np.repeat([[1, 1, 1, 1], [3, 3, 3, 0]], [20, 30, 22, 3], axis=1)


def _inputs(rows, q_len, kv_len, heads, groups, head_dim, value_dim, seed=0):
  rng = np.random.default_rng(seed)
  q, k = (rows, q_len, heads, head_dim), (rows, kv_len, groups, head_dim)
  shapes = (q, k, (*k[:3], value_dim))
  return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def _close(a, b, tolerance):
  a, b = np.asarray(a), np.asarray(b)
  assert np.isfinite(a).all()
  assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def _value_and_grads(fn, arrays, probe):
  run = jax.value_and_grad(lambda a: _probe(fn(*a), probe), has_aux=True)
  return jax.jit(run)(arrays)


def _probe(y, probe):
  return (y * probe).sum(), y


@pytest.mark.parametrize("name", PATTERNS)
def test_equals_reference_with_gradients(name):
  """With everything at once, over packed rows, rows alone and no segments."""
  pattern = PATTERNS[name]
  arrays = _inputs(2, LENGTH, LENGTH, 4, 2, 8, 6)
  probe = jnp.asarray(
    np.random.default_rng(1).standard_normal((2, LENGTH, 4, 6)), jnp.float32
  )
  options = {"pattern": pattern, "slopes_H": alibi.slopes(4), "logit_cap": 3.0}
  segments = [jnp.asarray(s, jnp.int32) for s in (PACKED, ALONE)]

  def over(fn):
    return lambda q, k, v, s: fn(q, k, v, q_segments_BL=s, **options)

  blocked = functools.partial(blockwise.attention, block=16)
  ours = jax.jit(
    jax.value_and_grad(lambda a, s: _probe(over(blocked)(*a, s), probe), has_aux=True)
  )
  naive = jax.jit(
    jax.value_and_grad(
      lambda a, s: _probe(over(reference.attention)(*a, s), probe), has_aux=True
    )
  )
  for s in segments:
    (_, y), grads = ours(arrays, s)
    (_, expected), expected_grads = naive(arrays, s)
    _close(y, expected, 1e-5)
    assert (np.asarray(y)[np.asarray(s) == 0] == 0).all()
    for a, b in zip(grads, expected_grads, strict=True):
      _close(a, b, 1e-4)
  # Without segments there is another program, which must not differ.
  alone = jnp.ones((2, LENGTH), jnp.int32)
  y = jax.jit(functools.partial(blocked, **options))(*arrays)
  _close(y, ours(arrays, alone)[0][1], 1e-5)


def test_the_block_does_not_change_results():
  arrays = _inputs(1, 40, 40, 2, 1, 8, 8)
  grads = [
    jax.jit(jax.grad(lambda a, b=block: (blockwise.attention(*a, block=b) ** 2).sum()))(
      arrays
    )
    for block in (7, 40)
  ]
  for a, b in zip(*grads, strict=True):
    _close(a, b, 1e-5)


def test_explicit_positions_and_unequal_sides():
  rng = np.random.default_rng(2)
  arrays = _inputs(2, 21, 34, 4, 2, 8, 8)
  q_pos = jnp.asarray(rng.integers(0, 30, (2, 21)), jnp.int32)
  kv_pos = jnp.asarray(np.stack([rng.permutation(34) for _ in range(2)]), jnp.int32)
  q_seg = jnp.asarray(rng.integers(0, 3, (2, 21)), jnp.int32)
  kv_seg = jnp.asarray(rng.integers(0, 3, (2, 34)), jnp.int32)
  options = {
    "pattern": patterns.Window(9),
    "q_positions_BL": q_pos,
    "kv_positions_BS": kv_pos,
    "q_segments_BL": q_seg,
    "kv_segments_BS": kv_seg,
  }
  probe = jnp.asarray(rng.standard_normal((2, 21, 4, 8)), jnp.float32)
  blocked = functools.partial(blockwise.attention, block=8, **options)
  (_, y), grads = _value_and_grads(blocked, arrays, probe)
  naive = functools.partial(reference.attention, **options)
  (_, expected), expected_grads = _value_and_grads(naive, arrays, probe)
  _close(y, expected, 1e-5)
  for a, b in zip(grads, expected_grads, strict=True):
    _close(a, b, 1e-4)
  dead = np.asarray(~_visible(options).any(-1))
  assert dead.any() and (np.asarray(y)[dead] == 0).all()
  assert (np.asarray(grads[0])[dead] == 0).all()


def _visible(options):
  q, kv = masks.tokens(
    options["pattern"],
    21,
    34,
    options["q_positions_BL"],
    options["kv_positions_BS"],
    options["q_segments_BL"],
    options["kv_segments_BS"],
  )
  return masks.bias_BCS(options["pattern"], q, kv) == 0


def test_bfloat16_keeps_statistics_in_float32():
  arrays = [x.astype(jnp.bfloat16) for x in _inputs(1, 64, 64, 2, 1, 16, 16)]
  total = lambda a: blockwise.attention(*a, block=16).astype(jnp.float32).sum()
  y = jax.jit(functools.partial(blockwise.attention, block=16))(*arrays)
  assert y.dtype == jnp.bfloat16
  exact = jax.jit(reference.attention)(*[x.astype(jnp.float32) for x in arrays])
  _close(y.astype(jnp.float32), exact, 2e-2)
  assert all(g.dtype == jnp.bfloat16 for g in jax.jit(jax.grad(total))(arrays))


def test_large_scores_stay_finite():
  q, k, v = _inputs(1, 40, 40, 2, 1, 8, 8)
  total = lambda *a: blockwise.attention(*a, block=16).sum()
  y, grads = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q * 1e4, k * 1e4, v)
  assert np.isfinite(y) and all(np.isfinite(np.asarray(g)).all() for g in grads)


def _scan_lengths(jaxpr):
  """Trip counts of all scans, those of a conditional's branches kept apart."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "scan":
      found.append(eqn.params["length"])
    elif eqn.primitive.name == "cond":
      found.append(tuple(tuple(_scan_lengths(b.jaxpr)) for b in eqn.params["branches"]))
    else:
      for inner in jex.jaxprs_in_params(eqn.params):
        found += _scan_lengths(inner)
  return found


@pytest.mark.parametrize("name", PATTERNS)
def test_executed_pairs_are_those_of_the_layout(name):
  pattern, block = PATTERNS[name], 16
  arrays = _inputs(1, LENGTH, LENGTH, 2, 1, 8, 8)
  fn = functools.partial(blockwise.attention, pattern=pattern, block=block)
  count = -(-LENGTH // block)
  pairs = int(pattern.layout(count, count, block, LENGTH).sum())
  assert pairs <= count**2
  if name not in ("full", "bigbird", "longformer", "blocks"):
    assert pairs < count**2
  forward_backward = jax.grad(lambda a: fn(*a).sum())
  jaxpr = jax.make_jaxpr(forward_backward)(arrays).jaxpr
  assert _scan_lengths(jaxpr) == [pairs, pairs]
  assert blockwise.computed_pairs(LENGTH, LENGTH, pattern, block) == pairs * block**2
  # With segments: a conditional where the layout may not hold.
  segments = jnp.ones((1, LENGTH), jnp.int32)
  jaxpr = jax.make_jaxpr(functools.partial(fn, q_segments_BL=segments))(*arrays).jaxpr
  every = count * (count + 1) // 2 if pattern.causal else count**2
  branches = ((every,), (pairs,))
  assert _scan_lengths(jaxpr) == ([pairs] if pattern.relative else [branches])


@pytest.mark.parametrize("name", ["causal", "bigbird"])
def test_flops_are_those_of_rows_of_one_document(name):
  arrays = _inputs(1, LENGTH, LENGTH, 2, 1, 8, 6)
  fn = functools.partial(
    blockwise.attention,
    pattern=PATTERNS[name],
    block=16,
    q_segments_BL=jnp.ones((1, LENGTH), jnp.int32),
  )
  pairs = blockwise.computed_pairs(LENGTH, LENGTH, PATTERNS[name], 16)
  assert flops.dot_flops(fn, *arrays) == 2 * pairs * 2 * (8 + 6)
  backward = jax.grad(lambda *a: fn(*a).sum(), (0, 1, 2))
  assert flops.dot_flops(backward, *arrays) == 2 * pairs * 2 * (4 * 8 + 3 * 6)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear_in_the_length(backward):
  def temp_bytes(length):
    arrays = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (2, 1, 1)]
    fn = functools.partial(blockwise.attention, block=64)
    if backward:
      fn = jax.grad(lambda *a, fn=fn: fn(*a).sum(), (0, 1, 2))
    compiled = jax.jit(fn).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temp_bytes(1024), temp_bytes(2048)
  assert long <= 2.2 * short
  # Less than one matrix of scores.
  assert long < 2048**2 * 2 * 4 / 4


def test_layout_is_used_only_where_it_holds():
  """The branch is taken by what the rows are; results do not tell."""
  pattern = patterns.BigBird(8)
  holds = lambda segments, length=LENGTH: bool(
    blockwise._layout_holds(
      blockwise._Static(
        pattern=pattern,
        block=16,
        q_len=length,
        kv_len=length,
        logit_cap=None,
        in_order=True,
        conditional=True,
      ),
      *masks.tokens(pattern, length, length, q_segments_BL=jnp.asarray(segments)),
    )
  )
  ones = np.ones((2, LENGTH), np.int32)
  assert holds(ones) and holds(3 * ones)
  assert not holds(PACKED)
  padded = ones.copy()
  padded[1, -2:] = 0  # the document still ends in the last block
  assert holds(padded)
  padded[1, -20:] = 0
  assert not holds(padded)
  left = ones.copy()
  left[0, :3] = 0
  assert not holds(left)


def test_api_takes_it_by_name_and_for_long_sequences():
  arrays = _inputs(1, 6, 6, 2, 1, 4, 4)
  named = jax.jit(functools.partial(api.attention, implementation="blockwise"))
  _close(named(*arrays), jax.jit(xla.attention)(*arrays), 1e-5)
  long = jax.ShapeDtypeStruct((1, 8192, 1, 8), jnp.float32)
  jaxpr = jax.make_jaxpr(api.attention)(long, long, long).jaxpr
  assert _scan_lengths(jaxpr)


def test_refuses_with_one_line():
  q, k, v = _inputs(1, 4, 6, 3, 2, 4, 4)
  with pytest.raises(errors.InputError, match="3 query heads over 2 kv heads"):
    blockwise.attention(q, k, v)
  with pytest.raises(errors.InputError, match="block=0 must be at least 1"):
    blockwise.attention(q[:, :, :2], k, v, block=0)
  with pytest.raises(errors.InputError, match="as many queries as keys, got 4 and 6"):
    blockwise.attention(q[:, :, :2], k, v, pattern=patterns.BigBird(2))
