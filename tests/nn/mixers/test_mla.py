"""Multi-head latent attention: the paper's equations, its small cache, its steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from effjax.compress import registry as compress
from effjax.core import config as config_core
from effjax.core import errors, specs
from effjax.infer import engine
from effjax.models import config, decoder
from effjax.nn.mixers import mla
from effjax.ops.attention import latent, reference_latent, rope_scaling

BATCH, LENGTH, WIDTH = 2, 11, 24
SMALL = {
  "num_heads": 2,
  "head_dim": 6,
  "rope_dim": 4,
  "value_dim": 5,
  "kv_rank": 10,
}
YARN = rope_scaling.RopeScaling(
  kind="yarn", factor=4.0, original_max_len=8, mscale=1.0, mscale_all_dim=0.5
)
SEGMENTS = [[1] * 4 + [2] * 7, [3] * 6 + [5] * 3 + [0] * 2]
POSITIONS = [[*range(4), *range(7)], [*range(6), *range(3), 0, 0]]


def _close(a, b, tolerance=1e-4):
  limit = tolerance * max(1.0, float(jnp.max(jnp.abs(b))))
  assert float(jnp.max(jnp.abs(a - b))) <= limit


@functools.cache
def _build(**fields):
  options = mla.MLAOptions(**(SMALL | fields))
  module = mla.MultiHeadLatentAttention(options, WIDTH)
  x_BLD = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
  params = jax.jit(module.init)(jax.random.key(1), x_BLD, **_packed())["params"]
  # Scales of norms that are not all one.
  noise = lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape)
  return module, jax.tree.map(noise, params), x_BLD


def _packed():
  return {"positions": jnp.array(POSITIONS), "segments": jnp.array(SEGMENTS)}


def _plain(length):
  ones = jnp.ones((BATCH, length), jnp.int32)
  return {"positions": jnp.cumsum(ones, axis=1) - 1, "segments": ones}


def _paper(opts, params):
  """Our parameters by the paper's names."""
  q = params["q_up" if opts.q_rank else "q"]
  q = q.reshape(-1, opts.num_heads, opts.head_dim + opts.rope_dim)
  merged = lambda w: w.reshape(len(w), -1)
  weights = {
    "UQ": merged(q[..., : opts.head_dim]),
    "QR": merged(q[..., opts.head_dim :]),
    "DKV": params["kv_down"],
    "cKV": params["kv_norm"]["scale"],
    "UK": params["k_up"],
    "KR": params["k_rope"],
    "UV": params["v_up"],
    "O": params["o"],
  }
  if opts.q_rank:
    weights |= {"DQ": params["q_down"], "cQ": params["q_norm"]["scale"]}
  return weights


@pytest.mark.parametrize(
  ("causal", "fields"),
  [(False, {}), (True, {"q_rank": 7, "rope_scaling": YARN})],
)
def test_outputs_and_every_gradient_equal_the_paper(causal, fields):
  module, params, x_BLD = _build(**fields)
  module = module.clone(causal=causal)
  opts = module.options
  real_BL1 = (jnp.array(SEGMENTS) > 0)[..., None]
  probe = jax.random.normal(jax.random.key(3), x_BLD.shape) * real_BL1
  scaling = opts.rope_scaling
  frequency_J = rope_scaling.frequencies(opts.rope_dim, opts.rope_theta, scaling)

  def naive(params, x_BLD):
    return reference_latent.latent_attention(
      x_BLD,
      _paper(opts, params),
      num_heads=opts.num_heads,
      positions_BL=jnp.array(POSITIONS),
      segments_BL=jnp.array(SEGMENTS),
      frequency_J=jnp.asarray(frequency_J, jnp.float32),
      rotation_scale=rope_scaling.attention_factor(scaling),
      score_scale=rope_scaling.score_factor(scaling),
      causal=causal,
    )

  ours = lambda params, x: module.apply({"params": params}, x, **_packed())[0]
  loss = lambda f: lambda *args: (lambda y: (jnp.sum(y * probe), y))(f(*args))
  run = lambda f: jax.jit(jax.value_and_grad(loss(f), (0, 1), has_aux=True))
  (_, got), grads = run(ours)(params, x_BLD)
  (_, expected), naive_grads = run(naive)(params, x_BLD)
  _close(got * real_BL1, expected * real_BL1)
  jax.tree.map(_close, grads, naive_grads)
  assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_pieces_over_a_cache_equal_the_expanded_whole(monkeypatch):
  """A prompt, two steps, and several tokens behind them in blocks of queries."""
  monkeypatch.setattr(latent, "_BLOCK", 4)
  module, params, x_BLD = _build(q_rank=7, rope_scaling=YARN)
  apply = jax.jit(module.apply)
  whole = apply({"params": params}, x_BLD, **_plain(LENGTH))[0]
  state, start = module.init_state(BATCH, 16, jnp.float32), 0
  for size in (4, 1, 1, 5):
    piece = slice(start, start + size)
    where = {name: a[:, piece] for name, a in _plain(LENGTH).items()}
    y, state = apply({"params": params}, x_BLD[:, piece], state, **where)
    _close(y, whole[:, piece])
    start += size
  assert state.length_B.tolist() == [LENGTH] * BATCH


