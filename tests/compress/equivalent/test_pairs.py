"""Scales moved along `reads` leave every registered mixer and MLP what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.equivalent import _pairs
from effjax.compress.quantize import rtn
from effjax.core import layers, registry, specs
from effjax.core import tree as tree_lib
from effjax.models import config, decoder, encoder, encoder_config
from effjax.weights.leaves import masked
from tests import selection

VOCAB = 40
SMALL = {
  "head_dim": 8,
  "state_dim": 8,
  "chunk": 4,
  "num_heads": 4,
  "num_kv_heads": 2,
  "block": 2,
  "num_features": 32,
  "kv_rank": 16,
  "rope_dim": 8,
  "value_dim": 8,
  "num_experts": 3,
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def _options(package, name, **more):
  fields = registry.find(package, name).options_cls.__dataclass_fields__
  given = {key: value for key, value in SMALL.items() if key in fields}
  return {name: given | more}


def _decoder(mixer="attention", mlp="swiglu", mixer_more=None, mlp_more=None, **more):
  values = {
    "vocab_size": VOCAB,
    "embed_dim": 32,
    "num_layers": 2,
    "pattern": (mixer,),
    "mlp": mlp,
    "mixer_options": _options(config.MIXERS, mixer, **(mixer_more or {})),
    "mlp_options": _options(config.MLPS, mlp, **(mlp_more or {})),
    "tie_embeddings": False,
    "max_len": 16,
  }
  return decoder.Decoder(config.DecoderConfig(**(values | more)))


def _encoder(**changes):
  values = {
    "vocab_size": VOCAB,
    "embed_dim": 32,
    "num_layers": 2,
    "pattern": ("attention",),
    "mixer_options": _options(config.MIXERS, "attention"),
    "max_len": 16,
  }
  return encoder.Encoder(encoder_config.EncoderConfig(**(values | changes)))


def _init(model, tree=None):
  """Random parameters, with no zero or one among biases and norms either."""
  rng = np.random.default_rng(0)
  flat = {}
  for path, spec in tree_lib.flatten(tree or specs.specs(model)).items():
    width = spec.shape[-2] if len(spec.axes) > 1 else 100
    values = rng.normal(size=spec.shape) * width**-0.5 + (spec.kind == "norm")
    flat[path] = jnp.asarray(values, jnp.float32)
  return tree_lib.unflatten(flat), jnp.asarray(rng.integers(0, VOCAB, (2, 9)))


def _random_factors(pairs, params):
  flat, factors = tree_lib.flatten(params), {}
  for i, pair in enumerate(pairs):
    shape = flat[pair.scaled[0]].shape
    if not pair.is_norm:
      shape = (*shape[:-2], shape[-1])
    key = jax.random.fold_in(jax.random.key(3), i)
    factors[pair.producer] = jnp.exp(jax.random.uniform(key, shape, minval=-1.5))
  return factors


def _moved(model, tree=None):
  """Logits before and after all pairs got random factors, and their producers."""
  tree = specs.specs(model) if tree is None else tree
  params, tokens_BL = _init(model, tree)
  pairs = _pairs.find(params, tree, frozenset(tree_lib.flatten(tree)))
  changed = _pairs.apply(params, pairs, _random_factors(pairs, params))
  before, after = tree_lib.flatten(params), tree_lib.flatten(changed)
  touched = {path for path in before if not np.array_equal(before[path], after[path])}
  expected = {p for pair in pairs for p in pair.scaled}
  assert touched == expected | {r.path for pair in pairs for r in pair.readers}
  apply = jax.jit(model.apply)
  logits, got = (apply({"params": p}, tokens_BL)[0] for p in (params, changed))
  limit = 1e-4 * max(1.0, float(jnp.max(jnp.abs(logits))))
  producers = {pair.producer.rpartition("/")[2] for pair in pairs}
  return float(jnp.max(jnp.abs(got - logits))) <= limit, producers


@pytest.mark.parametrize(
  "mixer",
  selection.quick(registry.names(config.MIXERS), ("attention", "mla", "mamba2")),
)
def test_every_mixer(mixer):
  same, producers = _moved(_decoder(mixer))
  assert same
  # S4D is no projection: its norm is read by no weight.
  assert ("mixer_norm" in producers) == (mixer != "s4d")
  assert {"mlp_norm", "up", "final_norm"} <= producers


@pytest.mark.parametrize("mlp", registry.names(config.MLPS))
def test_every_mlp_and_layer_norms(mlp):
  same, producers = _moved(_decoder(mlp=mlp, norm="layer"))
  assert same and "mlp_norm" in producers
  assert ("up" in producers) == (mlp != "gelu")


def test_a_reader_that_is_not_linear_would_be_seen():
  model = _decoder(mlp="gelu")
  flat = tree_lib.flatten(specs.specs(model))
  path = "run_0/layer_0/mlp/down"
  flat[path] = dataclasses.replace(flat[path], reads="run_0/layer_0/mlp/up")
  assert not _moved(model, tree_lib.unflatten(flat))[0]


def test_shared_experts_and_capacity():
  more = {"num_shared": 1, "router": "sigmoid", "dispatch": "capacity"}
  assert _moved(_decoder(mlp="moe", mlp_more=more))[0]


def test_biases_of_projections_and_normalized_keys():
  same, producers = _moved(
    _decoder(mixer_more={"bias": True, "qk_norm": True, "num_kv_heads": 1})
  )
  assert same and "v" in producers


@pytest.mark.parametrize(
  ("mixer", "more"),
  [
    ("mla", {"q_rank": 12}),
    ("mamba1", {"inner_norm": True}),
    ("deltanet", {"output_gate": True}),
    ("gated_deltanet", {"num_value_heads": 8, "head_dim": 8}),
    ("mamba2", {"num_groups": 2}),
  ],
)
def test_variants_of_mixers(mixer, more):
  assert _moved(_decoder(mixer, mixer_more=more))[0]


def test_lent_values_have_readers_elsewhere():
  same, producers = _moved(_decoder(num_layers=4, share_keys=2))
  assert same and "v" not in producers


def test_rounded_values_are_not_scaled():
  same, producers = _moved(_decoder(mixer_more={"kv_cache": "int8"}))
  assert same and "v" not in producers


def test_layers_that_share_their_parameters():
  assert _moved(_decoder(num_layers=4, share=2))[0]


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"norm": "pre"},
    {"norm": "pre", "num_classes": 3, "mlp": "swiglu"},
    {"embedding_dim": 8},
    {"pattern": ("longformer",), "mixer_options": {"longformer": {"head_dim": 8}}},
  ],
)
def test_encoders(changes):
  same, producers = _moved(_encoder(**changes))
  assert same
  assert ("mixer_norm" in producers) == (changes.get("norm") == "pre")


def test_single_layers_equal_stacked_ones():
  model = _decoder(num_layers=2, mlp="moe")
  params, _ = _init(model)
  tree = specs.specs(model)
  pairs = _pairs.find(params, tree, frozenset(tree_lib.flatten(tree)))
  factors = _random_factors(pairs, params)
  stacked = layers.unstack(model, _pairs.apply(params, pairs, factors))[1]
  unrolled, flat = layers.unstack(model, params)
  alone = specs.specs(unrolled)
  single = _pairs.find(flat, alone, frozenset(tree_lib.flatten(alone)))
  assert len(single) == 2 * len(pairs) - 1  # the final norm is in no layer
  of_layers = layers.unstack(model, tree_lib.unflatten(factors))[1]
  got = _pairs.apply(flat, single, tree_lib.flatten(of_layers))
  jax.tree.map(np.testing.assert_array_equal, got, stacked)


def test_expand_and_gather_know_the_heads_of_groups():
  reader = _pairs.Reader("o", repeats=3, head_dim=2, experts=False)
  channels = jnp.arange(4.0)  # two heads of two
  inputs = reader.expand(channels)
  h, k = np.divmod(np.arange(12), 2)
  np.testing.assert_array_equal(inputs, (h // 3) * 2 + k)
  np.testing.assert_array_equal(reader.gather(inputs), channels)
  added = reader.gather(jnp.arange(12.0), jnp.sum)
  np.testing.assert_array_equal(added, [0 + 2 + 4, 1 + 3 + 5, 6 + 8 + 10, 7 + 9 + 11])


def test_unselected_readers_are_scaled_too_and_unselected_pairs_are_not():
  model = _decoder()
  params, _ = _init(model)
  tree = specs.specs(model)
  pairs = _pairs.find(params, tree, frozenset({"run_0/layer_0/mixer/q"}))
  assert [pair.producer for pair in pairs] == ["run_0/layer_0/mixer_norm"]
  names = {reader.path.rpartition("/")[2] for reader in pairs[0].readers}
  assert names == {"q", "k", "v"}
  short = pairs[0].within("run_0/layer_0/")
  assert short.producer == "mixer_norm" and short.scaled == ("mixer_norm/scale",)


def test_a_quantized_reader_stops_its_pair_and_a_masked_one_does_not(caplog):
  model = _decoder()
  params, tokens_BL = _init(model)
  tree = specs.specs(model)
  everything = frozenset(tree_lib.flatten(tree))
  where = {"path": "mlp/gate"}
  half = rtn.TECHNIQUE(params, tree, where=where)
  producers = {pair.producer for pair in _pairs.find(half, tree, everything)}
  assert "run_0/layer_0/mlp_norm" not in producers
  assert "run_0/layer_0/mlp/up" in producers
  assert "mlp/gate is a quantized leaf" in caplog.text
  flat = tree_lib.flatten(params)
  path = "run_0/layer_0/mlp/gate"
  flat[path] = masked.Masked.create(flat[path], flat[path] > 0)
  sparse = tree_lib.unflatten(flat)
  pairs = _pairs.find(sparse, tree, everything)
  changed = _pairs.apply(sparse, pairs, _random_factors(pairs, params))
  apply = jax.jit(model.apply)
  logits, got = (apply({"params": p}, tokens_BL)[0] for p in (sparse, changed))
  np.testing.assert_allclose(got, logits, atol=1e-4)
  assert tree_lib.flatten(changed)[path].kind == "masked"
