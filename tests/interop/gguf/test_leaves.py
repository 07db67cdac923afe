"""GGUF tensors as leaves: the bytes come back, and every verb uses them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry
from effjax.core import errors, partition, specs, tree
from effjax.core import layers as core_layers
from effjax.interop.gguf import blocks, encode, formats, leaves
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.train import stages
from effjax.weights import describe, verbs
from effjax.weights.leaves import masked, quantized, two_level

OUT, IN, EXPERTS = 6, 512, 3
OFFSET = [name for name in leaves.QUANTIZED if formats.TYPES[name].has_mins]
NESTED = [name for name in leaves.QUANTIZED if formats.TYPES[name].sub_block]


def _any_bytes(rng, type, shape):
  return rng.integers(0, 256, formats.raw_shape(formats.TYPES[type], shape), np.uint8)


def _finite_bytes(rng, type, shape):
  """Any codes and sub-scales, and any float16 scales that are finite."""
  held = blocks.fields(_any_bytes(rng, type, shape), type)
  for halves in filter(lambda x: x is not None, (held.scales, held.mins)):
    halves[~np.isfinite(halves)] = 1.5
  return blocks.from_fields(held, type)


def _encoded(rng, type, shape):
  return encode.encode(rng.standard_normal(shape, np.float32) * 0.1, type)


def _random(rng, type, shape=(OUT, IN), *, embedding=False, make=_encoded):
  raw = make(rng, type, shape)
  return raw, leaves.to_leaf(raw, type, shape, embedding=embedding)


def _bits(x):
  return np.asarray(x).view(np.uint32)


def _close(a, b, tolerance=1e-5):
  limit = tolerance * max(1.0, float(jnp.max(jnp.abs(b))))
  assert a.shape == b.shape and float(jnp.max(jnp.abs(a - b))) <= limit


@pytest.mark.parametrize("shape", [(OUT, IN), (2, 3, 256), (1, 256)])
@pytest.mark.parametrize("make", [_any_bytes, _finite_bytes, _encoded])
@pytest.mark.parametrize("type", leaves.QUANTIZED)
def test_bytes_come_back(rng, type, make, shape):
  raw = make(rng, type, shape)
  for embedding in (False, True):
    leaf = leaves.to_leaf(raw.reshape(-1), type, shape, embedding=embedding)
    logical = shape if embedding else (*shape[:-2], shape[-1], shape[-2])
    assert leaf.shape == logical and leaf.dtype == jnp.float32
    assert leaves.type_of(leaf) == type
    back = leaves.to_raw(leaf, type)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, raw)


@pytest.mark.parametrize("type", leaves.QUANTIZED)
def test_a_leaf_takes_the_bytes_of_the_file(rng, type):
  raw, leaf = _random(rng, type)
  assert leaf.held_bytes() == raw.nbytes
  assert 8 * leaf.held_bytes() / (OUT * IN) == formats.TYPES[type].bits_per_weight


@pytest.mark.parametrize("make", [_finite_bytes, _encoded])
@pytest.mark.parametrize("type", leaves.QUANTIZED)
def test_values_are_those_of_the_bytes(rng, type, make):
  raw, matrix = _random(rng, type, (32, IN), make=make)
  _, table = _random(
    np.random.default_rng(0), type, (32, IN), embedding=True, make=make
  )
  expected = blocks.decode(raw, type)
  assert np.isfinite(expected).all()
  np.testing.assert_array_equal(_bits(table.dense()), _bits(expected))
  np.testing.assert_array_equal(_bits(matrix.dense()), _bits(expected.T))
  compiled = np.asarray(jax.jit(verbs.dense)(table))
  if type not in OFFSET:
    np.testing.assert_array_equal(_bits(compiled), _bits(expected))
    return
  # A compiler may round the product and the sum at once: an ulp of the larger term.
  group = table.size // table.num_groups
  offset = np.repeat(np.asarray(verbs.dense(table.offset)), group, axis=-1)
  larger = np.maximum(np.abs(offset), np.abs(expected - offset))
  assert np.all(np.abs(compiled - expected) <= np.spacing(larger))


@pytest.mark.parametrize("type", leaves.QUANTIZED)
def test_verbs_and_gradients_are_those_of_the_dense_matrix(rng, type):
  _, matrix = _random(rng, type)
  _, table = _random(rng, type, embedding=True)
  _, experts = _random(rng, type, (EXPERTS, OUT, IN))
  x_TD = jnp.asarray(rng.standard_normal((5, IN)), jnp.float32)
  sizes = jnp.array([3, 0, 2], jnp.int32)
  ids = jnp.array([[0, 5], [2, 2]])
  probe = jnp.asarray(rng.standard_normal((5, OUT)), jnp.float32)
  cases = (
    (matrix, verbs.contract),
    (table, lambda x, w: verbs.contract(x, w, transpose=True)),
    (experts, lambda x, w: verbs.grouped_contract(x, w, sizes)),
  )
  for leaf, verb in cases:
    loss = lambda x, w, verb=verb: jnp.sum(verb(x, w) * probe)
    both = jax.jit(lambda x, w, f=verb, loss=loss: (f(x, w), jax.grad(loss)(x, w)))
    y, dx = both(x_TD, leaf)
    dense = leaf.dense()
    _close(y, verb(x_TD, dense))
    _close(verb(x_TD, leaf), verb(x_TD, dense))
    _close(dx, jax.grad(loss)(x_TD, dense))
    assert float(jnp.max(jnp.abs(dx))) > 0
  rows = verbs.lookup(table, ids)
  np.testing.assert_array_equal(rows, table.dense()[ids])
  _close(jax.jit(verbs.lookup)(table, ids), rows)


@pytest.fixture(scope="module", params=[0, 1])
def model_and_params(request):
  """A scanned decoder whose matrices and table are of half of the types by turns."""
  types = leaves.QUANTIZED[request.param :: 2]
  config = model_config.DecoderConfig(
    vocab_size=64,
    embed_dim=256,
    num_layers=2,
    pattern=("attention",),
    mlp_options={"swiglu": {"hidden_dim": 256}},
  )
  model = decoder.Decoder(config)
  tree_specs = specs.specs(model)
  rng = np.random.default_rng(0)
  flat, raws, taken = {}, {}, itertools.cycle(types)
  for path, spec in tree.flatten(tree_specs).items():
    values = rng.standard_normal(spec.shape, np.float32) * 0.05
    if spec.kind not in ("matrix", "embedding"):
      flat[path] = jnp.asarray(1 + values)
      continue
    is_table = spec.kind == "embedding"
    values = values if is_table else np.swapaxes(values, -1, -2)
    type = next(taken)
    raw = encode.encode(np.ascontiguousarray(values), type)
    raws[path] = (type, raw)
    flat[path] = leaves.to_leaf(raw, type, values.shape, embedding=is_table)
  assert {type for type, _ in raws.values()} == set(types)
  return model, tree_specs, tree.unflatten(flat), raws


def test_a_scanned_model_runs_on_them(model_and_params):
  model, _, params, _ = model_and_params
  assert any(leaf.ndim == 3 for leaf in jax.tree.leaves(params))
  dense = tree.map_leaves(lambda _, leaf: verbs.dense(leaf), params)
  tokens = jnp.arange(10).reshape(2, 5)
  logits = lambda model: jax.jit(lambda p: model.apply({"params": p}, tokens)[0])
  expected = logits(model)(dense)
  _close(logits(model)(params), expected, 1e-4)
  unrolled, layers = core_layers.unstack(model, params)
  _close(logits(unrolled)(layers), expected, 1e-4)
  _, again = core_layers.restack(unrolled, layers)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(a, b)


def test_nothing_of_them_trains(model_and_params):
  _, _, params, raws = model_and_params
  trainable, frozen = partition.partition(params, set(tree.flatten(params)))
  flat = tree.flatten(trainable)
  assert {path for path, leaf in flat.items() if leaf is None} == set(raws)
  merged = partition.merge(trainable, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_a_stage_folder_keeps_the_bytes(model_and_params, tmp_path):
  model, tree_specs, params, raws = model_and_params
  stages.save_stage(tmp_path / "0-import", model, params, tree_specs)
  loaded = tree.flatten(stages.load_stage(tmp_path / "0-import").params)
  for path, (type, raw) in raws.items():
    assert leaves.type_of(loaded[path]) == type
    np.testing.assert_array_equal(leaves.to_raw(loaded[path], type), raw)


@pytest.mark.parametrize(
  ("options", "type"),
  [
    ({"bits": 8}, "Q8_0"),
    ({"bits": 4}, "Q4_0"),
    ({"bits": 4, "grid": "wide"}, "Q4_0"),
    ({"bits": 5}, "Q5_0"),
    ({"bits": 6}, None),
    ({"bits": 4, "group": 64}, None),
    ({"bits": 4, "symmetric": False}, None),
    ({"bits": 4, "scale_dtype": "bfloat16"}, None),
    ({"bits": 4, "scale_dtype": "float32"}, None),
  ],
)
def test_what_was_rounded_elsewhere_is_held_where_it_fits(rng, options, type):
  shape = {"w": (2, 64, OUT), "table": (20, 64)}
  params = {
    name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shape.items()
  }
  kinds = {"w": "matrix", "table": "embedding"}
  axes = {"w": ("embed", "mlp"), "table": ("vocab", "embed")}
  tree_specs = {n: specs.ParamSpec(axes=axes[n], kind=kinds[n]) for n in params}
  options = {"group": 32, "scale_dtype": "float16"} | options
  where = {"kind": ("matrix", "embedding")}
  out = registry.find("rtn")(params, tree_specs, where=where, options=options)
  for name, leaf in out.items():
    assert leaves.type_of(leaf) == type
    if type is None:
      continue
    decoded = blocks.decode(leaves.to_raw(leaf, type), type)
    decoded = decoded if name == "table" else np.swapaxes(decoded, -1, -2)
    np.testing.assert_array_equal(decoded, leaf.dense())


@pytest.mark.parametrize("type", NESTED)
def test_a_matrix_held_the_other_way_round(rng, type):
  raw = _any_bytes(rng, type, (OUT, IN))
  held = blocks.fields(raw, type)
  turned = lambda x: jnp.asarray(np.ascontiguousarray(x.T))
  bits = {"Q2_K": 4, "Q6_K": 8}.get(type, 6)
  pair = lambda codes, halves: two_level.TwoLevel.create(
    turned(codes), turned(halves), bits=bits, signed=type not in OFFSET, axis=-2
  )
  leaf = quantized.Quantized.create(
    turned(held.codes),
    pair(held.sub_scales, held.scales),
    offset=pair(held.sub_mins, -held.mins) if type in OFFSET else None,
    bits=formats.TYPES[type].code_bits,
  )
  assert leaf.shape == (IN, OUT) and leaves.type_of(leaf) == type
  np.testing.assert_array_equal(leaves.to_raw(leaf, type), raw)


def test_all_int8_codes_are_held():
  codes = jnp.arange(-128, 128, dtype=jnp.int8).reshape(4, 64)
  leaf = quantized.Quantized.create(
    codes, jnp.ones((4, 2), jnp.float16), bits=8, axis=-1
  )
  decoded = blocks.decode(leaves.to_raw(leaf, "Q8_0"), "Q8_0")
  np.testing.assert_array_equal(decoded, codes)


def test_a_type_is_known_from_shapes_alone(rng):
  for type in leaves.QUANTIZED:
    _, leaf = _random(rng, type)
    shapes = describe.abstract(describe.describe(leaf))
    assert leaves.type_of(shapes) == type


def test_other_leaves_have_no_type(rng):
  _, leaf = _random(rng, "Q4_K")
  assert leaves.type_of(jnp.ones((2, 32))) is None
  assert leaves.type_of(None) is None
  mask = jnp.ones(leaf.shape, bool)
  assert leaves.type_of(masked.Masked.create(leaf, mask)) is None
  plain = leaf.offset.dense().astype(jnp.float16)
  replace = lambda **parts: dataclasses.replace(leaf, **parts)
  assert leaves.type_of(replace(offset=plain)) is None
  assert leaves.type_of(replace(offset=None)) is None
  wide = leaf.scale.scale.astype(jnp.float32)
  scale = dataclasses.replace(leaf.scale, scale=wide)
  assert leaves.type_of(replace(scale=scale)) is None


def test_refuses_with_one_line(rng):
  raw, leaf = _random(rng, "Q4_K")

  def refused(message, fn, *args, **kwargs):
    with pytest.raises(errors.InputError, match=message) as caught:
      fn(*args, **kwargs)
    return "\n" not in str(caught.value)

  convert = lambda raw, type, shape: leaves.to_leaf(raw, type, shape, embedding=False)
  assert refused("'Q4_k'; did you mean 'Q4_K'", convert, raw, "Q4_k", (OUT, IN))
  assert refused("F32", convert, raw, "F32", (OUT, IN))
  assert refused("no matrix", convert, raw, "Q4_K", (OUT * IN,))
  assert refused("takes 288 bytes", convert, raw, "Q4_K", (1, IN))
  assert refused("in uint8", convert, raw.view(np.int8), "Q4_K", (OUT, IN))
  assert refused("not whole blocks", convert, raw, "Q4_K", (IN, OUT))
  assert refused("Q4_0 does not hold .* it is Q4_K", leaves.to_raw, leaf, "Q4_0")
  plain = quantized.Quantized.create(
    jnp.ones((2, 64), jnp.int8), jnp.ones((2, 2)), bits=4, axis=-1
  )
  assert refused("no GGUF type does", leaves.to_raw, plain, "Q4_0")
