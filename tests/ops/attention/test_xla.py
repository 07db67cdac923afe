"""The fast form against the naive one and PyTorch: outputs, gradients, isolation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.attention import alibi, api, patterns, reference, xla


def _inputs(rows, q_len, kv_len, heads, groups, head_dim, seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(rows, q_len, heads, head_dim)] + [(rows, kv_len, groups, head_dim)] * 2
  return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def _close(a, b, tolerance):
  a, b = np.asarray(a), np.asarray(b)
  assert np.isfinite(a).all()
  assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def _packed(rows, length):
  """Segments of uneven documents with padding at the end; positions restart."""
  cuts = [0, length // 3, length // 3 + 1, length - 4, length]
  segments = np.zeros((rows, length), np.int32)
  positions = np.zeros((rows, length), np.int32)
  for number, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
    segments[:, a:b] = number + 1 if b < length else 0
    positions[:, a:b] = np.arange(b - a)
  segments[0] = 1  # and one row that is a single document
  positions[0] = np.arange(length)
  return jnp.asarray(segments), jnp.asarray(positions)


def _cases():
  """Name -> inputs, options. 75 and 140 make several blocks, the last one ragged."""
  segments, positions = _packed(2, 75)
  rng = np.random.default_rng(1)
  shuffled = jnp.asarray(np.stack([rng.permutation(20) for _ in range(2)]), jnp.int32)
  q_seg = jnp.asarray([[1, 1, 2, 0, 3], [2, 2, 1, 1, 0]], jnp.int32)
  kv_seg = jnp.asarray([[1, 2, 2, 2, 1, 0, 0], [1, 1, 1, 2, 2, 2, 0]], jnp.int32)
  return {
    "heads": (_inputs(2, 140, 140, 2, 2, 8), {}),
    "grouped": (_inputs(2, 75, 75, 4, 2, 8), {"scale": 0.2}),
    "multi query": (_inputs(1, 33, 33, 3, 1, 4), {}),
    "one": (_inputs(1, 1, 1, 2, 1, 4), {}),
    "packed": (_inputs(2, 75, 75, 4, 2, 8), {"q_segments_BL": segments}),
    "packed, positions": (
      _inputs(2, 75, 75, 4, 2, 8),
      {"q_segments_BL": segments, "q_positions_BL": positions},
    ),
    "window": (_inputs(2, 140, 140, 2, 1, 8), {"pattern": patterns.Window(37)}),
    "both sides": (
      _inputs(2, 140, 140, 2, 1, 8),
      {"pattern": patterns.Window(37, causal=False), "logit_cap": 2.0},
    ),
    "linear biases": (
      _inputs(2, 75, 75, 6, 2, 8),
      {"slopes_H": alibi.slopes(6), "q_segments_BL": segments},
    ),
    "bigbird": (
      _inputs(2, 75, 75, 4, 2, 8),
      {"pattern": patterns.BigBird(8), "q_segments_BL": segments},
    ),
    "causal longformer": (
      _inputs(2, 75, 75, 4, 2, 8),
      {"pattern": patterns.Longformer(9, 2, causal=True), "q_segments_BL": segments},
    ),
    "bidirectional": (_inputs(2, 7, 11, 4, 2, 8), {"pattern": patterns.FULL}),
    "shuffled": (
      _inputs(2, 20, 20, 4, 2, 8),
      {"q_positions_BL": shuffled, "kv_positions_BS": shuffled},
    ),
    "ragged": (
      _inputs(2, 5, 7, 4, 2, 8),
      {
        "q_segments_BL": q_seg,
        "kv_segments_BS": kv_seg,
        "pattern": patterns.FULL,
      },
    ),
  }


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_equals_reference_with_gradients(name):
  arrays, options = CASES[name]
  weight = jnp.asarray(
    np.random.default_rng(2).standard_normal(arrays[0].shape), jnp.float32
  )
  explicit = dict(options)
  if "q_positions_BL" in options:
    explicit["kv_positions_BS"] = options["q_positions_BL"]

  def objective(fn, options, arrays):
    y = fn(*arrays, **options)
    return (y * weight).sum(), y

  def run(fn, options):
    objective_fn = functools.partial(objective, fn, options)
    return jax.jit(jax.value_and_grad(objective_fn, has_aux=True))(arrays)

  (_, y), grads = run(xla.attention, options)
  (_, y_ref), grads_ref = run(reference.attention, explicit)
  _close(y, y_ref, 1e-5)
  for grad, grad_ref in zip(grads, grads_ref, strict=True):
    _close(grad, grad_ref, 1e-4)


def test_packed_positions_are_the_order_of_indices():
  arrays, options = CASES["packed, positions"]
  attend = jax.jit(xla.attention)
  ours = attend(*arrays, **options)
  _close(attend(*arrays, q_segments_BL=options["q_segments_BL"]), ours, 1e-5)


@pytest.mark.parametrize("positions", [False, True])
def test_padding_is_zero_and_passes_no_gradient(positions):
  arrays, options = CASES["packed, positions"]
  segments = options["q_segments_BL"]
  options = options if positions else {"q_segments_BL": segments}
  loss = lambda arrays: (xla.attention(*arrays, **options) ** 2).sum()
  padding = np.asarray(segments == 0)
  assert padding.any()
  y = np.asarray(jax.jit(xla.attention)(*arrays, **options))
  assert (y[padding] == 0).all() and (y[~padding] != 0).any()
  for grad in jax.jit(jax.grad(loss))(arrays):
    assert (np.asarray(grad)[padding] == 0).all()
    assert np.isfinite(np.asarray(grad)).all()


def test_causal_and_isolated_by_gradient():
  arrays, options = CASES["packed"]
  segments = options["q_segments_BL"]
  row, at = 1, 40
  segment = np.asarray(segments[row])
  fn = lambda *arrays: xla.attention(*arrays, q_segments_BL=segments)[row, at].sum()
  grads = jax.jit(jax.grad(fn, argnums=(1, 2)))(*arrays)
  seen = (np.arange(75) <= at) & (segment == segment[at])
  assert 1 < seen.sum() < at
  for grad in grads:
    touched = np.abs(np.asarray(grad)).sum((2, 3)) > 0
    np.testing.assert_array_equal(touched[row], seen)
    assert not touched[1 - row].any()


def test_bfloat16_keeps_statistics_in_float32():
  arrays = [x.astype(jnp.bfloat16) for x in _inputs(1, 64, 64, 2, 1, 16)]
  y = jax.jit(xla.attention)(*arrays)
  assert y.dtype == jnp.bfloat16
  exact = jax.jit(reference.attention)(*[x.astype(jnp.float32) for x in arrays])
  _close(y.astype(jnp.float32), exact, 2e-2)


def test_large_scores_stay_finite():
  q, k, v = _inputs(1, 40, 40, 2, 1, 8)
  total = lambda *a: xla.attention(*a).sum()
  y, grads = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q * 1e4, k * 1e4, v)
  assert np.isfinite(y) and all(np.isfinite(np.asarray(g)).all() for g in grads)


def test_second_derivatives():
  arrays = _inputs(1, 5, 5, 2, 1, 4)
  loss_grad = lambda fn: jax.grad(lambda q: (fn(q, *arrays[1:]) ** 3).sum())
  hvp = lambda fn: jax.jit(lambda q: jax.jvp(loss_grad(fn), (q,), (q,))[1])(arrays[0])
  _close(hvp(xla.attention), hvp(reference.attention), 1e-4)


@pytest.mark.parametrize(
  "pattern",
  [patterns.CAUSAL, patterns.Window(37), patterns.Window(37, causal=False)],
  ids=str,
)
def test_computed_pairs_are_those_of_the_compiled_dots(pattern):
  q, k, v = _inputs(1, 140, 140, 2, 1, 8)
  compiled = jax.jit(functools.partial(xla.attention, pattern=pattern)).lower(q, k, v)
  text = compiled.as_text()
  dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  pairs = 0
  for line in dots:
    shapes = [s.split("x")[:-1] for s in _tensors(line)]
    (lhs, _, out) = [[int(n) for n in s] for s in shapes]
    if lhs[-1] == 8:  # scores: [1, 1, R * C, K] with [1, 1, S, K]
      pairs += out[-2] // 2 * out[-1]
  assert pairs == xla.computed_pairs(140, 140, pattern)
  assert pairs < 140 * 140 * 0.7
  assert xla.computed_pairs(5, 7, in_order=False) == 35


def _tensors(line):
  signature = line.rsplit(" : ", 1)[1]
  return [part.split(">")[0] for part in signature.split("tensor<")[1:]]


def test_value_heads_of_another_size():
  q, k, v = _inputs(2, 40, 40, 4, 2, 8)
  v = jnp.concatenate([v, v[..., :3]], axis=-1)
  y, y_ref = jax.jit(xla.attention)(q, k, v), jax.jit(reference.attention)(q, k, v)
  assert y.shape == (2, 40, 4, 11)
  _close(y, y_ref, 1e-5)


def test_refuses_with_one_line():
  q, k, v = _inputs(1, 4, 6, 3, 2, 4)
  with pytest.raises(errors.InputError, match="3 query heads over 2 kv heads"):
    xla.attention(q, k, v)
  q = q[:, :, :2]
  with pytest.raises(errors.InputError, match="4 queries and 6 keys; give both"):
    xla.attention(q, k, v, q_segments_BL=jnp.ones((1, 4), jnp.int32))
  with pytest.raises(errors.InputError, match="did you mean 'reference'"):
    api.attention(q, k, v, implementation="referense")


@pytest.mark.oracle
@pytest.mark.parametrize("causal", [True, False])
def test_equals_torch(causal):
  torch = pytest.importorskip("torch")
  arrays = _inputs(2, 75, 75, 6, 2, 8)
  tensors = [
    torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in arrays
  ]
  theirs = torch.nn.functional.scaled_dot_product_attention(
    *tensors, is_causal=causal, enable_gqa=True
  ).transpose(1, 2)
  (theirs**2).sum().backward()
  pattern = patterns.CAUSAL if causal else patterns.FULL
  fn = functools.partial(xla.attention, pattern=pattern)
  _close(fn(*arrays), theirs.detach().numpy(), 1e-5)
  grads = jax.grad(lambda a: (fn(*a) ** 2).sum())(arrays)
  for grad, tensor in zip(grads, tensors, strict=True):
    _close(grad, tensor.grad.transpose(1, 2).numpy(), 1e-4)
