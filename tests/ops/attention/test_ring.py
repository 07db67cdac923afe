"""Attention in a ring: equal to the naive form, in balanced steps, in linear memory."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex
from jax.sharding import Mesh, PartitionSpec

from effjax.core import errors, shard
from effjax.ops.attention import (
  alibi,
  api,
  masks,
  patterns,
  reference,
  ring,
  ring_order,
)
from tests.ops.attention import on_mesh

CASES = {
  "causal": patterns.CAUSAL,
  "full": patterns.FULL,
  "window": patterns.Window(6),
  "wide window": patterns.Window(30),
  "both sides": patterns.Window(12, causal=False),
  "bigbird": patterns.BigBird(4, causal=True),
  "longformer": patterns.Longformer(6, 2),
}


def _order(pattern, count, slice_len, block, **fields):
  return ring_order.Order(pattern, count, slice_len, block, **fields)


def _met(order):
  """How often each pair of blocks of the whole sequence is multiplied, by step.

  Blocks are numbered as (part of the sequence, block of the part).
  """
  count, blocks = order.num_devices, order.num_blocks
  part = lambda device, half: (
    ring_order.chunk_of(device, half, count) if order.zigzag else device
  )
  found = []
  for step in order.steps:
    by_device = []
    for device in range(count):
      source = (device - step.offset) % count
      pairs = np.asarray(ring_order.block_pairs(order, step, step.offset, device))
      by_device.append(
        [
          (
            (part(device, i // blocks), i % blocks),
            (part(source, j // blocks), j % blocks),
          )
          for i, j in pairs.tolist()
        ]
      )
    found.append(by_device)
  return found


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_every_pair_of_chunks_meets_once_and_every_step_is_the_same_work(count):
  order = _order(patterns.CAUSAL, count, 2, 1, zigzag=True)
  steps = _met(order)
  met = collections.Counter(itertools.chain(*itertools.chain(*steps)))
  chunks = range(2 * count)
  assert met == {((a, 0), (b, 0)): 1 for a in chunks for b in chunks if b <= a}
  # Step 0: two diagonal chunks, which are half hidden, and a whole one; then two.
  own, *others = [[len(pairs) for pairs in by_device] for by_device in steps]
  assert own == [3] * count and others == [[2] * count] * (count - 1)
  for by_device in steps[1:]:
    assert all(q > k for pairs in by_device for q, k in pairs)


@pytest.mark.parametrize("name", ["full", "window", "both sides", "wide window"])
@pytest.mark.parametrize("count", [2, 5])
def test_contiguous_order_skips_what_nobody_sees_and_nothing_else(name, count):
  pattern, slice_len, block = CASES[name], 10, 4
  order = _order(pattern, count, slice_len, block, zigzag=False)
  met = collections.Counter(itertools.chain(*itertools.chain(*_met(order))))
  assert set(met.values()) == {1}
  index = np.arange(count * slice_len)
  seen = np.asarray(pattern.seen(index[:, None], index[None]))
  blocks = [(d, b) for d in range(count) for b in range(3)]
  tokens = lambda d, b: slice(d * 10 + 4 * b, d * 10 + min(4 * b + 4, 10))
  needed = {
    (q, k) for q in blocks for k in blocks if seen[tokens(*q), tokens(*k)].any()
  }
  assert needed <= set(met)
  if name == "window":
    # Only keys of the device before; what is too much wraps around, on device 0.
    assert [step.offset for step in order.steps] == [0, 1]
    assert all(q[0] == 0 for q, _ in set(met) - needed)
  if name == "both sides" and count == 5:
    assert [step.offset for step in order.steps] == [0, 1, 4]
    assert [step.arrives for step in order.steps] == [0, 1, 3]


def test_the_order_is_the_one_with_fewer_pairs():
  choose = lambda pattern, by_index=True: ring_order.choose(
    pattern, 8, 64, lambda part: 16, by_index
  )
  assert choose(patterns.CAUSAL).zigzag and choose(patterns.Window(500)).zigzag
  assert not choose(patterns.Window(64)).zigzag and not choose(patterns.FULL).zigzag
  assert not choose(patterns.CAUSAL, by_index=False).zigzag
  # Balanced, a device multiplies half of its share of all pairs, and half diagonals.
  pairs = choose(patterns.CAUSAL).num_pairs
  assert pairs == (2 * 8 - 1) * 32**2 + 2 * 32 * (32 + 16) // 2


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_the_balanced_order_is_a_permutation_that_round_trips(count):
  mesh = Mesh(np.array(jax.devices()[:count]), ("context",))
  spec = PartitionSpec(None, "context")

  def there_and_back(x_BL):
    first, second = ring_order.to_zigzag(x_BL, "context")
    back = ring_order.from_zigzag(first, second, "context")
    return jnp.concatenate([first, second], axis=1), back

  run = jax.shard_map(
    there_and_back, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  x_BL = jnp.arange(6 * count)[None]
  moved, back = jax.jit(run)(x_BL)
  chunks = np.arange(6 * count).reshape(2 * count, 3)
  expected = [chunks[[i, 2 * count - 1 - i]] for i in range(count)]
  np.testing.assert_array_equal(np.asarray(moved)[0], np.concatenate(expected).ravel())
  np.testing.assert_array_equal(back, x_BL)


@pytest.mark.parametrize(
  ("name", "count"),
  [
    *itertools.product(("causal", "full", "window", "both sides"), (2, 4, 8)),
    ("wide window", 4),
    ("bigbird", 4),
    ("longformer", 4),
  ],
)
def test_equals_reference_with_gradients(name, count):
  """Grouped queries, values of another size, capped scores, packed rows, padding."""
  on_mesh.check("ring", {"context": count}, pattern=CASES[name], logit_cap=3.0)


@pytest.mark.parametrize("name", ["causal", "window", "full"])
def test_equals_reference_with_slopes_and_a_scale(name):
  options = {"slopes_H": alibi.slopes(4), "scale": 0.3, "pattern": CASES[name]}
  on_mesh.check("ring", {"context": 4}, **options)


@pytest.mark.parametrize("name", ["causal", "both sides"])
def test_equals_reference_without_segments_and_with_one_key_head(name):
  sizes = {"groups": 1, "value_dim": 8}
  on_mesh.check("ring", {"context": 8}, sizes, packed=False, pattern=CASES[name])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_with_rows_and_heads_split_too(groups):
  """Key heads that two devices do not divide go to both."""
  shape = {"data": 2, "context": 2, "tensor": 2}
  options = {"slopes_H": alibi.slopes(4), "logit_cap": 3.0}
  on_mesh.check("ring+tp+dp", shape, {"groups": groups}, **options)


def test_heads_that_do_not_divide_are_whole_on_each_device():
  shape = {"context": 2, "tensor": 4}
  on_mesh.check("ring+tp", shape, {"heads": 6, "groups": 3})


@pytest.mark.parametrize("name", ["causal", "window"])
def test_explicit_positions_make_no_assumption_about_the_order(name):
  rng = np.random.default_rng(3)
  positions = jnp.asarray([rng.permutation(on_mesh.LENGTH) for _ in range(2)])
  options = {"q_positions_BL": positions, "kv_positions_BS": positions}
  options["pattern"] = CASES[name]
  arrays = on_mesh.inputs()
  expected = on_mesh.outputs_and_gradients(reference.attention, arrays, **options)
  with on_mesh.active("ring", context=4):
    got = on_mesh.outputs_and_gradients(api.attention, arrays, **options)
  on_mesh.close(got, expected)


@pytest.mark.parametrize("preset", ["ring", "ulysses"])
def test_inside_a_vmap_over_stages(preset):
  arrays = on_mesh.inputs()
  stages = [jnp.stack([x, x[::-1] * 0.5]) for x in arrays]
  ids = jnp.asarray(np.stack([on_mesh.PACKED, on_mesh.PACKED[::-1]]), jnp.int32)
  each = [
    on_mesh.outputs_and_gradients(reference.attention, [x[s] for x in stages], ids[s])
    for s in range(2)
  ]
  expected = [np.stack(pair) for pair in zip(*each, strict=True)]

  def fn(q, k, v, *, q_segments_BL, kv_segments_BS):
    del kv_segments_BS
    one = lambda q, k, v, ids: api.attention(q, k, v, q_segments_BL=ids)
    return jax.vmap(one, spmd_axis_name="stage")(q, k, v, q_segments_BL)

  def loss(arrays, ids, probe):
    y = fn(*arrays, q_segments_BL=ids, kv_segments_BS=ids)
    return (y * probe).sum(), y

  shape = (2, on_mesh.LENGTH, 4, 6)
  probe = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
  with on_mesh.active(f"{preset}+pp", context=4, stage=2):
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, y), gradients = run(stages, ids, probe[None])
  on_mesh.close([np.asarray(x) for x in (y, *gradients)], expected)


def _on_ring(count, block, **options):
  """`fn(q, k, v)`: the ring on `count` devices, with blocks of a size."""
  mesh = Mesh(np.array(jax.devices()[:count]), ("context",))
  spec = PartitionSpec(None, "context")

  def device(q, k, v, index):
    tokens = masks.Tokens(index)
    return ring.attention(
      q, k, v, tokens, tokens, axis_name="context", block=block, **options
    )

  mapped = jax.shard_map(
    device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  return lambda q, k, v: mapped(q, k, v, jnp.arange(q.shape[1])[None])


@pytest.mark.parametrize("name", ["causal", "window"])
def test_the_block_does_not_change_results(name):
  """Blocks of 3 leave padding in chunks of 8 and in slices of 16."""
  arrays, pattern = on_mesh.inputs(), CASES[name]
  ours = _on_ring(2, 3, pattern=pattern)

  def fn(q, k, v, **_):
    return ours(q, k, v)

  got = on_mesh.outputs_and_gradients(fn, arrays)
  expected = on_mesh.outputs_and_gradients(reference.attention, arrays, pattern=pattern)
  on_mesh.close(got, expected)


def test_bfloat16_keeps_sums_in_float32():
  arrays = [x.astype(jnp.bfloat16) for x in on_mesh.inputs()]
  total = lambda a: api.attention(*a).astype(jnp.float32).sum()
  with on_mesh.active("ring", context=8):
    y = jax.jit(api.attention)(*arrays)
    gradients = jax.jit(jax.grad(total))(arrays)
  exact = [x.astype(jnp.float32) for x in arrays]
  naive = lambda a: reference.attention(*a)
  assert y.dtype == jnp.bfloat16
  assert all(g.dtype == jnp.bfloat16 for g in gradients)
  expected = jax.jit(jax.grad(lambda a: naive(a).sum()))(exact)
  got = [np.asarray(x, np.float32) for x in (y, *gradients)]
  on_mesh.close(got, [jax.jit(naive)(exact), *expected], 2e-2)


def _temp_bytes(length, count):
  """Of a forward and backward pass, on each device."""
  fn = _on_ring(count, 32)
  run = jax.grad(lambda *a: (fn(*a) ** 2).sum(), (0, 1, 2))
  arrays = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (2, 1, 1)]
  compiled = jax.jit(run).lower(*arrays).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_tokens_of_a_device():
  once, twice, halved = (_temp_bytes(*x) for x in ((2048, 4), (4096, 4), (4096, 8)))
  assert 1.75 <= twice / once <= 2.25
  assert 0.4 <= halved / twice <= 0.6


def _counts(jaxpr, times=1):
  """How often each primitive runs, inside of loops too."""
  found = collections.Counter()
  for eqn in jaxpr.eqns:
    found[eqn.primitive.name] += times
    inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
    for sub in jex.jaxprs_in_params(eqn.params):
      found += _counts(sub, inner)
  return found


@pytest.mark.parametrize("count", [2, 8])
def test_transfers_and_products(count):
  fn = _on_ring(count, 2)
  arrays = on_mesh.inputs(length=4 * count)
  total = lambda *a: fn(*a).sum()
  forward = _counts(jax.make_jaxpr(fn)(*arrays).jaxpr)
  both = _counts(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*arrays).jaxpr)
  assert "cond" not in both
  # To the balanced order and back: halves of q, k, v and of both positions, then y.
  moved, back = 2 * 5 + 2, 2 * 3 + 2
  keys = 3 * (count - 1)  # With their positions.
  assert forward["ppermute"] == moved + keys
  assert both["ppermute"] == moved + back + 2 * keys + 2 * count
  # Two products a pair of blocks, five backwards; blocks are chunks here.
  pairs = 2 * count + 1
  assert forward["dot_general"] == 2 * pairs
  assert both["dot_general"] == 7 * pairs


def test_says_what_it_runs_and_why():
  problem = functools.partial(
    api.Problem, platform="cpu", dtype=jnp.float32, length_ways=4
  )
  shapes = dict.fromkeys(("q_shape", "k_shape", "v_shape"), (1, 4096, 2, 8))
  found = api.explain("auto", problem(**shapes))
  assert found.name == "ring" and "over 4 devices, in an order" in found.reason
  found = api.explain("auto", problem(**shapes, pattern=patterns.Window(64)))
  assert found.name == "ring" and "contiguous" in found.reason
  found = api.explain("blockwise", problem(**shapes, pattern=patterns.BigBird()))
  assert found.name == "ring" and "what BigBird hides, and mult" in found.reason
  with on_mesh.active("ring+tp", context=4, tensor=2):
    facts = api.device_facts()
  assert facts["length_ways"] == 4 and facts["head_ways"] == 2
  assert not facts["whole_heads"]


@pytest.mark.parametrize(
  ("length", "options", "message"),
  [
    (20, {}, "20 tokens do not divide into 8 chunks.*use 16 or 24 tokens"),
    (4, {}, "4 tokens do not divide into 8 chunks.*use 8 tokens"),
    (18, {}, "18 tokens do not divide over 4 devices; use 16 or 20 tokens"),
    (16, {"implementation": "xla"}, "'xla' is for whole sequences.*'ulysses'"),
    (16, {"implementation": "xls"}, "did you mean 'xla'"),
  ],
)
def test_refuses_with_one_line(length, options, message):
  arrays = on_mesh.inputs(length=length)
  with on_mesh.active("ring", context=4):
    with pytest.raises(errors.InputError, match=message) as caught:
      api.attention(*arrays, **options)
    assert "\n" not in str(caught.value)


def test_refuses_queries_over_other_keys():
  q, k, v = on_mesh.inputs()
  with on_mesh.active("ring", context=2):
    with pytest.raises(errors.InputError, match="4 queries over 32 keys cannot be"):
      api.attention(q[:, :4], k, v)
    assert shard.split_over("length") == ("context",)
