"""Longformer equals its definition, document by document, and HF transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import config, errors
from effjax.nn.mixers import longformer
from effjax.ops import flops
from effjax.ops.attention import rope as rope_lib
from effjax.ops.attention import xla
from effjax.weights import weight as weight_lib
from tests.models import bert_oracle as oracle

WIDTH, LENGTH, HEAD_DIM = 16, 13, 4
ONE = [[1] * 13, [1] * 9 + [0] * 4]
PACKED = [[1] * 6 + [2] * 7, [3] * 1 + [1] * 8 + [2] * 2 + [0] * 2]


def _options(**changes):
  values = {
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": HEAD_DIM,
    "window": 4,
    "num_global": 2,
    "bias": True,
  }
  return config.build(longformer.LongformerOptions, values | changes, "longformer")


def _places(segments):
  """Index of each token in its document."""
  places = np.zeros_like(segments)
  for row, ids in enumerate(segments):
    for t in range(1, len(ids)):
      places[row, t] = places[row, t - 1] + 1 if ids[t] == ids[t - 1] else 0
  return places


def _build(causal, **changes):
  module = longformer.Longformer(_options(**changes), WIDTH, causal=causal)
  x_BLD = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
  ids = jnp.ones((2, LENGTH), jnp.int32)
  params = module.init(jax.random.key(1), x_BLD, positions=ids, segments=ids)["params"]
  noise = lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape)
  return module, jax.tree.map(noise, params), x_BLD


def _masks(opts, segments, causal):
  """Section 3.1, pair by pair: what local and global queries see, and who is global."""
  places, size = _places(segments), segments.shape[1]
  local = np.zeros((len(segments), size, size), bool)
  far = np.zeros_like(local)
  for row, i, j in np.ndindex(*local.shape):
    if not segments[row, i] or segments[row, i] != segments[row, j]:
      continue
    distance = places[row, i] - places[row, j]
    if causal:
      near, allowed = distance < opts.window, distance >= 0
    else:
      near, allowed = abs(distance) <= opts.window // 2, True
    local[row, i, j] = allowed and (near or places[row, j] < opts.num_global)
    far[row, i, j] = allowed
  return local, far, places < opts.num_global


def _definition(opts, params, x_BLD, positions, local, far, is_global):
  """Both kinds of attention for every token, with all pairs of scores."""

  def heads(name, count):
    y = x_BLD @ params[name] + params[f"{name}_bias"][None, None]
    y = y.reshape(*x_BLD.shape[:2], count, HEAD_DIM)
    if opts.position == "rope" and name[0] in "qk":
      y = rope_lib.rope(y, positions, opts.rope_theta)
    return jnp.repeat(y, opts.num_heads // count, axis=2)

  def attend(suffix, seen):
    q = heads("q" + suffix, opts.num_heads)
    k = heads("k" + suffix, opts.num_kv_heads)
    v = heads("v" + suffix, opts.num_kv_heads)
    scores = jnp.einsum("bihk,bjhk->bhij", q, k) / HEAD_DIM**0.5
    scores = jnp.where(seen[:, None], scores, -1e9)
    return jnp.einsum("bhij,bjhk->bihk", jax.nn.softmax(scores, axis=-1), v)

  y = jnp.where(is_global[:, :, None, None], attend("_global", far), attend("", local))
  return y.reshape(*x_BLD.shape[:2], -1) @ params["o"] + params["o_bias"][None, None]


@pytest.mark.parametrize(
  ("causal", "position"), [(False, "none"), (True, "rope")], ids=["encoder", "decoder"]
)
def test_equals_the_definition_in_outputs_and_gradients(causal, position):
  module, params, x_BLD = _build(causal, position=position)
  probe = jax.random.normal(jax.random.key(2), x_BLD.shape)

  def fast(params, x_BLD, positions, segments):
    y, _ = module.apply(
      {"params": params}, x_BLD, positions=positions, segments=segments
    )
    y = y * (segments > 0)[..., None]
    return jnp.sum(y * probe), y

  def naive(params, x_BLD, positions, segments, *masks):
    y = _definition(module.options, params, x_BLD, positions, *masks)
    y = y * (segments > 0)[..., None]
    return jnp.sum(y * probe), y

  fast, naive = (
    jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True)) for fn in (fast, naive)
  )
  for ids in map(np.array, (ONE, PACKED)):
    inputs = (params, x_BLD, jnp.asarray(_places(ids)), jnp.asarray(ids))
    (_, got), gradients = fast(*inputs)
    (_, wanted), expected = naive(*inputs, *_masks(module.options, ids, causal))
    oracle.close(got, wanted)
    oracle.close(gradients[1], expected[1], "x")
    for name, g in expected[0].items():
      oracle.close(gradients[0][name], g, name)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_flops_are_those_of_the_pattern(causal):
  """Traced only: what is projected and multiplied for rows of one document."""
  opts = _options()
  module = longformer.Longformer(opts, WIDTH, causal=causal)
  _, params, _ = _build(causal)
  total, kv_size = opts.num_heads * HEAD_DIM, opts.num_kv_heads * HEAD_DIM

  def measured(length):
    ids = jnp.ones((1, length), jnp.int32)
    apply = lambda params, x: module.apply(
      {"params": params}, x, positions=ids, segments=ids
    )
    x_BLD = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
    every = 2 * length * WIDTH * (2 * total + 2 * kv_size)
    keys = opts.num_global if causal else length
    far = 2 * WIDTH * (opts.num_global * total + 2 * keys * kv_size)
    far += 4 * opts.num_global * keys * total
    return flops.dot_flops(apply, params, x_BLD) - every - far

  pattern = opts.pattern(causal)
  assert measured(64) == 4 * total * xla.computed_pairs(64, 64, pattern)
  assert measured(4096) < 0.5 * 4 * total * 4096**2 * (0.5 if causal else 1)


def test_prompts_in_parts_and_steps_equal_the_parallel_form():
  module, params, x_BLD = _build(True, num_global=3)
  step = jax.jit(module.apply)
  index = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
  whole, _ = step(
    {"params": params}, x_BLD, positions=index, segments=jnp.ones_like(index)
  )
  state = module.init_state(2, 16, "float32")
  assert state.far.k_BGSK.shape[2] == 3
  # One row gets two tokens at first, the other one: both less than the global ones.
  for lengths in ([2, 1], [2, 2], [1, 2], *[[2, 2]] * 2, *[[1, 1]] * 4):
    size = max(lengths)
    start_B = np.asarray(state.length_B)
    take = np.minimum(start_B[:, None] + np.arange(size), LENGTH - 1)
    x_part = jnp.take_along_axis(x_BLD, jnp.asarray(take)[..., None], axis=1)
    segments = jnp.asarray(np.arange(size) < np.array(lengths)[:, None], jnp.int32)
    y, state = step(
      {"params": params}, x_part, state, positions=jnp.asarray(take), segments=segments
    )
    for row, n in enumerate(lengths):
      oracle.close(y[row, :n], whole[row, start_B[row] : start_B[row] + n])
  assert state.length_B.tolist() == [13, 13]


def test_calibration_sees_what_the_global_queries_read():
  module, params, x_BLD = _build(False)
  segments = jnp.array(ONE)
  with weight_lib.token_weights((segments > 0).astype(jnp.float32)):
    _, written = module.apply(
      {"params": params},
      x_BLD,
      positions=jnp.asarray(_places(np.array(ONE))),
      segments=segments,
      mutable=["stats"],
    )
  stats = written["stats"]
  assert stats["q_global"]["count"] == 4 and stats["k_global"]["count"] == 22
  oracle.close(stats["q_global"]["square_sum"], np.sum(x_BLD[:, :2] ** 2, (0, 1)))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"window": 0}, "window=0 must be at least 1"),
    ({"window": None}, "window=None"),
    ({"num_global": 0}, "num_global=0 must be at least 1"),
    ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=2"),
    ({"position": "learned"}, "unknown position 'learned'"),
  ],
)
def test_mistakes(changes, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    _options(**changes)
  assert "\n" not in str(caught.value)


def test_what_it_cannot_do():
  module, params, x_BLD = _build(False)
  ids = jnp.ones((2, LENGTH), jnp.int32)
  call = lambda *args, **more: module.apply(
    {"params": params}, x_BLD, *args, positions=ids, segments=ids, **more
  )
  with pytest.raises(errors.InputError, match="cannot decode step by step"):
    call(module.init_state(2, 16, "float32"))
  with pytest.raises(errors.InputError, match="cannot be shared"):
    call(shared=(x_BLD, x_BLD))


@pytest.mark.oracle
def test_equals_hf_transformers():
  transformers = pytest.importorskip("transformers")
  length, num_global = 21, 2
  sizes = oracle.hf_sizes(
    attention_window=[4, 4],
    pad_token_id=1,
    max_position_embeddings=oracle.MAX_LEN + 2,
  )
  model = oracle.randomized(
    transformers.LongformerForMaskedLM(transformers.LongformerConfig(**sizes))
  )
  names = oracle.LAYER | {
    f"mixer/{n[0]}_global": f"attention.self.{n}_global"
    for n in ("query", "key", "value")
  }

  def mapping(state):
    flat = oracle.embeddings(state, "longformer.embeddings")
    # Its positions start behind the padding token.
    flat["position_embed/table"] = flat["position_embed/table"][2:]
    for i in range(2):
      theirs = f"longformer.encoder.layer.{i}"
      flat |= oracle.layer(state, f"layer_{i}", theirs, names)
    where = "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"
    return flat | oracle.head(state, *where)

  mask = np.ones((2, length), np.int64)
  mask[1, 17:] = 0
  far = np.zeros_like(mask)
  far[:, :num_global] = 1
  tokens = oracle.tokens(length)
  inputs = {
    "input_ids": np.where(mask > 0, tokens, 1),
    "attention_mask": mask,
    "global_attention_mask": far,
  }
  options = {
    "num_heads": oracle.HEADS,
    "head_dim": oracle.WIDTH // oracle.HEADS,
    "window": 4,
    "num_global": num_global,
  }
  cfg = oracle.config(pattern=("longformer",), mixer_options={"longformer": options})
  assert oracle.compare(cfg, model, mapping, inputs, segments=mask) <= 1e-4
