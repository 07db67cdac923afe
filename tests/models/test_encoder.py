"""The encoder: it looks both ways, packs, shares parameters, and is one function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import config as config_core
from effjax.core import errors, layers, specs
from effjax.core import tree as tree_lib
from effjax.measure import bytes as bytes_lib
from effjax.models import encoder, encoder_config

VOCAB, LENGTH = 40, 10


def _config(**changes):
  values = {
    "vocab_size": VOCAB,
    "embed_dim": 16,
    "num_layers": 4,
    "mixer_options": {"attention": {"num_heads": 2, "head_dim": 8}},
    "max_len": 24,
  }
  return encoder_config.EncoderConfig(**(values | changes))


def _build(**changes):
  model = encoder.Encoder(_config(**changes))
  tokens_BL = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, VOCAB)

  @jax.jit
  def init(key):
    params = model.init(key, tokens_BL)["params"]
    # Larger than at the start, so that every part of the model matters.
    grow = lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape)
    return jax.tree.map(grow, params)

  return model, init(jax.random.key(1)), tokens_BL


def _shapes(model):
  variables = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())
  return tree_lib.flatten(variables["params"])


@pytest.fixture(scope="module")
def tied():
  return _build(share=2)


def _close(a, b, tolerance=1e-4):
  limit = tolerance * max(1.0, float(jnp.max(jnp.abs(b))))
  assert float(jnp.max(jnp.abs(a - b))) <= limit


def _loss(model, tokens_BL):
  probe = jax.random.normal(jax.random.key(5), (*tokens_BL.shape, VOCAB))
  return lambda params: jnp.sum(model.apply({"params": params}, tokens_BL)[0] * probe)


def test_the_first_token_depends_on_the_last_and_not_on_padding(tied):
  model, params, _ = tied
  ids = jnp.arange(LENGTH)[None]
  segments = jnp.ones((1, LENGTH), jnp.int32).at[:, 8:].set(0)

  def first(table):
    changed = {**params, "embed": {"table": table}}
    logits = model.apply({"params": changed}, ids, segments=segments)[0]
    # A token past those in the row, so that the tied head does not touch their rows.
    return logits[0, 0, VOCAB - 1]

  gradient = jax.jit(jax.grad(first))(params["embed"]["table"])
  moved = jnp.any(gradient[:LENGTH] != 0, axis=1)
  assert moved.tolist() == [True] * 8 + [False] * 2


def test_packing_and_padding_change_nothing(tied):
  model, params, tokens_BL = tied
  apply = jax.jit(model.apply)
  segments = jnp.array([[1] * 4 + [2] * 6, [3] * 5 + [1] * 2 + [0] * 3])
  positions = jnp.array([[*range(4), *range(6)], [*range(5), 0, 1, 0, 0, 0]])
  packed = apply({"params": params}, tokens_BL, positions, segments)[0]
  # Each document alone in a row, whose padding holds the tokens that stood behind it.
  for row, start, end in [(0, 0, 4), (0, 4, 10), (1, 0, 5), (1, 5, 7)]:
    tokens_alone = jnp.roll(tokens_BL[row : row + 1], -start, axis=1)
    only = (jnp.arange(LENGTH) < end - start)[None].astype(jnp.int32)
    twice = lambda x: jnp.concatenate([x, x])
    count = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    alone = apply({"params": params}, twice(tokens_alone), count, twice(only))[0]
    _close(packed[row, start:end], alone[0, : end - start])
  assert jnp.all(jnp.isfinite(packed))


def test_shared_layers_exist_once_and_their_gradients_are_sums(tied):
  model, params, tokens_BL = tied
  untied = encoder.Encoder(_config(scan=False))
  apart = _shapes(untied)
  sizes = {name: 4 * p.size for name, p in apart.items()}
  one_layer = sum(n for name, n in sizes.items() if name.startswith("layer_0/"))
  assert bytes_lib.held_bytes(params) == sum(sizes.values()) - 2 * one_layer

  assert model.runs == (layers.Run(1, 2),)
  unrolled, sets = layers.unstack(model, params)
  names = {name for name in sets if name.startswith("layer_")}
  assert names == {"layer_0", "layer_1"}
  copies = {name: p for name, p in sets.items() if name not in names}
  copies |= {f"layer_{k}": sets[f"layer_{k // 2}"] for k in range(4)}
  loss = jax.jit(jax.value_and_grad(_loss(untied, tokens_BL)))
  expected, gradient = loss(copies)
  got, tied_gradient = jax.jit(jax.value_and_grad(_loss(model, tokens_BL)))(params)
  _close(got, expected)
  tied_gradient = layers.unstack(model, tied_gradient)[1]
  for k in range(2):
    uses = gradient[f"layer_{2 * k}"], gradient[f"layer_{2 * k + 1}"]
    total = jax.tree.map(lambda a, b: a + b, *uses)
    jax.tree.map(_close, tied_gradient[f"layer_{k}"], total)
  _close(tied_gradient["embed"]["table"], gradient["embed"]["table"])
  again, restacked = layers.restack(unrolled, sets)
  assert again.runs == model.runs
  jax.tree.map(np.testing.assert_array_equal, restacked, params)


def test_statistics_of_shared_weights_sum_over_uses(tied):
  model, params, tokens_BL = tied
  segments = jnp.ones_like(tokens_BL).at[:, 6:].set(0)
  apply = jax.jit(model.apply, static_argnames="mutable")
  variables = {"params": params}
  (logits, _), written = apply(
    variables, tokens_BL, segments=segments, mutable=("stats",)
  )
  count = written["stats"]["run_0"]["layer_0"]["mlp"]["up"]["count"]
  assert count.tolist() == [2 * 2 * 6.0] * 2
  # Counting takes the uses one by one, otherwise they are scanned.
  _close(logits, apply(variables, tokens_BL, segments=segments)[0])


def test_a_sentence_is_the_normalized_mean_of_its_tokens():
  model, params, tokens_BL = _build(pooling="mean", scan=False)
  segments = jnp.ones_like(tokens_BL).at[1, 6:].set(0)

  @jax.jit
  def run(p):
    is_layer = lambda module, _: isinstance(module, encoder.EncoderLayer)
    return model.apply(
      {"params": p},
      tokens_BL,
      segments=segments,
      capture_intermediates=is_layer,
      mutable=("intermediates",),
    )

  (got, _), kept = run(params)
  assert got.shape == (2, 16) and got.dtype == jnp.float32
  np.testing.assert_allclose(jnp.linalg.norm(got, axis=1), 1.0, rtol=1e-5)
  ((states_BLD, _, _),) = kept["intermediates"]["layer_3"]["__call__"]
  for row, length in enumerate((LENGTH, 6)):
    mean = np.asarray(states_BLD)[row, :length].mean(0)
    np.testing.assert_allclose(got[row], mean / np.linalg.norm(mean), atol=1e-5)


def test_a_sentence_does_not_depend_on_what_stands_behind_it():
  model, params, tokens_BL = _build(pooling="mean")
  apply = jax.jit(model.apply)
  embed = lambda *args: apply({"params": params}, *args)[0]
  alone = embed(tokens_BL[:, :6])
  count = jnp.arange(LENGTH)
  positions = jnp.broadcast_to(jnp.where(count < 6, count, count - 6), (2, LENGTH))
  padded = jnp.broadcast_to((count < 6).astype(jnp.int32), (2, LENGTH))
  packed = jnp.where(padded > 0, 3, 5)
  for segments in (padded, packed):
    other = embed(tokens_BL, positions, segments)
    np.testing.assert_allclose(other, alone, atol=1e-5)
    changed = embed(tokens_BL.at[:, 6:].set(7), positions, segments)
    np.testing.assert_allclose(changed, alone, atol=1e-5)


def test_gradients_of_sentences_are_finite_also_without_a_token():
  model, params, tokens_BL = _build(pooling="mean")
  segments = jnp.ones_like(tokens_BL).at[1].set(0)
  probe = jax.random.normal(jax.random.key(5), (2, 16))

  def loss(p):
    y_BD = model.apply({"params": p}, tokens_BL, segments=segments)[0]
    return jnp.sum(y_BD * probe), y_BD

  (_, y_BD), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert jnp.all(y_BD[1] == 0) and jnp.any(y_BD[0] != 0)
  norms = jax.tree.map(lambda g: float(jnp.max(jnp.abs(g))), gradient)
  assert all(np.isfinite(value) for value in jax.tree.leaves(norms))
  assert norms["embed"]["table"] > 0
  only = np.unique(np.asarray(tokens_BL[0]))
  used = np.flatnonzero(np.any(np.asarray(gradient["embed"]["table"]) != 0, axis=1))
  assert set(used) <= set(only)


def test_a_sentence_encoder_has_no_head():
  plain, classes = _shapes(encoder.Encoder(_config(pooling="mean"))), _config()
  heads = {"head", "head_bias", "head_norm/scale", "head_norm/bias", "vocab_bias"}
  assert _shapes(encoder.Encoder(classes)).keys() - plain.keys() == heads


def test_factorized_embeddings_are_small():
  model = encoder.Encoder(_config(embedding_dim=4))
  shapes = {name: p.shape for name, p in _shapes(model).items()}
  assert shapes["embed/table"] == (VOCAB, 4)
  assert shapes["embed_out"] == (4, 16) and shapes["head"] == (16, 4)
  tree = tree_lib.flatten(specs.specs(model))
  assert tree["embed_out"].reads == "embed_norm"
  assert tree["head"].axes == ("embed", "embedding")


def test_specs_of_post_norm():
  model = encoder.Encoder(_config())
  tree = tree_lib.flatten(specs.specs(model))
  assert tree.keys() == _shapes(model).keys()
  # The norm before them also feeds the residual stream: no pair to smooth.
  assert tree["run_0/layer_0/mixer/q"].reads is None and tree["head"].reads is None
  # Between them stands a GELU.
  assert tree["run_0/layer_0/mlp/down"].reads is None
  assert tree["position_embed/table"].axes == ("position", "embed")
  assert tree["vocab_bias"].kind == "bias"


def test_specs_of_a_pre_norm_classifier():
  model = encoder.Encoder(_config(norm="pre", num_classes=3))
  tree = tree_lib.flatten(specs.specs(model))
  assert tree.keys() == _shapes(model).keys()
  assert tree["run_0/layer_0/mixer/q"].reads == "run_0/layer_0/mixer_norm"
  assert tree["pooler"].reads == "final_norm"
  assert tree["classifier"].reads is None  # through tanh


def test_config_round_trips_and_bert_is_the_default():
  cfg = _config(share=2)
  assert encoder_config.from_dict(config_core.to_dict(cfg)) == cfg
  assert (len(cfg.layers), cfg.num_layers) == (2, 4)
  options = cfg.layers[0].build_mixer_options()
  assert options.bias and options.position == "none" and options.num_kv_heads == 2
  assert cfg.layers[0].build_mlp_options().init_std == 0.02
  rotary = _config(position="none").layers[0].build_mixer_options()
  assert rotary.position == "rope"
  given = {
    "attention": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 8, "bias": False}
  }
  kept = _config(mixer_options=given).layers[0].build_mixer_options()
  assert (kept.num_kv_heads, kept.bias) == (1, False)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pattern": ("mamba2",)}, "cannot use mixer 'mamba2' .*bidirectional mixers: att"),
    ({"pattern": ("mamba2",), "embed_dim": 0}, "embed_dim=0 must be positive"),
    ({"pattern": ("atention",)}, "did you mean 'attention'"),
    ({"share": 3}, "share=3 must divide num_layers=4"),
    ({"share": 0}, "share=0 must be positive"),
    (
      {"pattern": ("attention", "longformer"), "share": 2},
      "they are attention with gelu and longformer with gelu",
    ),
    ({"norm": "past"}, "unknown norm 'past'; did you mean 'post'"),
    ({"position": "rope"}, "unknown position 'rope'"),
    ({"pooling": "men"}, "unknown pooling 'men'; did you mean 'mean'"),
    ({"pooling": "mean", "num_classes": 2}, "pooling='mean' .* num_classes=2, .* both"),
    ({"num_token_types": -1}, "num_token_types=-1 must not be negative"),
    ({"embedding_dim": 0}, "embedding_dim=0 must be positive"),
    ({"mlp_options": {"gelu": {"hidden_dim": 0}}}, "hidden_dim=0 must be positive"),
    ({"runs": ((1, 3),)}, "runs cover 3 layers, the model has 4"),
  ],
)
def test_config_mistakes(changes, message):
  with pytest.raises(errors.InputError, match=message):
    _config(**changes)


def test_inputs_that_do_not_fit():
  model = encoder.Encoder(_config(num_token_types=0))
  init = lambda *args, **more: jax.eval_shape(
    lambda: model.init(jax.random.key(0), *args, **more)
  )
  with pytest.raises(errors.InputError, match="25 tokens in a row, .* max_len=24"):
    init(jnp.zeros((1, 25), jnp.int32))
  short = jnp.zeros((1, 2), jnp.int32)
  with pytest.raises(errors.InputError, match="num_token_types=0"):
    init(short, token_types_BL=short)


def test_mixers_without_softmax_look_ahead_too():
  """Two rows that differ in the last token; errors list what an encoder can use."""
  names = set(encoder_config.bidirectional_mixers())
  assert {"attention", "mla", "longformer", "bigbird", "linear_attention"} <= names
  assert not {"mamba2", "gla"} & names
  tokens_BL = jnp.stack([jnp.arange(LENGTH), jnp.arange(LENGTH).at[-1].set(30)])
  cfg = _config(pattern=("linear_attention",), num_layers=1, mixer_options={})
  model = encoder.Encoder(cfg)
  init = jax.jit(lambda: model.init_with_output(jax.random.key(0), tokens_BL))
  logits = init()[0][0]
  assert float(jnp.max(jnp.abs(logits[0, 0] - logits[1, 0]))) > 1e-5
