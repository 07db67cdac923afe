"""The native integer product: exact, built once, and left out where it must not be."""

import functools
import logging
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.ops import flops
from effjax.ops.matmul import activations, int8, native

_dot = jax.jit(lambda x, w: int8.int8_dot(x, w, out_first=True))
_X = jax.ShapeDtypeStruct((3, 40), jnp.int8)
_W = jax.ShapeDtypeStruct((6, 40), jnp.int8)
# A product large enough for XLA's threads to share it, twenty times.
_CHILD = """
import numpy as np
from effjax.ops.matmul import activations, int8, native
rng = np.random.default_rng(0)
x, w = (rng.integers(-128, 128, (n, 1024)).astype(np.int8) for n in (18, 1001))
expected = x.astype(np.int64) @ w.T.astype(np.int64)
for _ in range(20):
  y = int8.int8_dot(x.reshape(2, 9, -1), w, out_first=True)
  np.testing.assert_array_equal(y.reshape(18, -1), expected)
print(native.status().available, native.status().reason)
"""


@pytest.fixture(scope="module", autouse=True)
def kernel():
  """Skips, saying why, where the kernel cannot be built."""
  status = native.status()
  if not status.available:
    pytest.skip(f"no native kernel here: {status.reason}")


@pytest.fixture(scope="module")
def plain(kernel):
  """The kernel outside of XLA, where a new shape compiles nothing."""
  library = native._library(native._built())
  return lambda x, w: native._plain(library, x, w)


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
  """A process that has not looked for the kernel yet, with an empty cache."""
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path))
  fresh = functools.cache(native._loaded.__wrapped__)
  monkeypatch.setattr(native, "_loaded", fresh)
  return tmp_path


def _fresh():
  """A new function, so that nothing compiled before is found again."""
  return jax.jit(lambda x, w: int8.int8_dot(x, w, out_first=True))


def _codes(rng, *shape):
  return rng.integers(-128, 128, shape).astype(np.int8)


def _exact(x, w):
  return np.asarray(x, np.int64) @ np.asarray(w, np.int64).T


def _calls_kernel(lowered) -> bool:
  return native.TARGET in lowered.as_text()


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 70])
@pytest.mark.parametrize(("depth", "outs"), [(32, 1), (33, 5), (1376, 7), (64, 600)])
def test_equals_exact_integers(rng, rows, depth, outs):
  x, w = _codes(rng, rows, depth), _codes(rng, outs, depth)
  y = _dot(x, w)
  assert y.dtype == jnp.int32
  np.testing.assert_array_equal(y, _exact(x, w))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
  rows=st.integers(1, 20),
  outs=st.integers(1, 20),
  depth=st.integers(1, 150),
  values=st.sampled_from([(-128, 128), (127, 128), (-127, -126), (-128, -127)]),
  seed=st.integers(0, 2**20),
)
def test_equals_exact_integers_at_any_shape(plain, rows, outs, depth, values, seed):
  rng = np.random.default_rng(seed)
  x, w = (rng.integers(*values, (n, depth)).astype(np.int8) for n in (rows, outs))
  np.testing.assert_array_equal(plain(x, w), _exact(x, w))


@pytest.mark.parametrize("code", [-128, -127, 127])
def test_the_longest_sums_are_exact(plain, code):
  depth = int8.MAX_IN_DIM - 2500  # (-128)^2 is a little more than 127^2
  x = np.full((2, depth), code, np.int8)
  np.testing.assert_array_equal(plain(x, x), np.full((2, 2), code**2 * depth))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty_products(shape):
  y = _dot(np.zeros(shape, np.int8), np.zeros((4, shape[-1]), np.int8))
  np.testing.assert_array_equal(y, np.zeros((*shape[:-1], 4)))


def test_equals_xla_bit_by_bit(rng, monkeypatch):
  x, w = _codes(rng, 5, 100), _codes(rng, 30, 100)
  scale = rng.random((1, 30)).astype(np.float32)
  args = (x.astype(np.float32), w, scale)
  make = lambda: jax.jit(lambda *a: activations.contract(*a, out_first=True))
  here = make().lower(*args)
  monkeypatch.setenv(native.SWITCH, "0")
  there = make().lower(*args)
  assert _calls_kernel(here) and not _calls_kernel(there)
  np.testing.assert_array_equal(here.compile()(*args), there.compile()(*args))


@pytest.mark.parametrize("rows", [(1,), (8, 1)])
def test_the_kernel_is_given_the_weight_as_it_lies(rows):
  x = jax.ShapeDtypeStruct((*rows, 256), jnp.float32)
  w = jax.ShapeDtypeStruct((512, 256), jnp.int8)
  scale = jax.ShapeDtypeStruct((1, 512), jnp.float32)
  fn = lambda *a: activations.contract(*a, out_first=True)
  compiled = jax.jit(fn).lower(x, w, scale).compile()
  (call,) = [x for x in compiled.as_text().splitlines() if native.SCALED_TARGET in x]
  assert f"f32[{','.join(map(str, rows))},512]" in call
  # No copy of the weight, of any type.
  assert compiled.memory_analysis().temp_size_in_bytes < 512 * 256


