"""Every leaf kind x every verb x every way JAX may run it, against the dense weight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effjax.core import partition, registry, specs
from effjax.ops.matmul import tables
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules, sharding
from effjax.weights import describe, leaf, verbs
from effjax.weights.formats import base as format_base
from effjax.weights.leaves import (
  coded,
  fake_quantized,
  low_rank,
  masked,
  quantized,
  rotated,
  two_level,
)
from tests import selection

IN, OUT, TAPS, EXPERTS, LAYERS = 16, 8, 4, 3, 2


def _codes(key, shape, bits, signed=True):
  top = 2 ** (bits - 1)
  low, high = (-top + 1, top) if signed else (0, 2 * top)
  return jax.random.randint(key, shape, low, high)


def _quantized(key, shape, axis, *, bits=8, groups=1, zero=False, activations="none"):
  keys = jax.random.split(key, 3)
  grid = list(shape)
  grid[axis] = groups
  scale = jax.random.uniform(keys[1], grid, minval=0.01, maxval=0.1)
  zeros = _codes(keys[2], grid, bits, signed=False) if zero else None
  return quantized.Quantized.create(
    _codes(keys[0], shape, bits, signed=not zero),
    scale,
    zeros,
    bits=bits,
    axis=axis,
    activations=activations,
  )


def _static(key, shape, axis, inner):
  """With a static scale of activations: none of these tests goes beyond 4."""
  made = inner(key, shape, axis)
  top = 448 if made.activations == "fp8" else 127
  scale = jnp.full((*shape[:-2], 1, 1), 4 / top, jnp.float32)
  return dataclasses.replace(made, x_scale=scale)


def _masked(key, shape, axis, inner=None):
  values = inner(key, shape, axis) if inner else jax.random.normal(key, shape)
  return masked.Masked.create(values, jax.random.bernoulli(key, 0.5, shape))


def _two_level(key, shape, axis, *, bits=6, signed=False, groups=2):
  grid = list(shape)
  grid[axis] = groups
  scale = jax.random.uniform(key, grid, minval=0.001, maxval=0.002)
  return two_level.TwoLevel.create(
    _codes(key, shape, bits, signed),
    scale.astype(jnp.float16),
    bits=bits,
    signed=signed,
    axis=axis,
  )


def _nested(key, shape, axis, *, bits, groups=4, offset=True, swapped=False):
  """Codes whose scales, and offsets if any, are in two levels."""
  keys = jax.random.split(key, 3)
  if swapped and axis == -2:
    shape, axis = (*shape[:-2], shape[-1], shape[-2]), -1
  else:
    swapped = False
  grid = list(shape)
  grid[axis] = groups
  part = lambda key: _two_level(
    key, grid, axis, bits=6 if offset else 8, signed=not offset
  )
  return quantized.Quantized.create(
    _codes(keys[0], shape, bits, signed=not offset),
    part(keys[1]),
    offset=part(keys[2]) if offset else None,
    bits=bits,
    axis=axis,
    swapped=swapped,
  )


def _coded(
  key,
  shape,
  axis,
  *,
  table="nf4",
  groups=2,
  nested=False,
  offset=False,
  activations="none",
):
  """Codes of a table with scales, plain ones or codes themselves."""
  grid = list(shape)
  grid[axis] = groups
  keys = jax.random.split(key, 3)
  codes = lambda key, shape, top: jax.random.randint(key, shape, 0, top).astype("uint8")
  scale = jax.random.uniform(keys[1], grid, minval=0.1)
  if nested:
    whole = jnp.full((*shape[:-2], 1, 1), 0.01, jnp.float32)
    scale = coded.Coded.create(
      codes(keys[1], grid, 120), whole, table="e4m3", axis=axis
    )
  added = jax.random.normal(keys[2], (*shape[:-2], 1, 1)) if offset else None
  top = 16 if tables.BITS[table] == 4 else 120
  return coded.Coded.create(
    codes(keys[0], shape, top),
    scale,
    added,
    table=table,
    axis=axis,
    activations=activations,
  )


def _offset(key, shape, axis):
  codes, scale = (jax.random.split(key)[i] for i in (0, 1))
  grid = list(shape)
  grid[axis] = 2
  return quantized.Quantized.create(
    _codes(codes, shape, 5, signed=False),
    jax.random.uniform(scale, grid, maxval=0.1).astype(jnp.float16),
    offset=jax.random.normal(scale, grid).astype(jnp.float16),
    bits=5,
    axis=axis,
  )


def _plain(key, shape, axis):
  del axis
  return jax.random.normal(key, shape)


def _low_rank(key, shape, axis, inner=_plain):
  left, right = jax.random.split(key)
  rank = shape[-1] // 2
  return low_rank.LowRank.create(
    inner(left, (*shape[:-1], rank), axis),
    inner(right, (*shape[:-2], rank, shape[-1]), axis),
  )


def _fake(key, shape, axis, *, groups=1, offset=False, **options):
  """On a fitted grid, or with `learned` on a trained one."""
  options["group"] = 0 if groups == 1 else shape[axis] // groups
  grid = list(shape)
  grid[axis] = groups
  parts = {}
  if options.pop("learned", False):
    parts["scale"] = jnp.full(grid, 0.3, jnp.float32)
  if offset:
    parts["offset"] = jnp.full(grid, -1.0, jnp.float32)
  return fake_quantized.FakeQuantized.create(
    jax.random.normal(key, shape),
    format_base.FormatOptions(**options),
    **parts,
    axis=axis,
  )


def _rotated(key, shape, axis, inner=_plain):
  return rotated.Rotated(inner(key, shape, axis), 4)


_int4 = functools.partial(_quantized, bits=4, groups=4)
_int8_dynamic = functools.partial(_quantized, activations="int8")
_fp8_dynamic = functools.partial(_coded, table="e4m3", groups=1, activations="fp8")
KINDS = {
  "plain": _plain,
  "int8": _quantized,
  "int8_dynamic": _int8_dynamic,
  "int8_static": functools.partial(_static, inner=_int8_dynamic),
  "int4_dynamic": functools.partial(_quantized, bits=4, activations="int4"),
  "int8_asymmetric": functools.partial(_quantized, groups=2, zero=True),
  "int4_groups": _int4,
  "int3": functools.partial(_quantized, bits=3),
  "int2_asymmetric": functools.partial(_quantized, bits=2, groups=4, zero=True),
  "int5_offset": _offset,
  "int4_nested": functools.partial(_nested, bits=4),
  "int6_nested_swapped": functools.partial(_nested, bits=6, offset=False, swapped=True),
  "two_level": _two_level,
  "nf4": _coded,
  "nf4_offset": functools.partial(_coded, offset=True, groups=1),
  "e4m3": functools.partial(_coded, table="e4m3", groups=1),
  "fp8_dynamic": _fp8_dynamic,
  "fp8_static": functools.partial(_static, inner=_fp8_dynamic),
  "nvfp4": functools.partial(_coded, table="e2m1", groups=4, nested=True),
  "low_rank": _low_rank,
  "low_rank_int8": functools.partial(_low_rank, inner=_quantized),
  "masked": _masked,
  "masked_int4": functools.partial(_masked, inner=_int4),
  "fake_int4": functools.partial(_fake, bits=4, groups=4),
  "fake_int8_dynamic": functools.partial(_fake, activations="int8"),
  "fake_nf4": functools.partial(_fake, format="nf4", groups=4),
  "fake_lsq": functools.partial(_fake, bits=3, groups=2, learned=True),
  "fake_lsq_plus": functools.partial(
    _fake, bits=4, groups=2, learned=True, offset=True
  ),
  "rotated": _rotated,
  "rotated_int4": functools.partial(_rotated, inner=_int4),
}
# Whatever is a variation of two others is not looked at each time.
_VARIATIONS = (
  "int8_static",
  "int4_dynamic",
  "int2_asymmetric",
  "int6_nested_swapped",
  "nf4_offset",
  "fp8_static",
  "low_rank_int8",
  "masked_int4",
  "fake_int4",
  "fake_nf4",
  "fake_lsq",
  "rotated_int4",
)
_KINDS = selection.quick(KINDS, [kind for kind in KINDS if kind not in _VARIATIONS])
VERBS = ("contract", "transposed", "lookup", "grouped_contract", "conv", "dense")


# Made in one program: one operation at a time compiles tens of them.
_activations = jax.jit(lambda: jax.random.normal(jax.random.key(1), (2, 5, IN)))


def _made(make, key, shape, axis):
  return jax.jit(lambda key: make(key, shape, axis))(key)


def _case(verb, kind):
  """A weight, the function that uses it, and its activations."""
  make = functools.partial(_made, KINDS[kind])
  key = jax.random.key(7)
  x_BLI = _activations()
  match verb:
    case "contract":
      return make(key, (IN, OUT), -2), lambda w, x: verbs.contract(x, w), x_BLI
    case "transposed":
      fn = lambda w, x: verbs.contract(x, w, transpose=True)
      return make(key, (OUT, IN), -1), fn, x_BLI
    case "lookup":
      fn = lambda w, x: verbs.lookup(w, jnp.argmax(x, axis=-1))
      return make(key, (IN, OUT), -1), fn, x_BLI
    case "grouped_contract":
      sizes = jnp.array([4, 0, 6], jnp.int32)
      fn = lambda w, x, sizes=sizes: verbs.grouped_contract(x.reshape(10, IN), w, sizes)
      return make(key, (EXPERTS, IN, OUT), -2), fn, x_BLI
    case "conv":
      return make(key, (TAPS, IN), -2), lambda w, x: verbs.conv(x, w)[0], x_BLI
    case "dense":
      return make(key, (IN, OUT), -2), lambda w, x: verbs.dense(w), x_BLI


# Where activations are rounded; everything else is the same function.
ROUNDED = {
  "int8_dynamic": 2e-2,
  "fake_int8_dynamic": 2e-2,
  "int8_static": 3e-2,
  "int4_dynamic": 0.3,
  "fp8_dynamic": 0.06,
  "fp8_static": 0.06,
}


def _tolerance(name):
  return ROUNDED.get(name, 1e-5)


def _close(a, b, tolerance):
  a, b = np.asarray(a), np.asarray(b)
  limit = tolerance * max(1.0, float(np.max(np.abs(b))))
  assert float(np.max(np.abs(a - b))) <= limit


@pytest.fixture(params=_KINDS)
def kind(request):
  return request.param


def _cases():
  """Every kind with every verb; groups do not divide the few taps of a convolution."""
  for param in _KINDS:
    kind, marks = (
      (param, ()) if isinstance(param, str) else (param.values[0], param.marks)
    )
    for verb in VERBS:
      if verb != "conv" or kind in ("plain", "int8", "masked", "int3"):
        yield pytest.param((kind, verb), marks=marks, id=f"{kind}-{verb}")


@pytest.fixture(params=_cases())
def case(request):
  kind, verb = request.param
  return kind, *_case(verb, kind)


def test_equals_the_dense_weight_and_jit(case):
  name, w, fn, x = case
  dense = verbs.dense(w)
  assert dense.shape == tuple(w.shape) and dense.dtype == w.dtype
  expected = fn(dense, x)
  _close(fn(w, x), expected, _tolerance(name))
  _close(jax.jit(fn)(w, x), fn(w, x), 1e-5)


# A lookup has no gradient to its ids; that of rounded activations is straight through.
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("verb", ["contract", "transposed", "grouped_contract"])
def test_gradient_to_activations(kind, verb):
  w, fn, x = _case(verb, kind)

  @jax.jit
  def gradients(w, x):
    def loss(x, w):
      y = fn(w, x)
      return jnp.sum(y * jax.random.normal(jax.random.key(3), y.shape))

    return jax.grad(loss)(x, w), jax.grad(loss)(x, verbs.dense(w))

  gradient, expected = gradients(w, x)
  assert float(jnp.max(jnp.abs(gradient))) > 0
  _close(gradient, expected, 1e-5)


def test_gradient_to_what_trains(case):
  _, w, fn, x = case
  trainable, frozen = partition.partition({"w": w}, {"w"})
  loss = lambda t: jnp.sum(fn(partition.merge(t, frozen)["w"], x) ** 2)
  grads = jax.device_get(jax.jit(jax.grad(loss))(trainable))
  for g in jax.tree.leaves(grads):
    assert np.all(np.isfinite(g))
  if isinstance(w, jax.Array):
    assert np.max(np.abs(grads["w"])) > 0


def test_scan_and_vmap_over_stacked_leaves(case):
  name, w, fn, x = case

  @jax.jit
  def three_ways(w, x):
    stacked = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), w)
    one = lambda i: jax.tree.map(lambda a: a[i], stacked)
    expected = jnp.stack([fn(one(i), x) for i in range(LAYERS)])
    scanned = jax.lax.scan(lambda c, w: (c, fn(w, x)), 0, stacked)[1]
    # jax.lax.ragged_dot maps over all of its arguments or none, sizes included.
    args = (stacked, *(jnp.stack([a, a]) for a in (x, *(fn.__defaults__ or ()))))
    return stacked, expected, scanned, jax.vmap(fn)(*args)

  stacked, expected, scanned, mapped = three_ways(w, x)
  _close(scanned, expected, 1e-5)
  _close(mapped, expected, max(1e-5, _tolerance(name) / 10))
  assert tuple(stacked.shape) == (LAYERS, *w.shape)


@pytest.mark.parametrize("preset", rules.PRESETS)
def test_eight_devices_equal_one(kind, preset):
  w = _made(KINDS[kind], jax.random.key(0), (64, 32), -2)
  x = jax.random.normal(jax.random.key(1), (8, 64))
  mesh = mesh_lib.make(mesh_lib.MeshConfig(preset=preset))
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=(64, 32))
  table = rules.PRESETS[preset].params
  placed = sharding.tree_shardings(mesh, table, {"w": spec}, {"w": w})["w"]
  w8 = jax.device_put(w, placed)
  if preset != "dp":
    split = [not a.sharding.is_fully_replicated for a in jax.tree.leaves(w8)]
    assert any(split)
  x8 = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
  contract = jax.jit(lambda w, x: verbs.contract(x, w))
  _close(np.asarray(contract(w8, x8)), contract(w, x), 1e-5)


def test_description_restores_the_structure(kind):
  w = _made(KINDS[kind], jax.random.key(0), (IN, OUT), -2)
  target = describe.abstract(describe.describe(w))
  shapes = jax.eval_shape(lambda: w)
  assert jax.tree.structure(target) == jax.tree.structure(shapes)
  assert jax.tree.leaves(target) == jax.tree.leaves(shapes)


def test_bytes_are_those_held(kind):
  w = _made(KINDS[kind], jax.random.key(0), (IN, OUT), -2)
  if isinstance(w, jax.Array):
    assert w.nbytes == 4 * IN * OUT
    return
  assert w.held_bytes() == sum(a.nbytes for a in jax.tree.leaves(w))
  if kind == "int4_groups":
    assert w.held_bytes() == IN * OUT // 2 + 4 * OUT * 4


def test_every_registered_kind_is_tested():
  made = [make(jax.random.key(0), (IN, OUT), -2) for make in KINDS.values()]
  tested = {w.kind for w in made if leaf.is_leaf_kind(w)}
  assert tested == set(registry.names("effjax.weights.leaves"))
