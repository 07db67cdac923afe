"""kv_cache: a config that says how keys and values are kept, and what follows."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry
from effjax.core import errors, layers, specs
from effjax.infer import engine
from effjax.measure import flops
from effjax.models import config as config_lib
from effjax.models import decoder, encoder, encoder_config
from effjax.nn.caches import quantized, recurrent
from effjax.train import stages
from tests import selection
from tests.infer import test_generate as generating
from tests.models.conftest import small_config

TOKENS_BL = jax.random.randint(jax.random.key(0), (2, 12), 0, 64)


def _model(**changes):
  model = decoder.Decoder(small_config(**changes))
  params = jax.jit(model.init)(jax.random.key(1), TOKENS_BL)["params"]
  return model, params


def _shapes(**changes):
  model = decoder.Decoder(small_config(**changes))
  init = lambda: model.init(jax.random.key(1), TOKENS_BL)["params"]
  return model, jax.eval_shape(init)


def _applied(model, params, where=None, **options):
  change = registry.find("kv_cache")
  return change(model, params, specs.specs(model), where=where, options=options)


def _caches(model):
  return [layer.mixer_options.get("kv_cache", "none") for layer in model.config.layers]


@pytest.mark.parametrize("format", selection.quick(quantized.FORMATS, ("int4",)))
def test_prefill_and_steps_equal_the_parallel_form(format):
  (model, params), tokens_BL = _model(), TOKENS_BL
  made, same = _applied(model, params, format=format)
  assert jax.tree.structure(same) == jax.tree.structure(params)
  assert all(a is b for a, b in zip(*map(jax.tree.leaves, (same, params)), strict=True))
  assert made.runs == model.runs and _caches(made) == ["none", format] * 2
  exact = jax.jit(model.apply)({"params": params}, tokens_BL)[0]
  expected = jax.jit(made.apply)({"params": params}, tokens_BL)[0]
  difference = float(jnp.max(jnp.abs(exact - expected)) / jnp.max(jnp.abs(exact)))
  assert 1e-5 < difference < (1e-2 if format == "int8" else 0.1)
  decoding = engine.Decoding(made, params, 2, 32)
  lengths = np.array([7, 4])
  segments = (jnp.arange(8)[None] < lengths[:, None]).astype(jnp.int32)
  logits, state = decoding.prefill(tokens_BL[:, :8] * segments, segments)
  for i in range(4):
    for row, n in enumerate(lengths + i - 1):
      np.testing.assert_allclose(logits[row], expected[row, n], atol=1e-4)
    logits, state = decoding.step(tokens_BL[jnp.arange(2), lengths + i], state)
  assert isinstance(state["layer_1"], quantized.QuantizedCache)
  assert isinstance(state["layer_0"], recurrent.RecurrentState)
  # Scanned layers and their stacked caches do the same.
  state = made.init_state(2, 32)
  scanned, _ = jax.jit(made.apply)({"params": params}, tokens_BL[:, :8], state=state)
  np.testing.assert_allclose(scanned, expected[:, :8], atol=1e-4)


def test_generated_text_is_that_of_the_parallel_form():
  model, params = _model(num_layers=2)
  made, _ = _applied(model, params, format="int4")
  expected = generating._naive(made, params, [0, 1, 2, 3], 12, ends=(0,))
  got = generating._text(made, params, generating.Letters(), "abc")
  assert got == generating.Letters().decode(expected) and len(expected) > 3


def test_layers_that_borrow_keys_follow_their_lender():
  model, params = _model(pattern=("attention",), share_keys=2)
  made, _ = _applied(model, params, format="int8")
  expected = jax.jit(made.apply)({"params": params}, TOKENS_BL)[0]
  assert _caches(made) == ["int8"] * 4
  state = made.init_state(2, 32)
  apply = jax.jit(made.apply)
  logits, state = apply({"params": params}, TOKENS_BL[:, :9], state=state)
  np.testing.assert_allclose(logits, expected[:, :9], atol=1e-4)
  for i in (9, 10):
    logits, state = apply({"params": params}, TOKENS_BL[:, i : i + 1], state=state)
    np.testing.assert_allclose(logits[:, 0], expected[:, i], atol=1e-4)


def test_selected_layers_only_and_one_after_the_other():
  """Layers that are scanned together keep lying together."""
  model, params = _shapes(pattern=("attention",), mlp_pattern=("swiglu", "gelu"))
  assert [(r.period, r.repeats) for r in model.runs] == [(2, 2)]
  made, _ = _applied(model, params, {"path": "layer_0/"}, format="int4", group=4)
  assert _caches(made) == ["int4", "float"] * 2 and made.runs == model.runs
  assert made.config.layers[0].mixer_options["kv_group"] == 4
  again, _ = _applied(made, params, {"path": "layer_1/"})
  assert _caches(again) == ["int4", "int8"] * 2 and again.runs == model.runs
  both, _ = _applied(again, params, format="int8")
  assert _caches(both) == ["int8"] * 4
  assert both.config.layers[0].mixer_options["kv_group"] is None
  # And those of a model taken apart.
  apart = model.with_runs(None)
  flat = jax.eval_shape(lambda: apart.init(jax.random.key(1), TOKENS_BL)["params"])
  made, _ = _applied(apart, flat, {"path": "layer_[12]/"})
  assert _caches(made) == ["float", "int8", "int8", "float"]


def test_the_decoding_state_of_a_model_shrinks_by_the_formula():
  options = {"attention": {"head_dim": 64}}
  model, params = _shapes(pattern=("attention",), mixer_options=options)

  def state_bytes(model):
    state = jax.eval_shape(lambda: model.with_runs(None).init_state(2, 32))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))

  # 4 layers, keys and values, 2 rows, 2 heads, 32 tokens; and lengths.
  vectors, lengths = 4 * 2 * 2 * 2 * 32, 5 * 2 * 4
  assert state_bytes(model) == vectors * 64 * 4 + lengths
  for format, a_vector in (("int8", 64 + 2), ("int4", 32 + 2 * 3)):
    made, _ = _applied(model, params, format=format)
    assert state_bytes(made) == vectors * a_vector + lengths


def test_a_decoding_step_updates_the_codes_in_place():
  options = {"attention": {"head_dim": 32}}
  model, params = _shapes(
    pattern=("attention",), num_layers=2, max_len=16384, mixer_options=options
  )
  made, _ = _applied(model, params)
  made, params = made.with_runs(None), None
  params = jax.eval_shape(lambda: made.init(jax.random.key(0), TOKENS_BL)["params"])
  state = jax.eval_shape(lambda: made.init_state(1, 16384))
  token = jax.ShapeDtypeStruct((1,), jnp.int32)
  compiled = engine.step.lower(made, params, token, state).compile()
  cache_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < 0.1 * cache_bytes
  assert memory.alias_size_in_bytes >= 0.99 * cache_bytes


def test_a_stage_folder_keeps_it(tmp_path):
  model, params = _model(num_layers=2)
  made, params = _applied(model, params, format="int4", group=4)
  stages.save_stage(tmp_path / "stage", made, params, specs.specs(made), None)
  loaded = stages.load_stage(tmp_path / "stage")
  assert loaded.model.config == made.config
  assert _caches(loaded.model) == ["none", "int4"]
  assert flops.per_token(made, params, 8) == flops.per_token(model, params, 8)
  unrolled, flat = layers.unstack(loaded.model, loaded.params)
  again, _ = layers.restack(unrolled, flat)
  assert again.config == made.config.__class__(**vars(again.config))


def test_the_log_says_what_it_takes_and_what_stays(caplog):
  model, params = _shapes(pattern=("mla", "attention"))
  with caplog.at_level(logging.INFO, "effjax"):
    made, _ = _applied(model, params, format="int8")
  assert _caches(made) == ["none", "int8"] * 2
  assert caplog.messages == [
    "kv_cache: int8 in 2 of 4 layers, 10 bytes a head of 8 entries; as they were: "
    "layers of mla"
  ]


def test_refuses_with_one_line():
  model, params = _shapes(pattern=("mamba2", "mla"))
  with pytest.raises(errors.InputError) as caught:
    _applied(model, params)
  assert str(caught.value) == (
    "kv_cache is for layers of attention or bigbird whose weight k is selected; there "
    "is none among layers of mamba2, mla"
  )
  model, params = _shapes()
  with pytest.raises(errors.InputError, match="none among layers of mamba2, attention"):
    _applied(model, params, {"path": "mlp"})
  with pytest.raises(errors.InputError, match="kv_group=3 must divide head_dim=8"):
    _applied(model, params, group=3)
  with pytest.raises(errors.InputError, match="unknown format of a cache 'int2'"):
    _applied(model, params, format="int2")
  config = encoder_config.EncoderConfig(vocab_size=64, embed_dim=32, num_layers=1)
  model = encoder.Encoder(config)
  with pytest.raises(errors.InputError, match="decodes; this is an Encoder"):
    registry.find("kv_cache")(model, {}, {"k": specs.ParamSpec(axes=(), kind="matrix")})
  with pytest.raises(errors.InputError, match="bidirectional attention keeps no cache"):
    encoder_config.EncoderConfig(
      vocab_size=64,
      embed_dim=32,
      num_layers=1,
      mixer_options={"attention": {"kv_cache": "int8"}},
    )
  with pytest.raises(errors.InputError, match="longformer keeps its two caches"):
    config_lib.LayerConfig(mixer="longformer", mixer_options={"kv_cache": "int8"})
