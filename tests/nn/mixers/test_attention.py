"""Options of the attention mixer: caches, windows, biases, both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import config as config_core
from effjax.core import errors, specs
from effjax.core import tree as tree_lib
from effjax.nn.caches import kv, window
from effjax.nn.mixers import attention
from effjax.ops.attention import alibi, patterns, reference

ROWS, LENGTH, WIDTH = 2, 23, 16
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))
SEGMENTS = jnp.ones((ROWS, LENGTH), jnp.int32)
X = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, WIDTH))


def _build(causal=True, **options):
  opts = attention.AttentionOptions(**(SMALL | options))
  module = attention.Attention(opts, WIDTH, causal=causal)
  init = jax.jit(
    lambda key: module.init(key, X, positions=POSITIONS, segments=SEGMENTS)
  )
  params = init(jax.random.key(1))
  noise = lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape)
  return module, jax.tree.map(noise, params)


def _close(a, b, tolerance=1e-4):
  limit = tolerance * max(1.0, float(jnp.max(jnp.abs(b))))
  assert float(jnp.max(jnp.abs(a - b))) <= limit


EVERYTHING = {"position": "alibi", "qk_norm": True, "bias": True, "logit_cap": 4.0}
CACHED = {
  "window": {"window": 5, "bias": True},
  "wide window, alibi": {"window": 40} | EVERYTHING,
  "full, alibi": EVERYTHING,
}


@pytest.mark.parametrize("name", CACHED)
def test_prompts_of_any_length_and_steps_equal_the_parallel_form(name):
  """Rows of unequal length, in calls below and far above the window, then steps."""
  module, params = _build(**CACHED[name])
  apply = jax.jit(module.apply)
  expected, none = apply(params, X, positions=POSITIONS, segments=SEGMENTS)
  assert none is None
  state = module.init_state(ROWS, 32, jnp.float32)
  at = np.zeros(ROWS, int)
  for new in ((11, 8), (1, 2), (3, 5), (1, 1), (1, 1), (1, 1)):
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
      _close(y[row, :n], expected[row, at[row] : at[row] + n])
    assert jnp.all(jnp.isfinite(y))
    at += new
  assert state.length_B.tolist() == at.tolist() == [18, 18]


def test_a_window_keeps_a_cache_of_its_size():
  module, _ = _build(window=5)
  state = jax.eval_shape(lambda: module.init_state(ROWS, 10_000, jnp.bfloat16))
  assert isinstance(state, window.WindowCache)
  assert state.k_BGWK.shape == (ROWS, 2, 5, 8) and state.k_BGWK.dtype == jnp.bfloat16
  module, _ = _build()
  state = jax.eval_shape(lambda: module.init_state(ROWS, 100, jnp.float32))
  assert isinstance(state, kv.KVCache) and state.k_BGSK.shape == (ROWS, 2, 100, 8)


def test_slots_of_a_rolling_cache():
  cache = window.init(2, 1, 4, 1, jnp.float32)
  values = jnp.arange(12.0).reshape(2, 6, 1, 1)
  valid = jnp.arange(6)[None] < jnp.array([[6], [3]])
  cache = jax.jit(window.append)(cache, values, -values, valid)
  assert cache.k_BGWK[:, 0, :, 0].tolist() == [[4, 5, 2, 3], [6, 7, 8, 0]]
  assert (cache.v_BGWK == -cache.k_BGWK).all()
  assert window.positions(cache)[0].tolist() == [4, 5, 2, 3]
  positions = window.positions(cache)[1]
  assert positions[:3].tolist() == [0, 1, 2] and positions[3] < 0
  one = jnp.full((2, 1, 1, 1), 9.0)
  cache = jax.jit(window.append)(cache, one, one, jnp.array([[True], [False]]))
  assert cache.k_BGWK[:, 0, :, 0].tolist() == [[4, 5, 9, 3], [6, 7, 8, 0]]
  assert cache.length_B.tolist() == [7, 3]


def test_a_windowed_step_copies_no_cache():
  module = attention.Attention(
    attention.AttentionOptions(num_heads=4, num_kv_heads=4, head_dim=64, window=2048),
    32,
  )
  x = jnp.zeros((1, 1, 32))
  ones = jnp.ones((1, 1), jnp.int32)
  state = module.init_state(1, 4096, jnp.float32)
  call = lambda p, x, s: module.apply(p, x, s, positions=ones, segments=ones)
  params = jax.eval_shape(
    lambda: module.init(jax.random.key(0), x, positions=ones, segments=ones)
  )
  compiled = jax.jit(call, donate_argnums=2).lower(params, x, state).compile()
  cache_bytes = sum(a.nbytes for a in jax.tree.leaves(state))
  assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * cache_bytes
  assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * cache_bytes


@pytest.mark.parametrize("width", [None, 6])
def test_both_directions(width):
  """Without causality everything, or a symmetric window, is seen; padding is not."""
  module, params = _build(causal=False, window=width, position="alibi")
  segments = SEGMENTS.at[1, 15:].set(0)

  def at_ten(x):
    y, _ = module.apply(params, x, positions=POSITIONS, segments=segments)
    return jnp.sum(y[:, 10])

  touched = jnp.any(jax.jit(jax.grad(at_ten))(X) != 0, axis=-1)
  away = jnp.abs(jnp.arange(LENGTH) - 10)
  seen = away <= (LENGTH if width is None else width // 2)
  assert touched[0].tolist() == seen.tolist()
  assert touched[1].tolist() == (seen & (jnp.arange(LENGTH) < 15)).tolist()
  state = module.init_state(ROWS, 32, jnp.float32)
  assert isinstance(state, kv.KVCache)
  with pytest.raises(errors.InputError, match="cannot decode"):
    module.apply(params, X, state, positions=POSITIONS, segments=segments)


def test_options_are_what_the_reference_says():
  """Every option but the rotation, from the weights up; the rotation has its tests."""
  module, params = _build(window=7, **EVERYTHING)
  p = params["params"]

  def heads(name, count):
    y = X @ p[name] + p[f"{name}_bias"][None, None]
    y = y.reshape(ROWS, LENGTH, count, 8)
    if name == "v":
      return y
    y = y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-5)
    return y * p[f"{name}_norm"]["scale"][None, None, None]

  y = reference.attention(
    heads("q", 4),
    heads("k", 2),
    heads("v", 2),
    pattern=patterns.Window(7),
    slopes_H=alibi.slopes(4),
    logit_cap=4.0,
  )
  expected = y.reshape(ROWS, LENGTH, 32) @ p["o"] + p["o_bias"][None, None]
  got, _ = jax.jit(module.apply)(params, X, positions=POSITIONS, segments=SEGMENTS)
  _close(got, expected)


def test_the_implementation_does_not_change_results():
  outputs = []
  for name in ("auto", "xla", "blockwise", "reference"):
    module, params = _build(implementation=name, window=9)
    apply = jax.jit(module.apply)
    outputs.append(apply(params, X, positions=POSITIONS, segments=SEGMENTS)[0])
  limit = 1e-5 * max(1.0, float(jnp.max(jnp.abs(outputs[0]))))
  for y in outputs[1:]:
    assert float(jnp.max(jnp.abs(y - outputs[0]))) <= limit


def test_shared_keys_take_the_place_of_its_own():
  module, params = _build(position="none")
  k, v = jax.random.normal(jax.random.key(3), (2, ROWS, LENGTH, 2, 8))
  keys = lambda k, v: attention.Keys(k, v, None)
  call = lambda shared: module.apply(
    params, X, positions=POSITIONS, segments=SEGMENTS, shared=shared
  )[0]
  apply = jax.jit(call)
  assert float(jnp.max(jnp.abs(apply(keys(k, v)) - apply(None)))) > 0.1
  # Linear in the values, and no keys of its own are declared.
  _close(apply(keys(k, 2 * v)), 2 * apply(keys(k, v)))
  declared = jax.eval_shape(
    lambda: module.init(
      jax.random.key(0), X, positions=POSITIONS, segments=SEGMENTS, shared=keys(k, v)
    )
  )
  assert set(declared["params"]) == {"q", "o"}


def test_specs_of_biases():
  module, params = _build(bias=True, qk_norm=True)
  names = set(tree_lib.flatten(params["params"]))
  assert names == {
    *(n + end for n in "qkvo" for end in ("", "_bias")),
    "q_norm/scale",
    "k_norm/scale",
  }
  with specs.recording() as recorded:
    jax.eval_shape(
      lambda: module.init(jax.random.key(0), X, positions=POSITIONS, segments=SEGMENTS)
    )
  by_name = {path.split("/")[-1]: spec for path, spec in recorded.items()}
  assert all(by_name[f"{n}_bias"].kind == "bias" for n in "qkvo")
  assert by_name["k_bias"].axes == ("kv",) and by_name["o_bias"].axes == ("embed",)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"window": 0}, "window=0 must be at least 1, or None"),
    ({"window": -3}, "window=-3"),
    ({"logit_cap": 0.0}, "logit_cap=0.0 must be positive"),
    ({"num_heads": 0}, "num_heads must be positive, got 0"),
    ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
    ({"head_dim": 7}, "head_dim=7 must be even for position='rope'"),
    ({"rope_theta": 0.0}, "rope_theta must be positive, got 0.0"),
    ({"position": "rotary"}, "unknown position 'rotary'; .*available: alibi, none"),
    ({"implementation": "flash"}, "unknown attention implementation 'flash'"),
    (
      {"position": "alibi", "rope_scaling": {"kind": "linear", "factor": 2.0}},
      "rope_scaling needs position='rope', got position='alibi'",
    ),
    ({"rope_scaling": {"kind": "linea", "factor": 2.0}}, "did you mean 'linear'"),
    ({"windows": 3}, "did you mean 'window'"),
  ],
)
def test_refuses_with_one_line(options, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    config_core.build(attention.AttentionOptions, options, "attention options")
  assert "\n" not in str(caught.value)


def test_odd_heads_go_without_rotation():
  opts = attention.AttentionOptions(head_dim=7, position="none")
  assert opts.pattern(causal=True) == patterns.Causal()
  assert opts.pattern(causal=False) == patterns.Full()