@pytest.mark.parametrize("shape", [(1, 40), (2, 9, 33), (70, 64)])
def test_scales_give_the_bits_of_scaling_afterwards(rng, shape):
  x, w = _codes(rng, *shape), _codes(rng, 37, shape[-1])
  of_rows = rng.random((*shape[:-1], 1), np.float32)
  of_w = rng.random((*(1 for _ in shape[1:]), 37), np.float32)
  scaled = jax.jit(lambda *a: int8.int8_dot(a[0], a[1], a[2:], out_first=True))
  static = np.full((1,) * len(shape), 0.3, np.float32)
  for of_x in (of_rows, static):
    expected = _exact(x, w).astype(np.int32).astype(np.float32) * of_x * of_w
    np.testing.assert_array_equal(scaled(x, w, of_x, of_w), expected)
  assert native.SCALED_TARGET in scaled.lower(x, w, of_x, of_w).as_text()


def test_vmap_with_scales(rng):
  x, w = _codes(rng, 4, 2, 33), _codes(rng, 4, 5, 33)
  of_x, of_w = (rng.random(n, np.float32) for n in ((4, 2, 1), (4, 1, 5)))
  scaled = jax.jit(lambda *a: int8.int8_dot(a[0], a[1], a[2:], out_first=True))
  for axes in ((0, None, 0, None), (0, 0, 0, 0), (None, 0, None, 0), (0, None, 0, 0)):
    parts = [
      part if axis == 0 else part[0]
      for part, axis in zip((x, w, of_x, of_w), axes, strict=True)
    ]
    mapped = jax.jit(jax.vmap(scaled, axes))
    every = [
      part if axis == 0 else np.stack([part] * 4)
      for part, axis in zip(parts, axes, strict=True)
    ]
    one_by_one = [scaled(*each) for each in zip(*every, strict=True)]
    np.testing.assert_array_equal(mapped(*parts), one_by_one)
    # One weight: the kernel, for all rows at once.
    assert _calls_kernel(mapped.lower(*parts)) == (axes[1] is axes[3] is None)


def test_vmap(rng):
  x, w = _codes(rng, 4, 2, 33), _codes(rng, 4, 5, 33)
  expected = np.einsum("bij,bkj->bik", x.astype(np.int64), w.astype(np.int64))
  both = jax.vmap(_dot)
  np.testing.assert_array_equal(both(x, w), expected)
  np.testing.assert_array_equal(jax.vmap(_dot, (None, 0))(x[0], w), x[0] @ _t(w))
  moved = jax.vmap(_dot, (1, None), 1)
  np.testing.assert_array_equal(moved(np.swapaxes(x, 0, 1), w[0]), _rows(x, w[0]))
  assert _calls_kernel(jax.jit(moved).lower(np.swapaxes(x, 0, 1), w[0]))
  assert not _calls_kernel(jax.jit(both).lower(x, w))


def _t(w):
  return np.swapaxes(w, -1, -2).astype(np.int64)


def _rows(x, w):
  return np.swapaxes(_exact(x, w), 0, 1)


def test_only_one_cpu_device_runs_the_kernel():
  """A foreign call cannot be partitioned, exported or run elsewhere."""
  assert _calls_kernel(_fresh().lower(_X, _W))
  mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
  over = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  sharded = jax.ShapeDtypeStruct(_W.shape, _W.dtype, sharding=over("tensor"))
  assert not _calls_kernel(_fresh().lower(_X, sharded))
  exported = export.export(_fresh(), platforms=["cpu", "tpu"])(_X, _W)
  assert "custom_call" not in exported.mlir_module()
  assert "dot_general" in exported.mlir_module()
  for_tpu = _fresh().trace(_X, _W).lower(lowering_platforms=("tpu",))
  assert not _calls_kernel(for_tpu) and "dot_general" in for_tpu.as_text()


def test_sharded_weights_and_shard_map_are_exact(rng):
  x, w = _codes(rng, 3, 40), _codes(rng, 6, 40)
  mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
  split = NamedSharding(mesh, PartitionSpec("tensor"))
  placed = jax.device_put(w, split)
  np.testing.assert_array_equal(_dot(x, placed), _exact(x, w))
  eagerly = int8.int8_dot(jnp.asarray(x), placed, out_first=True)
  np.testing.assert_array_equal(eagerly, _exact(x, w))
  spec = PartitionSpec("tensor")
  each = jax.shard_map(
    lambda x, w: int8.int8_dot(x, w, out_first=True),
    mesh=mesh,
    in_specs=(PartitionSpec(), spec),
    out_specs=PartitionSpec(None, "tensor"),
  )
  np.testing.assert_array_equal(jax.jit(each)(x, w), _exact(x, w))


