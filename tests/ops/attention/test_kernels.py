"""Kernels of accelerators: interpreted here, and lowered for where they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo

from effjax.core import shard
from effjax.ops.attention import blockwise, cudnn, patterns, reference, splash
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules


def _inputs(rows, length, heads, groups, head_dim, value_dim=None, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  kv = (rows, length, groups)
  sizes = (
    (rows, length, heads, head_dim),
    (*kv, head_dim),
    (*kv, value_dim or head_dim),
  )
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in sizes]


def _close(a, b, tolerance):
  a, b = np.asarray(a), np.asarray(b)
  assert np.isfinite(a).all()
  assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


SEGMENTS = jnp.asarray(np.repeat([[1, 2, 0]], [60, 70, 20], axis=1), jnp.int32)
CASES = {
  "causal, packed, capped": (
    {"q_segments_BL": SEGMENTS, "logit_cap": 2.0},
    _inputs(1, 150, 4, 2, 16, 24),
  ),
  "window": ({"pattern": patterns.Window(20)}, _inputs(1, 256, 2, 1, 8)),
  "both sides, packed": (
    {"pattern": patterns.Window(20, causal=False), "q_segments_BL": SEGMENTS},
    _inputs(1, 150, 2, 2, 8),
  ),
  "full": ({"pattern": patterns.FULL, "scale": 0.3}, _inputs(2, 128, 2, 1, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_splash_equals_reference_with_gradients(name):
  options, arrays = CASES[name]
  interpreted = functools.partial(splash.attention, interpret=True)

  def run(fn):
    def loss(arrays):
      y = fn(*arrays, **options)
      return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)

  (_, y), grads = run(interpreted)
  (_, expected), expected_grads = run(reference.attention)
  _close(y, expected, 1e-5)
  for a, b in zip(grads, expected_grads, strict=True):
    _close(a, b, 1e-4)


def test_splash_runs_on_the_rows_and_heads_of_each_device():
  arrays = _inputs(4, 128, 4, 2, 8)
  run = jax.jit(functools.partial(splash.attention, interpret=True))
  expected = run(*arrays)
  mesh = mesh_lib.make(mesh_lib.MeshConfig(preset="dp+tp", shape={"tensor": 2}))
  with shard.use_rules(mesh, rules.find("dp+tp").activations):
    split = jax.jit(functools.partial(splash.attention, interpret=True))
    _close(split(*arrays), expected, 1e-5)
    assert "shard_map" in str(jax.make_jaxpr(split)(*arrays))


def test_splash_lowers_for_tpus():
  arrays = _inputs(1, 150, 4, 2, 64, dtype=jnp.bfloat16)
  fn = jax.grad(lambda a: splash.attention(*a).astype(jnp.float32).sum())
  exported = export.export(jax.jit(fn), platforms=["tpu"])(arrays)
  assert exported.mlir_module().count("tpu_custom_call") >= 3


@pytest.fixture
def fake_cuda(monkeypatch):
  """As if there were a CUDA device; what is traced is never run."""
  library = fused_attention_stablehlo
  monkeypatch.setattr(library, "check_cudnn_version", lambda: 91002)
  monkeypatch.setattr(library, "check_compute_capability", lambda version: True)


@pytest.mark.parametrize(
  "pattern", [patterns.FULL, patterns.CAUSAL, patterns.Window(9)]
)
@pytest.mark.parametrize("segments", [False, True])
def test_cudnn_lowers_for_cuda(fake_cuda, pattern, segments):
  arrays = _inputs(2, 64, 4, 2, 64, dtype=jnp.bfloat16)
  ids = jnp.ones((2, 64), jnp.int32) if segments else None

  def loss(arrays, ids):
    y = cudnn.attention(*arrays, pattern=pattern, q_segments_BL=ids)
    return y.astype(jnp.float32).sum()

  lowered = (
    jax.jit(jax.grad(loss)).trace(arrays, ids).lower(lowering_platforms=("cuda",))
  )
  text = lowered.as_text()
  assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
  kind = "CAUSAL" if pattern.causal else "NO_MASK"
  if segments:
    kind = "PADDING_CAUSAL" if pattern.causal else "PADDING"
  assert f"mask_type\\22: \\22{kind}\\22" in text or f'"mask_type": "{kind}"' in text
  window = 9 if isinstance(pattern, patterns.Window) else 0
  assert f"sliding_window_length\\22: {window}" in text
  # Packed rows have a branch of their own.
  assert ("stablehlo.case" in text) == segments


def test_cudnn_sends_packed_rows_to_blockwise(monkeypatch):
  """The condition and the branches, with plain XLA in place of the kernel."""
  calls = []

  def stand_in(q, k, v, *, query_seq_lengths, is_causal, **options):
    del options
    calls.append("traced")
    lengths = query_seq_lengths[:, None] > jnp.arange(q.shape[1])[None]
    y = reference.attention(
      q, k, v, pattern=patterns.CAUSAL, q_segments_BL=lengths.astype(jnp.int32)
    )
    # Marks that it ran, and leaves what it likes at padding.
    return jnp.where(lengths[:, :, None, None], y + 1, jnp.nan)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  arrays = _inputs(2, 12, 2, 1, 8)
  run = jax.jit(
    jax.value_and_grad(
      lambda a, s: _sum_first(cudnn.attention(*a, q_segments_BL=s)), has_aux=True
    )
  )
  exact = jax.jit(
    jax.value_and_grad(
      lambda a, s: _sum_first(blockwise.attention(*a, q_segments_BL=s)), has_aux=True
    )
  )
  packed = jnp.asarray([[1] * 5 + [2] * 7, [1] * 12], jnp.int32)
  alone = jnp.asarray([[1] * 12, [4] * 9 + [0] * 3], jnp.int32)
  for segments, marked in ((packed, False), (alone, True)):
    (_, y), grads = run(arrays, segments)
    (_, expected), expected_grads = exact(arrays, segments)
    shift = (np.asarray(segments) > 0)[:, :, None, None] * float(marked)
    _close(y, np.asarray(expected) + shift, 1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
      _close(a, b, 1e-4)
  assert calls


def _sum_first(y):
  return (y * jnp.sin(jnp.arange(y.size).reshape(y.shape))).sum(), y