def test_rows_of_different_lengths_step_together():
  module, params, x_BLD = _build()
  apply = jax.jit(module.apply)
  lengths = jnp.array([7, 4])
  segments = (jnp.arange(8)[None] < lengths[:, None]).astype(jnp.int32)
  state = module.init_state(BATCH, 16, jnp.float32)
  where = _plain(8) | {"segments": segments}
  _, state = apply({"params": params}, x_BLD[:, :8], state, **where)
  assert state.length_B.tolist() == [7, 4]
  # Padding was not written.
  assert not jnp.any(state.c_BSR[1, 4:]) and not jnp.any(state.k_rope_BSJ[1, 4:])
  x_B1D = jnp.take_along_axis(x_BLD, lengths[:, None, None], axis=1)
  where = _plain(1) | {"positions": lengths[:, None]}
  y_B1D, _ = apply({"params": params}, x_B1D, state, **where)
  whole = apply({"params": params}, x_BLD, **_plain(LENGTH))[0]
  _close(y_B1D, jnp.take_along_axis(whole, lengths[:, None, None], axis=1))


def test_halves_are_interleaved_pairs_of_permuted_weights():
  module, params, x_BLD = _build()
  module = module.clone(
    options=dataclasses.replace(module.options, rope_interleaved=False)
  )
  opts = module.options
  # Entry i of a half is entry 2 i of the pairs: [0, 2, 1, 3] for four entries.
  order = jnp.arange(opts.rope_dim).reshape(2, -1).T.reshape(-1)
  q = params["q"].reshape(WIDTH, opts.num_heads, -1)
  turned = q[..., opts.head_dim :][..., order]
  q = jnp.concatenate([q[..., : opts.head_dim], turned], -1).reshape(WIDTH, -1)
  changed = params | {"q": q, "k_rope": params["k_rope"][:, order]}
  pairs = module.clone(options=dataclasses.replace(opts, rope_interleaved=True))
  apply = lambda m: jax.jit(lambda p: m.apply({"params": p}, x_BLD, **_packed())[0])
  halves, in_pairs = apply(module)(params), apply(pairs)
  _close(in_pairs(changed), halves, 1e-5)
  assert float(jnp.max(jnp.abs(in_pairs(params) - halves))) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_takes_kv_rank_and_rope_dim_entries(dtype):
  options = mla.MLAOptions(num_heads=64)
  module = mla.MultiHeadLatentAttention(options, WIDTH)
  state = module.init_state(3, 40, dtype)
  cached = [a for a in jax.tree.leaves(state) if a.ndim > 1]
  entries = options.kv_rank + options.rope_dim
  assert sum(a.nbytes for a in cached) == 3 * 40 * entries * jnp.dtype(dtype).itemsize


def _decoder(max_len, **fields):
  cfg = config.DecoderConfig(
    vocab_size=64,
    embed_dim=32,
    num_layers=2,
    pattern=("mla",),
    mixer_options={"mla": fields},
    max_len=max_len,
  )
  return decoder.Decoder(cfg)


