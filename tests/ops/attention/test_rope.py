"""Rotary positions: equal to HF transformers and to complex rotation."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.attention import rope, rope_scaling


def _inputs(head_dim=16):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 9, 3, head_dim)).astype(np.float32)
  positions = rng.integers(0, 500, (2, 9)).astype(np.int32)
  return x, positions


def test_equals_complex_rotation():
  x, positions = _inputs()
  frequency = 500.0 ** (-np.arange(8) / 8)
  turn = np.exp(1j * positions[..., None].astype(np.float64) * frequency)[:, :, None]
  turned = (x[..., :8] + 1j * x[..., 8:]) * turn
  expected = np.concatenate([turned.real, turned.imag], -1)
  ours = rope.rope(jnp.asarray(x), jnp.asarray(positions), 500.0)
  # Float32 angles of up to 500 radians are exact to about 3e-5.
  np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_interleaved_equals_complex_rotation_of_neighbours():
  x, positions = _inputs()
  frequency = 500.0 ** (-np.arange(8) / 8)
  turn = np.exp(1j * positions[..., None].astype(np.float64) * frequency)[:, :, None]
  turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
  expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
  ours = rope.rope(jnp.asarray(x), jnp.asarray(positions), 500.0, interleaved=True)
  np.testing.assert_allclose(ours, expected, atol=1e-4)


SCALINGS = {
  "none": None,
  "linear": rope_scaling.RopeScaling(kind="linear", factor=4.0),
  "ntk": rope_scaling.RopeScaling(kind="ntk", factor=4.0),
  "yarn": rope_scaling.RopeScaling(kind="yarn", factor=4.0, original_max_len=64),
  "llama3": rope_scaling.RopeScaling(kind="llama3", factor=4.0, original_max_len=64),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", SCALINGS)
def test_scores_depend_on_distance_only(kind, interleaved):
  x, _ = _inputs()
  x = jnp.asarray(x[:1, :1])
  at = lambda p: rope.rope(
    x, jnp.asarray([[p]], jnp.int32), scaling=SCALINGS[kind], interleaved=interleaved
  )
  score = lambda a, b: np.asarray((at(a) * at(b)[:, :, ::-1]).sum(-1))
  np.testing.assert_allclose(score(7, 3), score(104, 100), atol=1e-4)
  assert np.abs(score(7, 3) - score(7, 4)).max() > 1e-3
  factor = rope_scaling.attention_factor(SCALINGS[kind])
  assert (factor > 1) == (kind == "yarn")
  np.testing.assert_array_equal(np.asarray(at(0)), np.asarray(x * factor))


def test_keeps_the_dtype_and_computes_in_float32():
  x, positions = _inputs()
  low = jnp.asarray(x, jnp.bfloat16)
  ours = rope.rope(low, jnp.asarray(positions))
  assert ours.dtype == jnp.bfloat16
  exact = rope.rope(low.astype(jnp.float32), jnp.asarray(positions))
  np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))


def test_refuses_an_odd_head():
  with pytest.raises(errors.InputError, match="even head_dim, got 5"):
    rope.angles(jnp.zeros((1, 2), jnp.int32), 5)


@pytest.mark.oracle
def test_equals_hf_llama():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
  x, positions = _inputs()
  # An ulp of the two frequencies' difference must stay under the tolerance.
  positions = positions % 100
  config = transformers.LlamaConfig(
    hidden_size=48, num_attention_heads=3, head_dim=16, rope_theta=10_000.0
  )
  rotary = modeling.LlamaRotaryEmbedding(config)
  q = torch.tensor(x).transpose(1, 2)
  cos, sin = rotary(q, torch.tensor(positions))
  theirs, _ = modeling.apply_rotary_pos_emb(q, q, cos, sin)
  ours = rope.rope(jnp.asarray(x), jnp.asarray(positions))
  np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=1e-5)
