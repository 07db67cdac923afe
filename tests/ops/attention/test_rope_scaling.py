"""Stretched rotary frequencies: equal to HF transformers, and as each kind promises."""

import math

import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.attention import rope_scaling

HEAD_DIM, THETA, TRAINED = 32, 10_000.0, 256


def _scaling(kind, factor=4.0, **fields):
  fields = {"original_max_len": TRAINED} | fields
  return rope_scaling.RopeScaling(kind=kind, factor=factor, **fields)


def _hf(rope_type, seq_len=None, **parameters):
  """Inverse frequencies and attention factor of transformers, float32."""
  transformers = pytest.importorskip("transformers")
  rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
  parameters = {"rope_type": rope_type, "rope_theta": THETA} | parameters
  config = transformers.LlamaConfig(
    hidden_size=3 * HEAD_DIM,
    num_attention_heads=3,
    head_dim=HEAD_DIM,
    max_position_embeddings=4 * TRAINED if rope_type != "dynamic" else TRAINED,
    rope_parameters=parameters,
  )
  frequency_J, factor = rope_utils.ROPE_INIT_FUNCTIONS[rope_type](
    config, device="cpu", seq_len=seq_len
  )
  return frequency_J.numpy(), factor


def _same(scaling, theirs):
  frequency_J, factor = theirs
  ours_J = rope_scaling.frequencies(HEAD_DIM, THETA, scaling)
  assert ours_J.dtype == np.float64
  np.testing.assert_allclose(ours_J, frequency_J, rtol=1e-5)
  assert abs(rope_scaling.attention_factor(scaling) - factor) < 1e-6


@pytest.mark.oracle
def test_linear_equals_hf():
  _same(_scaling("linear", 3.0), _hf("linear", factor=3.0))


@pytest.mark.oracle
@pytest.mark.parametrize("growth", [1.0, 2.0])
def test_ntk_equals_hf_dynamic_at_the_length_where_its_factor_is_four(growth):
  # There the factor is growth * length / trained - (growth - 1).
  length = int((4 + growth - 1) / growth * TRAINED)
  _same(_scaling("ntk", 4.0), _hf("dynamic", seq_len=length, factor=growth))


@pytest.mark.oracle
@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"beta_fast": 8.0, "beta_slow": 2.0},
    {"truncate": False},
    {"attention_factor": 1.7},
    {"mscale": 0.7, "mscale_all_dim": 0.4},
    {"mscale": 1.0, "mscale_all_dim": 1.0},
  ],
)
def test_yarn_equals_hf(fields):
  theirs = {"factor": 4.0, "original_max_position_embeddings": TRAINED, **fields}
  _same(_scaling("yarn", **fields), _hf("yarn", **theirs))


@pytest.mark.oracle
@pytest.mark.parametrize("bounds", [(1.0, 4.0), (2.0, 3.0)])
def test_llama3_equals_hf(bounds):
  low, high = bounds
  fields = {"low_freq_factor": low, "high_freq_factor": high}
  theirs = {"factor": 4.0, "original_max_position_embeddings": TRAINED, **fields}
  _same(_scaling("llama3", **fields), _hf("llama3", **theirs))


def test_what_each_kind_does_to_the_fastest_and_the_slowest_pair():
  plain_J = rope_scaling.frequencies(HEAD_DIM, THETA)
  np.testing.assert_allclose(plain_J, THETA ** (-np.arange(16) / 16), rtol=1e-12)
  ratio = lambda kind: (
    rope_scaling.frequencies(HEAD_DIM, THETA, _scaling(kind)) / plain_J
  )
  np.testing.assert_allclose(ratio("linear"), 0.25)
  for kind in ("ntk", "yarn", "llama3"):
    ratio_J = ratio(kind)
    np.testing.assert_allclose(ratio_J[[0, -1]], [1, 0.25], rtol=1e-12)
    assert np.all(np.diff(ratio_J) <= 1e-12)


def test_yarn_splits_its_scale_as_deepseek_does():
  assert rope_scaling.attention_factor(_scaling("yarn")) == 0.1 * math.log(4) + 1
  assert rope_scaling.score_factor(_scaling("yarn")) == 1
  split = _scaling("yarn", mscale=1.0, mscale_all_dim=1.0)
  assert rope_scaling.attention_factor(split) == 1
  assert rope_scaling.score_factor(split) == (0.1 * math.log(4) + 1) ** 2
  assert rope_scaling.score_factor(_scaling("llama3")) == 1
  assert rope_scaling.attention_factor(None) == rope_scaling.score_factor(None) == 1


def test_a_factor_of_one_changes_nothing():
  plain_J = rope_scaling.frequencies(HEAD_DIM, THETA)
  for kind in rope_scaling.KINDS:
    scaling = _scaling(kind, 1.0)
    same_J = rope_scaling.frequencies(HEAD_DIM, THETA, scaling)
    np.testing.assert_allclose(same_J, plain_J, rtol=1e-12)
    assert rope_scaling.attention_factor(scaling) == 1


@pytest.mark.parametrize(
  ("kind", "fields", "message"),
  [
    ("yarm", {}, "unknown rope scaling kind 'yarm'; did you mean 'yarn'"),
    ("linear", {"factor": 0.5}, "factor=0.5 must be at least 1"),
    ("yarn", {"original_max_len": None}, "'yarn' needs original_max_len"),
    ("llama3", {"original_max_len": 0}, "original_max_len=0 must be positive"),
    ("yarn", {"beta_fast": 1.0}, "beta_slow=1.0 must be positive and below beta_fast"),
    ("llama3", {"low_freq_factor": 0.0}, "low_freq_factor=0.0 must be positive"),
    ("yarn", {"attention_factor": 0.0}, "attention_factor=0.0 must be positive"),
    ("yarn", {"mscale": -1.0}, "mscale=-1.0 must not be negative"),
  ],
)
def test_mistakes(kind, fields, message):
  with pytest.raises(errors.InputError, match=message):
    _scaling(kind, **fields)


def test_ntk_needs_more_than_one_pair():
  with pytest.raises(errors.InputError, match="needs a head_dim over 2, got 2"):
    rope_scaling.frequencies(2, THETA, _scaling("ntk"))