def test_counts_flops_and_is_compiled_inside_loops():
  fn = lambda x, w: jax.lax.scan(lambda c, _: (c + _dot(x, w), None), 0 * _y(), None, 3)
  _y = lambda: jnp.zeros((3, 6), jnp.int32)
  assert flops.dot_flops(fn, _X, _W) == 3 * 2 * 3 * 40 * 6
  assert flops.per_parameter(lambda p, x: _dot(x, p["w"]), {"w": _W}, _X) == {
    "w": 2 * 3 * 40 * 6,
    "": 0,
  }
  assert _calls_kernel(jax.jit(fn).lower(_X, _W))


def test_the_switch_turns_it_off(monkeypatch):
  monkeypatch.setenv(native.SWITCH, "0")
  assert native.status() == native.Status(False, "EFFJAX_NATIVE=0")
  assert not _calls_kernel(_fresh().lower(_X, _W))


@pytest.mark.parametrize(
  ("script", "reason"),
  [
    (None, "is not a program"),
    ("echo 'x.cc:1: error: no such thing' >&2; exit 1", "error: no such thing"),
    ("exit 0", "No such file"),
  ],
)
def test_a_broken_compiler_is_reported_once(
  rng, monkeypatch, caplog, unloaded, script, reason
):
  compiler = unloaded / "compiler"
  if script:
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setenv("CXX", str(compiler))
  x, w = _codes(rng, 2, 9), _codes(rng, 3, 9)
  with caplog.at_level(logging.INFO, logger=native.__name__):
    for _ in range(2):
      np.testing.assert_array_equal(_fresh()(x, w), _exact(x, w))
  (record,) = caplog.records
  assert record.levelno == logging.WARNING and "use XLA" in record.message
  status = native.status()
  assert not status.available and "\n" not in status.reason
  assert re.search(reason, status.reason)
  assert not list(unloaded.glob("native/.build.*"))


def test_a_library_that_is_wrong_is_refused(unloaded, monkeypatch):
  source = native.SOURCE.read_text()
  shutil.copy(native.SOURCE.with_name("int8_isa.h"), unloaded)
  broken = unloaded / "broken.cc"
  broken.write_text(source.replace("+ f + c] = ", "+ f + c] = 1 + "))
  assert broken.read_text() != source
  monkeypatch.setattr(native, "SOURCE", broken)
  status = native.status()
  assert not status.available and "does not compute exact products" in status.reason


@pytest.mark.slow
def test_without_flags_for_this_cpu_the_portable_loop_is_exact(unloaded, monkeypatch):
  monkeypatch.setattr(native, "_CPU_FLAGS", ((),))
  path = native._built()
  native._check(path, native._library(path))  # raises if a product is not exact


@pytest.mark.slow
def test_the_form_for_avx512_is_exact_where_its_instructions_are_emulated(
  unloaded, monkeypatch
):
  header = pathlib.Path(__file__).with_name("emulated_avx512.h")
  flags = ("-march=haswell", "-include", str(header))
  try:
    native._cpu("c++")
    monkeypatch.setattr(native, "_CPU_FLAGS", (flags,))
    path = native._built()
  except native._UnavailableError as error:
    pytest.skip(f"no AVX2 here: {error}")
  assert b"dpbusd_emulated" in path.read_bytes()
  native._check(path, native._library(path))


def test_processes_that_build_at_once_and_a_process_without(tmp_path, subprocess_env):
  env = subprocess_env | {"EFFJAX_CACHE": str(tmp_path), "NPROC": "3"}
  run = lambda env: subprocess.Popen(
    [sys.executable, "-c", _CHILD],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  builders = [run(env), run(env)]
  without = run(env | {"PATH": "/nonexistent", "CXX": ""})
  for process in builders:
    out, err = process.communicate()
    assert process.returncode == 0 and out.startswith("True"), err
  (library,) = pathlib.Path(tmp_path, "native").iterdir()
  assert library.suffix == ".so"
  out, err = without.communicate()
  assert without.returncode == 0 and "False no C++ compiler" in out, err
  assert "int8 products use XLA, not the native kernel: no C++ compiler" in err


def test_importing_builds_nothing(tmp_path, subprocess_env):
  env = subprocess_env | {"EFFJAX_CACHE": str(tmp_path), "CXX": os.devnull}
  code = "import effjax.ops.matmul.int8, effjax.weights.leaves.quantized"
  subprocess.run([sys.executable, "-c", code], env=env, check=True)
  assert not list(tmp_path.iterdir())