def _model(max_len, **fields):
  model = _decoder(max_len, **fields)
  tokens_BL = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, 64)
  return model, jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"], tokens_BL


def test_decoding_step_neither_copies_nor_expands_the_cache():
  model, params, _ = _model(4096, num_heads=4, kv_rank=128)
  decoding = engine.Decoding(model, params, 1, 4096)
  state = decoding.init_state()
  compiled = engine.step.lower(
    decoding.model, decoding.params, jnp.zeros((1,), jnp.int32), state
  ).compile()
  memory = compiled.memory_analysis()
  cache_bytes = sum(a.nbytes for a in jax.tree.leaves(state))
  assert memory.temp_size_in_bytes < 0.1 * cache_bytes
  assert memory.alias_size_in_bytes >= 0.99 * cache_bytes


def test_compressed_leaves_decode_as_they_train():
  model, params, tokens_BL = _model(16, q_rank=16, **(SMALL | {"kv_rank": 16}))
  spec_tree = specs.specs(model)
  params = compress.find("rtn")(params, spec_tree, where={"kind": "matrix"})
  whole = jax.jit(model.apply)({"params": params}, tokens_BL)[0]
  state = model.init_state(BATCH, 16)
  step = jax.jit(model.apply)
  logits, state = step({"params": params}, tokens_BL[:, :8], state=state)
  _close(logits, whole[:, :8])
  for i in range(8, LENGTH):
    logits, state = step({"params": params}, tokens_BL[:, i : i + 1], state=state)
    _close(logits[:, 0], whole[:, i])


def test_specs_name_heads_and_readers():
  tree = specs.specs(_decoder(16, q_rank=16))["run_0"]["layer_0"]["mixer"]
  path = "run_0/layer_0/mixer"
  assert tree["k_up"].reads == tree["v_up"].reads == f"{path}/kv_norm"
  assert tree["q_up"].reads == f"{path}/q_norm" and tree["o"].reads == f"{path}/v_up"
  assert tree["kv_down"].instances[1] == tree["kv_norm"]["scale"].instances[0]
  assert tree["k_up"].instances[0] == tree["kv_norm"]["scale"].instances[0]
  heads = [tree[n].shape[-1] // tree[n].head_dim for n in ("q_up", "k_up", "v_up")]
  assert heads == [8, 8, 8]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kv_rank": 0}, "kv_rank=0 must be positive"),
    ({"q_rank": 0}, "q_rank=0 must be positive, or None"),
    ({"rope_dim": 5}, "rope_dim=5 must be even"),
    ({"rope_theta": 1.0}, "rope_theta=1.0 must be over 1"),
    ({"norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
    ({"implementation": "spash"}, "'spash'; did you mean 'splash'"),
    ({"rope_scaling": {"kind": "yarn", "factor": 2}}, "needs original_max_len"),
    ({"kv_lora_rank": 3}, "unknown field of mla options 'kv_lora_rank'"),
  ],
)
def test_config_mistakes(fields, message):
  with pytest.raises(errors.InputError, match=message):
    config.LayerConfig(mixer="mla", mixer_options=fields)


def test_a_config_with_scaling_round_trips():
  fields = {"kind": "yarn", "factor": 2, "original_max_len": 64}
  layer = config.LayerConfig(mixer="mla", mixer_options={"rope_scaling": fields})
  again = config_core.build(config.LayerConfig, config_core.to_dict(layer))
  assert again == layer and hash(again) == hash(layer)
  assert again.build_mixer_options().rope_scaling.factor == 2.0


def test_refuses_shared_keys_and_bidirectional_steps():
  module, params, x_BLD = _build()
  with pytest.raises(errors.InputError, match="no keys and values to share"):
    module.apply({"params": params}, x_BLD, **_packed(), shared=(x_BLD, x_BLD))
  state = module.init_state(BATCH, 16, jnp.float32)
  both = module.clone(causal=False)
  with pytest.raises(errors.InputError, match="bidirectional mla cannot decode"):
    both.apply({"params": params}, x_BLD, state, **_packed())
