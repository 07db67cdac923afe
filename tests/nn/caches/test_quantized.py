"""The cache of codes: its grids, its bytes, and attention over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import config as config_core
from effjax.core import errors
from effjax.nn.caches import kv, quantized
from effjax.nn.mixers import attention, bigbird, longformer
from effjax.ops.attention import decode
from effjax.weights.formats import int as int_format

ROWS, LENGTH, WIDTH = 2, 23, 16
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))
SEGMENTS = jnp.ones((ROWS, LENGTH), jnp.int32)
X = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, WIDTH))


def _build(mixer=attention.Attention, **options):
  module = mixer(mixer.options_cls(**(SMALL | options)), WIDTH)
  init = jax.jit(
    lambda key: module.init(key, X, positions=POSITIONS, segments=SEGMENTS)
  )
  params = init(jax.random.key(1))
  noise = lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape)
  return module, jax.tree.map(noise, params)


def _close(a, b, tolerance=1e-4):
  limit = tolerance * max(1.0, float(jnp.max(jnp.abs(b))))
  assert float(jnp.max(jnp.abs(a - b))) <= limit


def _numpy_round_trip(x, name, group):
  """Jacob et al. 2018, eq. 1, on groups of the last axis, with bfloat16 scales."""
  short = lambda s: np.asarray(jnp.asarray(s).astype(jnp.bfloat16).astype(jnp.float32))
  x = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, group)
  if name == "int8":
    scale = short(np.abs(x).max(-1, keepdims=True) / 127)
    codes = np.clip(np.round(x / scale), -127, 127)
    return codes * scale, codes, scale
  low, high = np.minimum(x.min(-1, keepdims=True), 0), x.max(-1, keepdims=True)
  scale = short((np.maximum(high, 0) - low) / 15)
  zero = np.clip(np.round(-low / scale), 0, 15)
  codes = np.clip(np.round(x / scale + zero), 0, 15)
  return (codes - zero) * scale, codes, scale


@pytest.mark.parametrize(("name", "group"), [("int8", 64), ("int8", 16), ("int4", 32)])
def test_grids_are_those_of_a_numpy_form_and_of_the_weight_format(name, group):
  head = quantized.head_format(name, 64, group)
  x = (
    jax.random.normal(jax.random.key(3), (5, 3, 64))
    * jnp.logspace(-8, 8, 5)[:, None, None]
  )
  parts = jax.jit(head.encode)(x)
  values = np.asarray(jax.jit(head.decode)(parts))
  expected, codes, scale = _numpy_round_trip(x, name, group)
  np.testing.assert_allclose(values, expected.reshape(x.shape), rtol=1e-2, atol=0)
  same = values == expected.reshape(x.shape)
  assert same.mean() > 0.995
  # Within half a step; a zero point is rounded, too, and bfloat16 may cut 15 steps.
  error = np.abs(values - np.asarray(x)).reshape(codes.shape)
  assert (error <= scale * (0.5 if name == "int8" else 0.53)).all()
  # The same vectors as a matrix [in, out] of weights: the codes of rtn.
  fmt = int_format.Int(
    bits=int(name[3:]), symmetric=name == "int8", group=group, scale_dtype="bfloat16"
  )
  w = x.reshape(-1, 64).T
  grouped = w.reshape(-1, group, w.shape[1])
  leaf_codes = jax.jit(lambda x: fmt.encode(x, fmt.fit(x)))(grouped)
  ours = np.asarray(parts["codes"])
  if name == "int4":
    ours = np.stack([ours & 15, ours >> 4], axis=-1)
  ours = ours.reshape(-1, 64).T
  np.testing.assert_array_equal(ours, np.asarray(leaf_codes).reshape(64, -1))


@pytest.mark.parametrize(
  ("name", "head_dim", "group", "a_head"),
  [
    ("int8", 64, None, 64 + 2),
    ("int8", 64, 16, 64 + 4 * 2),
    ("int4", 64, None, 32 + 2 * (2 + 1)),
    ("int4", 96, 0, 48 + 3),
    ("int4", 48, None, 24 + 2 * 3),
    ("int4", 8, None, 4 + 3),
  ],
)
def test_bytes_are_codes_scales_and_zero_points(name, head_dim, group, a_head):
  head = quantized.head_format(name, head_dim, group)
  assert head.num_bytes == a_head
  options = attention.AttentionOptions(
    num_kv_heads=2, head_dim=head_dim, kv_cache=name, kv_group=group
  )
  state = attention.Attention(options, 32).init_state(3, 10, jnp.float32)
  assert isinstance(state, quantized.QuantizedCache) and not state.rolling
  held = sum(a.nbytes for a in jax.tree.leaves((state.k, state.v)))
  assert held == 2 * 3 * 2 * 10 * a_head
  floats = kv.init(3, 2, 10, head_dim, jnp.float32)
  ratio = held / (floats.k_BGSK.nbytes + floats.v_BGSK.nbytes)
  assert ratio == a_head / (4 * head_dim)


CACHED = {
  "int8": {"kv_cache": "int8"},
  "int4, everything": {
    "kv_cache": "int4",
    "kv_group": 4,
    "position": "alibi",
    "qk_norm": True,
    "bias": True,
    "logit_cap": 4.0,
  },
  "int8, window": {"kv_cache": "int8", "window": 5},
  "int4, wide window": {"kv_cache": "int4", "window": 40, "position": "none"},
}
MIXERS = {name: (attention.Attention, options) for name, options in CACHED.items()}
MIXERS["int8, bigbird"] = (
  bigbird.BigBird,
  {"kv_cache": "int8", "block": 2, "num_kv_heads": 2},
)


def _marks(name):
  """One mixer of each kind of cache runs each time."""
  return () if name in ("int8", "int4, wide window") else pytest.mark.slow


@pytest.mark.parametrize(
  ("name", "many_pairs"),
  [
    *(pytest.param(name, None, marks=_marks(name)) for name in MIXERS),
    ("int8", 1),
  ],
)
def test_prompts_of_any_length_and_steps_equal_the_parallel_form(
  name, many_pairs, monkeypatch
):
  """Rows of unequal length, in calls below and far above the window, then steps."""
  if many_pairs is not None:
    monkeypatch.setattr(decode, "_MANY_PAIRS", many_pairs)
  mixer, options = MIXERS[name]
  module, params = _build(mixer, **options)
  apply = jax.jit(module.apply)
  expected, none = apply(params, X, positions=POSITIONS, segments=SEGMENTS)
  assert none is None
  exact, _ = _build(mixer, **(options | {"kv_cache": "float", "kv_group": None}))
  unrounded = jax.jit(exact.apply)(params, X, positions=POSITIONS, segments=SEGMENTS)
  difference = jnp.max(jnp.abs(expected - unrounded[0])) / jnp.max(jnp.abs(expected))
  assert 1e-4 < difference < (0.02 if options["kv_cache"] == "int8" else 0.3)
  state = module.init_state(ROWS, 32, jnp.float32)
  at = np.zeros(ROWS, int)
  for new in ((11, 8), (1, 2), (1, 1), (1, 0), (1, 1)):
    length = max(new)
    rows, columns = np.arange(ROWS)[:, None], at[:, None] + np.arange(length)
    columns = np.minimum(columns, LENGTH - 1)
    segments = jnp.asarray(np.arange(length) < np.array(new)[:, None], jnp.int32)
    y, state = apply(
      params,
      X[rows, columns] * segments[..., None],
      state,
      positions=jnp.asarray(columns, jnp.int32),
      segments=segments,
    )
    for row, n in enumerate(new):
      if n:
        _close(y[row, :n], expected[row, at[row] : at[row] + n])
    assert jnp.all(jnp.isfinite(y))
    at += new
  assert state.length_B.tolist() == at.tolist() == [15, 12]


def test_old_tokens_are_never_rounded_again():
  head = quantized.head_format("int4", 8)
  cache = quantized.init(2, 1, 4, head)
  draw = lambda i, n: jax.random.normal(jax.random.key(i), (2, n, 1, 8))
  append = jax.jit(lambda cache, x, valid: quantized.append(cache, x, -x, valid, head))
  valid = jnp.array([[True, True], [True, False]])
  before = append(cache, draw(0, 2), valid)
  after = append(before, draw(1, 1), jnp.ones((2, 1), bool))
  after = append(after, draw(2, 3), jnp.ones((2, 3), bool))  # One is past the end.
  assert after.length_B.tolist() == [6, 5]
  for name, part in after.k.items():
    np.testing.assert_array_equal(part[0, :, :2], before.k[name][0, :, :2])
    np.testing.assert_array_equal(part[1, :, :1], before.k[name][1, :, :1])
  kept = head.decode(after.v)
  np.testing.assert_array_equal(kept[1, 0, 1], head.rounded(-draw(1, 1))[1, 0, 0])
  np.testing.assert_array_equal(kept[1, 0, 2:], head.rounded(-draw(2, 3))[1, :2, 0])


def test_packed_segments_are_isolated():
  module, params = _build(kv_cache="int4")
  segments = jnp.array([[1] * 9 + [2] * 14, [3] * 20 + [0] * 3])
  positions = jnp.array([[*range(9), *range(14)], [*range(20), 0, 1, 2]])
  apply = jax.jit(module.apply)
  packed = apply(params, X, positions=positions, segments=segments)[0]
  for row, start, end in ((0, 0, 9), (0, 9, 23), (1, 0, 20)):
    part = slice(start, end)
    alone = apply(
      params,
      X[row : row + 1, part],
      positions=POSITIONS[:1, : end - start],
      segments=SEGMENTS[:1, part],
    )[0]
    apart = float(jnp.max(jnp.abs(packed[row, part] - alone[0])))
    assert apart <= 1e-4 * max(1.0, float(jnp.max(jnp.abs(alone))))


def test_gradients_go_straight_through():
  """Those of the attention that is given the rounded keys and values as constants."""
  head = quantized.head_format("int8", 8)
  x, probe = jax.random.normal(jax.random.key(0), (2, 3, 8))
  value, gradient = jax.value_and_grad(lambda x: jnp.sum(head.rounded(x) * probe))(x)
  np.testing.assert_array_equal(gradient, probe)
  _close(value, jnp.sum(head.decode(head.encode(x)) * probe), 1e-6)
  module, params = _build(kv_cache="int4", qk_norm=True)

  def loss(params):
    y = module.apply(params, X, positions=POSITIONS, segments=SEGMENTS)[0]
    return jnp.sum(y**2)

  for name, g in jax.jit(jax.grad(loss))(params)["params"].items():
    g = jax.tree.leaves(g)[0]
    assert bool(jnp.all(jnp.isfinite(g))) and float(jnp.max(jnp.abs(g))) > 0, name


@pytest.mark.parametrize("window", [None, 16384])
@pytest.mark.parametrize("name", quantized.FORMATS)
def test_a_step_copies_and_decodes_no_cache(name, window):
  """Only one block of slots is ever there as floats."""
  options = attention.AttentionOptions(
    num_heads=4, num_kv_heads=2, head_dim=64, kv_cache=name, window=window
  )
  module = attention.Attention(options, 32)
  x, ones = jnp.zeros((1, 1, 32)), jnp.ones((1, 1), jnp.int32)
  state = jax.eval_shape(lambda: module.init_state(1, 32768, jnp.float32))
  call = lambda p, x, s: module.apply(p, x, s, positions=ones, segments=ones)
  params = jax.eval_shape(
    lambda: module.init(jax.random.key(0), x, positions=ones, segments=ones)
  )
  compiled = jax.jit(call, donate_argnums=2).lower(params, x, state).compile()
  cache_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
  memory = compiled.memory_analysis()
  block_bytes = 2 * 2 * 256 * 64 * 4
  assert memory.temp_size_in_bytes < min(1.5 * block_bytes, 0.2 * cache_bytes)
  assert memory.alias_size_in_bytes >= 0.99 * cache_bytes


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"kv_cache": "int3"}, "unknown kv_cache 'int3'; .*available: float, int4, int8"),
    ({"kv_group": 8}, "kv_group=8 needs kv_cache='int8' or 'int4', got 'float'"),
    (
      {"kv_cache": "int4", "kv_group": 24},
      r"kv_group=24 must divide head_dim=64; the nearest that does is 16 \(0: the",
    ),
    ({"kv_cache": "int8", "kv_group": -1}, "kv_group=-1 must divide head_dim=64"),
  ],
)
def test_refuses_with_one_line(options, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    config_core.build(attention.AttentionOptions, options, "attention options")
  assert "\n" not in str(caught.value)


def test_mixers_that_cannot_say_so():
  with pytest.raises(errors.InputError, match="longformer keeps its two caches as fl"):
    longformer.LongformerOptions(kv_cache="int8")
  module = attention.Attention(
    attention.AttentionOptions(**SMALL, kv_cache="int8"), WIDTH, causal=False
  )
  with pytest.raises(errors.InputError, match="bidirectional attention keeps no cache"):
    module.init(jax.random.key(0), X, positions=POSITIONS, segments=SEGMENTS)
