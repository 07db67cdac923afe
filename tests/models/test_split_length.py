"""Models whose attention works on sequences that are split between devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors, specs
from effjax.models import config, decoder, encoder, encoder_config
from effjax.parallel import spread

ROWS, LENGTH, VOCAB = 4, 16, 32
SEGMENTS = np.repeat([[1, 2, 0], [1, 1, 1], [5, 0, 0], [3, 1, 2]], [6, 7, 3], axis=1)


def _layer(mixer, keys="own", **options):
  return config.LayerConfig(
    mixer=mixer,
    mlp_options={"hidden_dim": 16},
    mixer_options=options | {"num_heads": 4},
    keys=keys,
  )


def _decoder():
  """Grouped keys, lent to a second layer; a window; latent attention."""
  grouped = {"num_kv_heads": 2, "head_dim": 4, "position": "rope"}
  layers = (
    _layer("attention", "lent", **grouped, logit_cap=3.0),
    _layer("attention", "borrowed", **grouped, logit_cap=3.0),
    _layer("attention", num_kv_heads=1, head_dim=4, position="alibi", window=5),
    _layer("mla", head_dim=4, rope_dim=2, value_dim=3, kv_rank=6),
  )
  return decoder.Decoder(
    config.DecoderConfig(vocab_size=VOCAB, embed_dim=16, embed_std=1.0, layers=layers)
  )


def _encoder():
  """What sees the whole document, in patterns or by random features."""
  layers = (
    _layer("attention", num_kv_heads=2, head_dim=4, window=4),
    _layer("longformer", num_kv_heads=2, head_dim=4, window=4, num_global=2),
    _layer("bigbird", num_kv_heads=2, head_dim=4, block=2, num_random=1),
    _layer("performer", head_dim=4, num_features=8),
  )
  return encoder.Encoder(
    encoder_config.EncoderConfig(
      vocab_size=VOCAB, embed_dim=16, layers=layers, mlp="swiglu", norm="pre"
    )
  )


MODELS = {"decoder": _decoder, "encoder": _encoder}


def _loss(model, tokens_BL):
  def loss(params):
    logits = model.apply({"params": params}, tokens_BL, segments=jnp.asarray(SEGMENTS))
    targets = jnp.roll(tokens_BL, -1, axis=1)
    log_p = jax.nn.log_softmax(logits[0])
    picked = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(SEGMENTS > 0, picked, 0.0)) / (SEGMENTS > 0).sum()

  return jax.value_and_grad(loss)


@functools.cache
def _alone(name):
  """The model, its parameters and tokens; loss and gradients on one device."""
  model = MODELS[name]()
  tokens_BL = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 0, VOCAB)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  return model, params, tokens_BL, jax.jit(_loss(model, tokens_BL))(params)


@pytest.mark.parametrize(
  ("name", "preset", "shape"),
  [
    ("decoder", "ring", {"context": 8}),
    ("decoder", "ulysses", {"context": 4}),
    ("decoder", "ring+tp", {"context": 4, "tensor": 2}),
    ("decoder", "fsdp+ring", {"fsdp": 2, "context": 4}),
    pytest.param(
      "decoder",
      "ulysses+tp+dp",
      {"data": 2, "context": 2, "tensor": 2},
      marks=pytest.mark.slow,
    ),
    ("encoder", "ring", {"context": 4}),
    ("encoder", "ulysses+dp", {"data": 2, "context": 4}),
  ],
)
def test_several_devices_equal_one(name, preset, shape):
  model, params, tokens_BL, expected = _alone(name)
  placed = spread.over(preset, shape=shape)
  shardings = placed.params(specs.specs(model), params)
  with placed.active():
    run = jax.jit(_loss(model, placed.put(tokens_BL)), out_shardings=(None, shardings))
    lowered = run.lower(jax.device_put(params, shardings))
    text = lowered.as_text()
    loss, gradients = lowered.compile()(jax.device_put(params, shardings))
  # Gathering every token would be right, too.
  assert ("all_to_all" if "ulysses" in preset else "collective_permute") in text
  assert abs(float(loss) - float(expected[0])) < 1e-5

  def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(b).max() > 0
    assert np.abs(a - b).max() <= 1e-5 * max(1.0, np.abs(b).max())

  jax.tree.map(close, gradients, expected[1])


def test_a_length_that_does_not_divide_is_refused_before_anything_is_compiled():
  model, params, _, _ = _alone("decoder")
  tokens_BL = jnp.zeros((ROWS, 12), jnp.int32)
  with spread.over("ring", shape={"context": 8}).active():
    with pytest.raises(errors.InputError, match="12 tokens do not divide over 8"):
      jax.eval_shape(model.apply, {"params": params}, tokens_BL)
