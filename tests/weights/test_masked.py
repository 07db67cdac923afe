"""Masks over values that can hold the zeros themselves."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.weights import verbs
from effjax.weights.leaves import masked, quantized


def _quantized(rng, bits, group, activations="none", zero=False):
  codes = rng.integers(0 if zero else -7, 8, size=(2, 16, 6))
  scale = jnp.asarray(rng.random((2, 16 // group, 6)) + 0.1, jnp.float32)
  zeros = jnp.full(scale.shape, 3.0) if zero else None
  dtype = jnp.uint8 if zero else jnp.int8
  return quantized.Quantized.create(
    jnp.asarray(codes, dtype), scale, zeros, bits=bits, activations=activations
  )


@pytest.mark.parametrize(
  ("bits", "group", "activations"), [(8, 16, "none"), (8, 16, "int8"), (4, 4, "none")]
)
def test_codes_hold_the_zeros(rng, bits, group, activations):
  values = _quantized(rng, bits, group, activations)
  mask = jnp.asarray(rng.random(values.shape) < 0.5)
  leaf = masked.Masked.create(values, mask)
  folded = leaf.folded()
  assert isinstance(folded, quantized.Quantized)
  assert (folded.bits, folded.activations) == (bits, activations)
  np.testing.assert_array_equal(folded.dense(), leaf.dense())
  assert not np.any(np.asarray(folded.dense())[~np.asarray(mask)])


def test_an_array_has_its_zeros_and_other_values_keep_the_mask(rng):
  w = jnp.asarray(rng.standard_normal((4, 6)), jnp.float32)
  leaf = masked.Masked.create(w, w > 0)
  np.testing.assert_array_equal(leaf.folded(), verbs.dense(leaf))
  values = _quantized(rng, 8, 16, zero=True)
  leaf = masked.Masked.create(values, jnp.ones(values.shape, bool))
  assert leaf.folded() is leaf
