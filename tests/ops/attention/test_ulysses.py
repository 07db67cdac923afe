"""Attention with heads split in place of the length: equal to the naive form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.attention import alibi, api, context, patterns, splash, ulysses
from tests.ops.attention import on_mesh

CASES = {
  "causal": patterns.CAUSAL,
  "full": patterns.FULL,
  "window": patterns.Window(6),
  "both sides": patterns.Window(12, causal=False),
  "bigbird": patterns.BigBird(4),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference_with_gradients(name):
  """Grouped queries, values of another size, capped scores, packed rows, padding."""
  options = {"pattern": CASES[name], "logit_cap": 3.0}
  on_mesh.check("ulysses", {"context": 2}, **options)


@pytest.mark.parametrize(
  ("ways", "heads", "groups"),
  [
    (8, 8, 8),
    (8, 8, 1),  # one key head for all
    (4, 8, 2),  # a key head for two devices
    (4, 12, 6),  # a device takes three halves of key heads
    (8, 24, 3),
    (2, 6, 3),
  ],
)
def test_any_number_of_key_heads(ways, heads, groups):
  sizes = {"heads": heads, "groups": groups}
  options = {"slopes_H": alibi.slopes(heads), "scale": 0.3}
  on_mesh.check("ulysses", {"context": ways}, sizes, **options)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_with_rows_and_heads_split_too(groups):
  shape = {"data": 2, "context": 2, "tensor": 2}
  sizes = {"heads": 8, "groups": groups}
  options = {"slopes_H": alibi.slopes(8), "logit_cap": 3.0}
  on_mesh.check("ulysses+tp+dp", shape, sizes, **options)


def test_heads_that_tensor_does_not_divide_are_exchanged_whole():
  shape = {"context": 2, "tensor": 4}
  on_mesh.check("ulysses+tp", shape, {"heads": 6, "groups": 3})


def test_without_segments_and_with_explicit_positions():
  on_mesh.check("ulysses", {"context": 4}, packed=False)
  positions = jnp.broadcast_to(jnp.arange(on_mesh.LENGTH)[::-1], (2, on_mesh.LENGTH))
  options = {"pattern": patterns.Window(9), "q_positions_BL": positions}
  arrays = on_mesh.inputs()
  run = lambda: on_mesh.outputs_and_gradients(api.attention, arrays, **options)
  expected = run()
  with on_mesh.active("ulysses", context=4):
    on_mesh.close(run(), expected)


@pytest.mark.parametrize(
  ("groups", "ways"), [(1, 8), (2, 4), (6, 4), (3, 8), (8, 2), (5, 5)]
)
def test_a_device_gets_the_key_heads_that_it_needs_and_no_other(groups, ways):
  heads_BSGK = jnp.arange(groups)[None, None, :, None]
  repeated = np.asarray(ulysses.divisible(heads_BSGK, ways)).reshape(ways, -1)
  needed = (np.arange(groups * ways) // ways).reshape(ways, -1)  # by query head
  served = np.repeat(repeated, needed.shape[1] // repeated.shape[1], axis=1)
  np.testing.assert_array_equal(served, needed)


def test_bfloat16_is_finite_and_close():
  arrays = [x.astype(jnp.bfloat16) for x in on_mesh.inputs()]
  total = lambda a: api.attention(*a).astype(jnp.float32).sum()
  run = lambda: jax.jit(jax.value_and_grad(total))(arrays)
  _, expected = run()
  with on_mesh.active("ulysses", context=4):
    _, got = run()
  assert all(g.dtype == jnp.bfloat16 for g in got)
  wide = lambda grads: [np.asarray(g, np.float32) for g in grads]
  on_mesh.close(wide(got), wide(expected), 2e-2)


def test_a_kernel_runs_on_whole_sequences_of_the_heads_of_a_device(monkeypatch):
  """Splash attention, interpreted, is asked for as on a TPU."""
  shapes = []

  def kernel(q, k, v, **options):
    shapes.append((q.shape, k.shape))
    return splash.attention(q, k, v, interpret=True, **options)

  monkeypatch.setitem(api.IMPLEMENTATIONS, "splash", kernel)
  facts = api.device_facts
  monkeypatch.setattr(api, "device_facts", lambda: facts() | {"platform": "tpu"})
  sizes = {"value_dim": 8, "length": 128, "groups": 1}
  arrays = on_mesh.inputs(**sizes)
  expected = jax.jit(functools.partial(api.attention, implementation="xla"))(*arrays)
  with on_mesh.active("ulysses+dp", context=2, data=2):
    got = jax.jit(api.attention)(*arrays)
  on_mesh.close([got], [expected])
  assert shapes == [((1, 128, 2, 8), (1, 128, 1, 8))]


def test_says_what_each_device_runs():
  problem = api.Problem(
    platform="tpu",
    q_shape=(1, 4096, 8, 64),
    k_shape=(1, 4096, 2, 64),
    v_shape=(1, 4096, 2, 64),
    dtype=jnp.bfloat16,
    length_ways=4,
    whole_heads=True,
  )
  found = api.explain("auto", problem)
  assert found.name == "ulysses" and "each runs splash because" in found.reason
  inner = context.of_one_device(problem)
  assert inner.q_shape[2] == 2 and inner.k_shape == inner.v_shape == (1, 4096, 1, 64)
  with pytest.raises(errors.InputError, match="'cudnn': it needs a CUDA device"):
    api.explain("cudnn", problem)
  split = dataclasses.replace(problem, head_ways=4)
  with pytest.raises(errors.InputError, match="num_heads=8 .* 4 x 4 devices.*use 16"):
    api.explain("auto", split)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"heads": 6, "groups": 3}, "num_heads=6 do not divide .* 4 devices.*4 or 8 heads"),
    ({"heads": 2, "groups": 1}, "num_heads=2 do not divide .* 4 devices.*use 4 heads"),
    ({"length": 18}, "18 tokens do not divide over 4 devices; use 16 or 20 tokens"),
  ],
)
def test_refuses_with_one_line(sizes, message):
  arrays = on_mesh.inputs(**sizes)
  with on_mesh.active("ulysses", context=4):
    with pytest.raises(errors.InputError, match=message) as caught:
      api.attention(*arrays)
    assert "\n" not in str(caught.value)
