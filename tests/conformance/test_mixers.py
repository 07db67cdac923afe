"""What every registered mixer and MLP keeps, whatever it computes."""

import jax
import jax.numpy as jnp
import pytest

from effjax.core import layers, precision, registry
from effjax.models import config, decoder

BATCH, LENGTH, WIDTH, VOCAB = 2, 9, 32, 40
# Small sizes for the options that a mixer or MLP has; all others are its defaults.
SMALL = {
  "head_dim": 16,
  "state_dim": 8,
  "chunk": 4,
  "num_heads": 2,
  "num_kv_heads": 1,
  "block": 2,
  "num_features": 32,
  "kv_rank": 16,
  "rope_dim": 8,
}


def _options(package, name):
  fields = registry.find(package, name).options_cls.__dataclass_fields__
  return {name: {key: value for key, value in SMALL.items() if key in fields}}


def _build(mixer, mlp="swiglu"):
  cfg = config.DecoderConfig(
    vocab_size=VOCAB,
    embed_dim=WIDTH,
    num_layers=2,
    pattern=(mixer,),
    mlp=mlp,
    mixer_options=_options(config.MIXERS, mixer),
    mlp_options=_options(config.MLPS, mlp),
    tie_embeddings=False,
    max_len=16,
  )
  model = decoder.Decoder(cfg)
  tokens_BL = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, VOCAB)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  return model, params, tokens_BL


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """Most of the time here is XLA's; what is compared does not need its last effort."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=registry.names(config.MIXERS))
def built(request):
  return _build(request.param)


@pytest.fixture(scope="module")
def parallel(built):
  model, params, tokens_BL = built
  return jax.jit(model.apply)({"params": params}, tokens_BL)[0]


def _close(a, b, tolerance=1e-4):
  limit = tolerance * max(1.0, float(jnp.max(jnp.abs(b))))
  assert float(jnp.max(jnp.abs(a - b))) <= limit


def test_shapes_and_jit_equals_no_jit(built, parallel):
  model, params, tokens_BL = built
  assert parallel.shape == (BATCH, LENGTH, VOCAB) and parallel.dtype == jnp.float32
  unrolled, flat = layers.unstack(model, params)
  with jax.disable_jit():
    _close(unrolled.apply({"params": flat}, tokens_BL)[0], parallel)


def test_bfloat16_is_close_and_gradients_are_finite(built, parallel):
  model, params, tokens_BL = built
  half = model.clone(precision=precision.PrecisionConfig(compute="bfloat16"))

  def loss(params):
    logits = half.apply({"params": params}, tokens_BL)[0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1)), logits

  (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  _close(logits, parallel, 0.1)
  for g in jax.tree.leaves(grads):
    assert g.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(g)))


def test_causal_by_gradient(built):
  model, params, tokens_BL = built
  ids = jnp.arange(LENGTH)[None]

  def at_four(table):
    changed = {**params, "embed": {"table": table}}
    return jnp.sum(model.apply({"params": changed}, ids)[0][0, 4])

  gradient = jax.jit(jax.grad(at_four))(params["embed"]["table"])
  moved = jnp.any(gradient[:LENGTH] != 0, axis=1)
  assert moved.tolist() == [True] * 5 + [False] * 4


def test_steps_equal_the_parallel_form_and_compile_once(built, parallel):
  model, params, tokens_BL = built
  step = jax.jit(model.apply)
  state = model.init_state(BATCH, 16)
  for i in range(LENGTH):
    token_B1 = tokens_BL[:, i : i + 1]
    logits, state = step({"params": params}, token_B1, state=state)
    _close(logits[:, 0], parallel[:, i])
  assert step._cache_size() == 1
  assert state["length_B"].tolist() == [LENGTH] * BATCH


def test_padding_changes_neither_outputs_nor_states(built, parallel):
  model, params, tokens_BL = built
  segments = jnp.ones((BATCH, 12), jnp.int32).at[:, LENGTH:].set(0)
  padded = jnp.pad(tokens_BL, ((0, 0), (0, 3)), constant_values=7)
  apply = jax.jit(model.apply)
  _close(apply({"params": params}, padded, segments=segments)[0][:, :LENGTH], parallel)
  state = model.init_state(BATCH, 16)
  logits, state = apply({"params": params}, padded, segments=segments, state=state)
  _close(logits[:, :LENGTH], parallel)
  after = apply({"params": params}, tokens_BL[:, :1], state=state)[0]
  longer = jnp.concatenate([tokens_BL, tokens_BL[:, :1]], axis=1)
  _close(after[:, 0], apply({"params": params}, longer)[0][:, -1])


def test_segments_are_isolated(built):
  model, params, tokens_BL = built
  segments = jnp.array([[1] * 4 + [2] * 5, [3] * 7 + [5] * 2])
  positions = jnp.array([[*range(4), *range(5)], [*range(7), 0, 1]])
  apply = jax.jit(model.apply)
  packed = apply({"params": params}, tokens_BL, positions, segments)[0]
  for row, cut in ((0, 4), (1, 7)):
    for part in (slice(0, cut), slice(cut, LENGTH)):
      alone = apply({"params": params}, tokens_BL[row : row + 1, part])[0]
      _close(packed[row, part], alone[0])


@pytest.mark.parametrize("mlp", registry.names(config.MLPS))
def test_every_mlp_acts_on_each_position_alone(mlp):
  technique = registry.find(config.MLPS, mlp)
  module = technique(technique.options_cls(), WIDTH)
  x_BLD = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
  variables = jax.jit(module.init)(jax.random.key(1), x_BLD)
  whole = module.apply(variables, x_BLD)
  assert whole.shape == x_BLD.shape
  one = module.apply(variables, x_BLD[:, 3:4])
  _close(one[:, 0], whole[:, 3], 1e-5)
  grads = jax.grad(lambda v: jnp.sum(module.apply(v, x_BLD) ** 2))(variables)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
