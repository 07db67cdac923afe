"""Adapters put in place, and merged into every kind of weight they can stand beside."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import api as compress
from effjax.compress import registry as transforms
from effjax.core import errors, specs
from effjax.core import tree as tree_lib
from effjax.interop import assemble
from effjax.models import decoder
from effjax.weights import verbs
from effjax.weights.leaves import (
  adapted,
  block_sparse,
  compressed,
  low_rank,
  masked,
  n_of_m,
  quantized,
  rotated,
)
from tests.models.conftest import small_config

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=(32, 16))
EMBEDDING = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding", shape=(32, 16))
NORM = specs.ParamSpec(axes=("embed",), kind="norm", shape=(32,))
BLOCKS = {"pattern": "8x4", "within": "output", "budget": "uniform", "packed": True}
# What prunes a matrix to each of the sparse kinds.
PRUNED = {
  masked.Masked: ("magnitude", {"sparsity": 0.7}),
  n_of_m.NOfM: ("magnitude", {"pattern": "2:4", "packed": True}),
  block_sparse.BlockSparse: ("magnitude", BLOCKS),
  compressed.Compressed: ("magnitude", {"sparsity": 0.7}),
}


def _apply(name, leaf, spec=MATRIX, **options):
  where = {"kind": (spec.kind,)}
  return transforms.find(name)({"w": leaf}, {"w": spec}, where=where, options=options)[
    "w"
  ]


def _pruned(kind, w, spec=MATRIX):
  """A leaf of a sparse kind."""
  name, options = PRUNED[kind]
  leaf = _apply(name, w, spec, **options)
  return _apply("pack", leaf, spec) if kind is compressed.Compressed else leaf


def _trained(leaf):
  """The leaf with numbers in the factor that starts at zero."""
  if isinstance(leaf, masked.Masked):
    return dataclasses.replace(leaf, values=_trained(leaf.values))
  draw = lambda a: a + 0.3 * jax.random.normal(jax.random.key(5), a.shape)
  return dataclasses.replace(leaf, down=draw(leaf.down), up=draw(leaf.up))


@pytest.fixture
def w(rng):
  return jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)


def test_starts_as_nothing_with_the_scale_of_its_paper(w):
  leaf = _apply("lora", w, rank=4, alpha=6)
  assert leaf.base is w and leaf.rank == 4
  np.testing.assert_array_equal(leaf.dense(), w)
  np.testing.assert_array_equal(leaf.up, 0)
  bound = 32**-0.5
  assert 0.9 * bound < float(jnp.max(jnp.abs(leaf.down))) <= bound
  assert leaf.scale.shape == (1, 1) and float(leaf.scale[0, 0]) == 1.5
  stable = _apply("lora", w, rank=4, alpha=6, rank_stabilized=True)
  assert float(stable.scale[0, 0]) == 3.0


def test_an_embedding_starts_random_on_the_side_of_its_channels(w):
  leaf = _apply("lora", w, EMBEDDING, rank=4)
  np.testing.assert_array_equal(leaf.down, 0)
  bound = 16**-0.5
  assert 0.9 * bound < float(jnp.max(jnp.abs(leaf.up))) <= bound


def test_draws_depend_on_seed_and_path_alone(w):
  find = lambda **kw: transforms.find("lora")(
    {"a": w, "b": w}, {"a": MATRIX, "b": MATRIX}, **kw
  )
  both, again = find(), find(where={"path": "b"})
  np.testing.assert_array_equal(both["b"].down, again["b"].down)
  assert again["a"] is w
  assert float(jnp.max(jnp.abs(both["a"].down - both["b"].down))) > 0
  other = find(options={"seed": 1})
  assert float(jnp.max(jnp.abs(both["a"].down - other["a"].down))) > 0


def test_no_rank_above_the_smaller_side(w):
  leaf = _apply("lora", w, rank=64, alpha=64)
  assert leaf.rank == 16 and float(leaf.scale[0, 0]) == 1.0


def test_a_plain_weight_takes_up_the_sum(w):
  leaf = _trained(_apply("lora", w))
  made = _apply("merge_lora", leaf)
  expected = np.asarray(w) + 2 * np.asarray(leaf.down) @ np.asarray(leaf.up)
  np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [MATRIX, EMBEDDING], ids=["matrix", "embedding"])
@pytest.mark.parametrize("kind", PRUNED)
def test_a_pruned_weight_trains_and_merges_as_the_same_sparse_one(kind, spec, w):
  before = _pruned(kind, w, spec)
  leaf = _apply("lora", before, spec)
  np.testing.assert_array_equal(leaf.dense(), before.dense())
  leaf = _trained(leaf)
  assert float(jnp.max(jnp.abs(leaf.dense() - before.dense()))) > 0.1
  made = _apply("merge_lora", leaf, spec)
  assert isinstance(made, kind)
  assert jax.tree.structure(made) == jax.tree.structure(before)
  assert made.held_bytes() == before.held_bytes()
  np.testing.assert_array_equal(made.mask(), before.mask())
  np.testing.assert_array_equal(made.dense(), leaf.dense())


@pytest.mark.parametrize("kind", PRUNED)
def test_a_dense_addition_gives_up_its_zeros_or_a_part_of_itself(kind, w, caplog):
  before = _pruned(kind, w)
  leaf = _apply("lora", before, keep_zeros=False)
  assert isinstance(leaf, adapted.Adapted) and isinstance(leaf.base, kind)
  leaf = _trained(leaf)
  with caplog.at_level(logging.WARNING):
    cut = _apply("merge_lora", leaf)
  assert "no longer computes" in caplog.text
  assert isinstance(cut, kind)
  expected = np.where(before.mask(), leaf.dense(), 0)
  np.testing.assert_array_equal(cut.dense(), expected)
  caplog.clear()
  whole = _apply("merge_lora", leaf, keep_zeros=False)
  assert not caplog.text
  np.testing.assert_array_equal(whole, leaf.dense())


@pytest.mark.parametrize(
  "options", [{"bits": 4, "group": 8}, {"format": "nf4", "group": 8}]
)
def test_codes_are_not_merged_but_multiplied_out(options, w):
  codes = _apply("rtn", w, **options)
  leaf = _trained(_apply("lora", codes))
  assert leaf.base is codes
  with pytest.raises(errors.InputError, match=r"^w is adapted over codes.*dequantize"):
    _apply("merge_lora", leaf)
  made = _apply("merge_lora", leaf, dequantize=True)
  np.testing.assert_allclose(made, leaf.dense(), atol=1e-6)


def test_codes_under_a_mask_keep_their_zeros_when_multiplied_out(w):
  pruned = _apply("rtn", _apply("magnitude", w, sparsity=0.5), bits=4, group=8)
  leaf = _trained(_apply("lora", pruned))
  assert isinstance(leaf.values.base, quantized.Quantized)
  with pytest.raises(errors.InputError, match="over codes"):
    _apply("merge_lora", leaf)
  made = _apply("merge_lora", leaf, dequantize=True)
  assert isinstance(made, masked.Masked)
  np.testing.assert_array_equal(made.mask(), pruned.mask())
  np.testing.assert_allclose(made.dense(), leaf.dense(), atol=1e-6)


def test_a_product_of_factors_stays_one(w):
  leaf = _trained(_apply("lora", _apply("svd", w, rank=5), rank=3))
  made = _apply("merge_lora", leaf)
  assert isinstance(made, low_rank.LowRank) and made.rank == 8
  np.testing.assert_allclose(made.dense(), leaf.dense(), atol=1e-5)


def test_a_rotated_weight_stays_rotated(w):
  leaf = _trained(_apply("lora", rotated.Rotated.create(w, 8)))
  made = _apply("merge_lora", leaf)
  assert isinstance(made, rotated.Rotated) and made.block == 8
  np.testing.assert_allclose(made.dense(), leaf.dense(), atol=1e-5)


def test_experts_in_stacked_layers_compute_the_same_when_merged():
  options = {"moe": {"num_experts": 3, "hidden_dim": 24}}
  config = small_config(
    num_layers=2, pattern=("attention",), mlp="moe", mlp_options=options
  )
  model = decoder.Decoder(config)
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 8), 0, 64)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  spec_tree = specs.specs(model)
  where = {"kind": ("matrix", "embedding", "router")}
  lora = transforms.find("lora")
  _, made = compress.transform(
    lora, model, params, spec_tree, where=where, options={"rank": 2}
  )
  flat = tree_lib.flatten(made)
  flat = {p: _trained(a) if adapted.is_adapted(a) else a for p, a in flat.items()}
  assert sum(map(adapted.is_adapted, flat.values())) == 9
  run = lambda p: jax.jit(model.apply)({"params": p}, tokens_BL)[0]
  trained = tree_lib.unflatten(flat)
  expected = run(tree_lib.map_leaves(lambda _, leaf: verbs.dense(leaf), trained))
  assert float(jnp.max(jnp.abs(expected - run(params)))) > 0.1
  np.testing.assert_allclose(run(trained), expected, atol=1e-4)
  merged = transforms.find("merge_lora")(trained, spec_tree)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  np.testing.assert_allclose(run(merged), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["rtn", "gptq", "hqq", "qat", "svd", "sparsegpt"])
@pytest.mark.parametrize("kind", ["plain", "pruned"])
def test_what_changes_a_weight_asks_to_merge_first(name, kind, w):
  leaf = w if kind == "plain" else _apply("magnitude", w)
  with pytest.raises(errors.InputError, match=r"^w has adapters.*merge_lora"):
    _apply(name, _apply("lora", leaf))


def test_packing_asks_to_merge_first(w):
  with pytest.raises(errors.InputError, match=r"w has adapters.*packed=True"):
    _apply("magnitude", _apply("lora", w), pattern="2:4", packed=True)


def test_an_adapted_weight_is_pruned_as_the_sum_it_is(w):
  leaf = _trained(_apply("lora", w))
  pruned = _apply("magnitude", leaf, sparsity=0.5)
  expected = _apply("magnitude", leaf.dense(), sparsity=0.5)
  np.testing.assert_array_equal(pruned.dense(), expected.dense())
  np.testing.assert_array_equal(_apply("merge_lora", pruned).dense(), expected.dense())
  for again in (pruned, _apply("lora", expected, keep_zeros=False)):
    with pytest.raises(errors.InputError, match="already pruned"):
      _apply("magnitude", again)


def test_codes_of_fake_quantized_weights_are_found_below_adapters(w):
  fake = _apply("qat", w, bits=4, group=8)
  hard = _apply("harden", _apply("lora", fake))
  assert isinstance(hard, adapted.Adapted)
  assert isinstance(hard.base, quantized.Quantized)


def test_exports_ask_to_merge_first(w):
  for leaf in (_apply("lora", w), _apply("lora", _apply("magnitude", w))):
    leaf = _trained(leaf)
    with pytest.raises(errors.InputError, match=r"^w has adapters, which a file"):
      assemble.require_plain({"w": leaf}, "a file")
    plain = assemble.require_plain({"w": leaf}, "a file", dense=True)
    np.testing.assert_array_equal(plain["w"], leaf.dense())


def test_mistakes_are_named(w):
  with pytest.raises(errors.InputError, match="cannot adapt w of kind 'norm'"):
    _apply("lora", jnp.ones(32), NORM)
  with pytest.raises(errors.InputError, match="already adapted"):
    _apply("lora", _apply("lora", _apply("magnitude", w)))
  with pytest.raises(errors.InputError, match="found no adapted weight"):
    _apply("merge_lora", w)
  for options in ({"rank": 0}, {"alpha": 0.0}, {"seed": -1}):
    with pytest.raises(errors.InputError, match=next(iter(options))):
      _apply("lora", w, **options)
