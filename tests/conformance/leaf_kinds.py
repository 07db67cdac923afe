"""Makers of a small leaf of every kind: `KINDS[name](key, shape, axis)`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from effjax.ops.matmul import tables
from effjax.weights.formats import base as format_base
from effjax.weights.leaves import (
  adapted,
  block_sparse,
  coded,
  compressed,
  fake_quantized,
  low_rank,
  masked,
  n_of_m,
  quantized,
  rotated,
  two_level,
)


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


def _compressed(key, shape, axis, *, layout="bitmap", inner=None):
  values = inner(key, shape, axis) if inner else jax.random.normal(key, shape)
  mask = jax.random.bernoulli(key, 0.3, shape)
  # A mask that is traced cannot be counted: its lists are long enough for all.
  count = shape[-2] * shape[-1]
  return compressed.Compressed.create(values, mask, layout=layout, count=count)


def _block_sparse(key, shape, axis, inner=None):
  """Blocks of a quarter of the inputs, two in each of eight columns."""
  in_dim, out_dim = (shape[-2], shape[-1])[:: 1 if axis == -2 else -1]
  block = (in_dim // 4, out_dim // 8)
  order = jax.random.uniform(key, (*shape[:-2], 4, 8))
  kept = jnp.argsort(jnp.argsort(order, axis=-2), axis=-2) < 2
  mask = jnp.repeat(jnp.repeat(kept, block[0], axis=-2), block[1], axis=-1)
  mask = jnp.swapaxes(mask, -1, -2) if axis == -1 else mask
  w = jax.random.normal(key, shape)
  leaf = block_sparse.BlockSparse.create(w, mask, block, 2, axis=axis)
  if inner is None:
    return leaf
  return dataclasses.replace(leaf, values=inner(key, leaf.values.shape, -2))


def _n_of_m(key, shape, axis, *, keep=2, of=4, inner=None):
  """With places drawn at random, and values of another kind with `inner`."""
  order = jax.random.uniform(key, shape)
  groups = jnp.moveaxis(order, axis, -1).reshape(-1, of)
  rank = jnp.argsort(jnp.argsort(groups, axis=-1), axis=-1)
  turned = list(shape)
  turned.append(turned.pop(axis))
  mask = jnp.moveaxis((rank < keep).reshape(turned), -1, axis)
  w = jax.random.normal(key, shape)
  leaf = n_of_m.NOfM.create(w, mask, keep=keep, of=of, axis=axis)
  if inner is None:
    return leaf
  return dataclasses.replace(leaf, values=inner(key, leaf.values.shape, axis))


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


def _adapted(key, shape, axis, inner=_plain):
  """With factors that are not zero, and a scale of its own for each of a stack."""
  keys = jax.random.split(key, 4)
  return adapted.Adapted.create(
    inner(keys[0], shape, axis),
    jax.random.normal(keys[1], (*shape[:-1], 3)),
    jax.random.normal(keys[2], (*shape[:-2], 3, shape[-1])),
    jax.random.uniform(keys[3], (*shape[:-2], 1, 1), minval=0.1, maxval=0.5),
  )


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
  "n_of_m": _n_of_m,
  "block_sparse": _block_sparse,
  "block_sparse_int8": functools.partial(_block_sparse, inner=_quantized),
  "compressed": _compressed,
  "compressed_csr": functools.partial(_compressed, layout="csr"),
  "compressed_int4": functools.partial(_compressed, inner=_int4),
  "compressed_nf4_csr": functools.partial(_compressed, layout="csr", inner=_coded),
  "n_of_m_int8": functools.partial(_n_of_m, keep=4, of=8, inner=_quantized),
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
  "adapted": _adapted,
  "adapted_int4": functools.partial(_adapted, inner=_int4),
  "adapted_masked": functools.partial(_adapted, inner=_masked),
  "adapted_n_of_m": functools.partial(_adapted, inner=_n_of_m),
  "adapted_block_sparse": functools.partial(_adapted, inner=_block_sparse),
  "adapted_low_rank": functools.partial(_adapted, inner=_low_rank),
  "masked_adapted": functools.partial(_masked, inner=_adapted),
}
# Whatever is a variation of two others is not looked at each time.
VARIATIONS = (
  "int8_static",
  "int4_dynamic",
  "int2_asymmetric",
  "int6_nested_swapped",
  "nf4_offset",
  "fp8_static",
  "low_rank_int8",
  "masked_int4",
  "block_sparse_int8",
  "compressed_nf4_csr",
  "n_of_m_int8",
  "fake_int4",
  "fake_nf4",
  "fake_lsq",
  "rotated_int4",
  "adapted_masked",
  "adapted_n_of_m",
  "adapted_block_sparse",
  "adapted_low_rank",
)
