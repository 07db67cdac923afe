import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from effjax.core import tree as tree_lib
from effjax.measure import bytes as bytes_lib
from effjax.weights.leaves import masked, quantized


def _plain(rng):
  return jnp.asarray(rng.normal(size=(3, 8, 12)), jnp.float32), 3 * 8 * 12 * 4


def _half(rng):
  return jnp.asarray(rng.normal(size=(8, 12)), jnp.bfloat16), 8 * 12 * 2


def _int8(rng):
  codes = jnp.asarray(rng.integers(-127, 128, (8, 12)), jnp.int8)
  leaf = quantized.Quantized.create(codes, jnp.ones((1, 12)), bits=8)
  return leaf, 8 * 12 + 12 * 4


def _int4(rng):
  codes = jnp.asarray(rng.integers(0, 16, (3, 8, 12)), jnp.uint8)
  scale, zero = jnp.ones((3, 2, 12), jnp.bfloat16), jnp.ones((3, 2, 12), jnp.uint8)
  leaf = quantized.Quantized.create(codes, scale, zero, bits=4)
  return leaf, 3 * 8 * 12 // 2 + 3 * 2 * 12 * 3


def _masked(rng):
  mask = jnp.asarray(rng.random((8, 12)) < 0.5)
  return masked.Masked.create(jnp.ones((8, 12)), mask), 8 * 12 * 4 + 8 * 2


def _masked_int4(rng):
  codes = jnp.asarray(rng.integers(-7, 8, (8, 12)), jnp.int8)
  values = quantized.Quantized.create(codes, jnp.ones((2, 12)), bits=4)
  mask = jnp.asarray(rng.random((8, 12)) < 0.5)
  return masked.Masked.create(values, mask), 8 * 12 // 2 + 2 * 12 * 4 + 8 * 2


MAKERS = [_plain, _half, _int8, _int4, _masked, _masked_int4]


@pytest.mark.parametrize("make", MAKERS)
def test_held_bytes_are_those_of_the_arrays(make):
  leaf, expected = make(np.random.default_rng(0))
  params = {"layer_0": {"up": leaf}}
  assert bytes_lib.held_bytes(params) == expected
  assert expected == sum(a.nbytes for a in jax.tree.leaves(leaf))
  assert bytes_lib.bits_per_weight(params, 96) == 8 * expected / 96


@pytest.mark.parametrize("make", MAKERS)
def test_packed_file_holds_the_same_arrays(make, tmp_path):
  leaf, held = make(np.random.default_rng(0))
  params = {"layer_0": {"up": leaf}, "norm": jnp.ones(5)}
  path = tmp_path / "params.safetensors"
  size = bytes_lib.save_packed(path, params)
  assert size == path.stat().st_size == bytes_lib.bytes_on_disk(params)
  raw = path.read_bytes()
  (header,) = struct.unpack("<Q", raw[:8])
  # Nothing is compressed or left out: header, then the arrays.
  assert size == 8 + header + held + 20
  saved = list(safetensors_numpy.load_file(path).values())
  sort = lambda arrays: sorted(np.asarray(a).tobytes() for a in arrays)
  assert sort(saved) == sort(jax.tree.leaves(params))


def test_packed_file_describes_its_leaves_and_is_reproducible(tmp_path):
  leaf, _ = _masked_int4(np.random.default_rng(0))
  params = {"layer_0": {"up": leaf}, "norm": jnp.ones(5)}
  a, b = tmp_path / "a", tmp_path / "b"
  bytes_lib.save_packed(a, params)
  bytes_lib.save_packed(b, params)
  assert a.read_bytes() == b.read_bytes()
  raw = a.read_bytes()
  header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
  kinds = json.loads(header.pop("__metadata__")["effjax"])
  assert set(header) == {
    "layer_0/up.values.codes",
    "layer_0/up.values.scale",
    "layer_0/up.mask_bits",
    "norm",
  }
  assert kinds["layer_0/up"]["kind"] == "masked"
  assert kinds["layer_0/up"]["inner"]["values"]["static"]["bits"] == 4


def test_counts_equal_numpy_on_the_dense_weights():
  rng = np.random.default_rng(0)
  flat = {f"w{i}": make(rng)[0] for i, make in enumerate(MAKERS)}
  dense = [np.asarray(x.dense() if hasattr(x, "dense") else x) for x in flat.values()]
  params = tree_lib.unflatten(flat)
  assert bytes_lib.num_params(params) == sum(d.size for d in dense)
  nonzero = sum(np.count_nonzero(d.astype(np.float32)) for d in dense)
  assert bytes_lib.num_nonzero(params) == nonzero < bytes_lib.num_params(params)


def test_sharded_arrays_count_once():
  mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  for spec in (jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    params = {"w": jax.device_put(jnp.ones((8, 3)), sharding)}
    assert bytes_lib.held_bytes(params) == 8 * 3 * 4
