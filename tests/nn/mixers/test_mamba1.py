"""What is particular to the Mamba module: defaults, parameters, bad sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax.core import errors
from effjax.core import tree as tree_lib
from effjax.models import config, decoder
from effjax.nn.mixers import mamba1

WIDTH = 40


@pytest.fixture(scope="module")
def model():
  return decoder.Decoder(
    config.DecoderConfig(
      vocab_size=11, embed_dim=WIDTH, num_layers=1, pattern=("mamba1",), mlp="none"
    )
  )


@pytest.fixture(scope="module")
def params(model):
  tree = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  prefix = "run_0/layer_0/mixer/"
  flat = tree_lib.flatten(tree)
  return {k.removeprefix(prefix): v[0] for k, v in flat.items() if prefix in k}


def test_shapes_of_the_defaults(params):
  inner, rank = 2 * WIDTH, 3  # a sixteenth of 40, rounded up
  assert {name: leaf.shape for name, leaf in params.items()} == {
    "x": (WIDTH, inner),
    "z": (WIDTH, inner),
    "conv_x": (4, inner),
    "conv_x_bias": (inner,),
    "b": (inner, 16),
    "c": (inner, 16),
    "dt_down": (inner, rank),
    "dt_up": (rank, inner),
    "dt_bias": (inner,),
    "a_log": (16, inner),
    "d": (inner,),
    "out": (inner, WIDTH),
  }


def test_initial_values(params):
  rates = np.broadcast_to(np.arange(1, 17)[:, None], (16, 2 * WIDTH))
  np.testing.assert_allclose(np.exp(params["a_log"]), rates, rtol=1e-5)
  assert (np.asarray(params["d"]) == 1).all()
  dt = np.logaddexp(0, params["dt_bias"])
  assert 9.9e-4 < dt.min() < 3e-3 and 3e-2 < dt.max() < 0.101
  bound = 3**-0.5
  largest = np.abs(params["dt_up"]).max()
  assert 0.9 * bound < largest <= bound


def test_what_is_not_decayed(model):
  specs = tree_lib.flatten(effjax.specs(model))
  kinds = {path.rpartition("/")[2]: spec.kind for path, spec in specs.items()}
  assert [kinds[name] for name in ("a_log", "d", "dt_bias")] == ["ssm"] * 3
  assert kinds["conv_x_bias"] == "bias"
  reads = {path.rpartition("/")[2]: spec.reads for path, spec in specs.items()}
  assert reads["dt_up"].endswith("/dt_down")
  assert reads["x"].endswith("/mixer_norm") and reads["z"] == reads["x"]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"state_dim": 0}, "mamba1 state_dim=0 must be positive"),
    ({"dt_rank": -1}, "mamba1 dt_rank=-1 must be positive"),
    ({"chunk": 0}, "mamba1 chunk=0 must be positive"),
    ({"conv_taps": 1}, "mamba1 conv_taps=1 must be at least 2"),
    ({"dt_min": 0.2}, "dt_min=0.2 must be positive and below dt_max=0.1"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(errors.InputError, match=message):
    mamba1.Mamba1Options(**options)


def test_not_in_an_encoder_and_no_shared_keys():
  x_BLD = jnp.zeros((1, 2, WIDTH))
  place = dict(positions=jnp.zeros((1, 2), int), segments=jnp.ones((1, 2), int))
  options = mamba1.Mamba1Options()
  with pytest.raises(errors.InputError, match="mamba1 is causal"):
    mamba1.Mamba1(options, WIDTH, causal=False).init(jax.random.key(0), x_BLD, **place)
  with pytest.raises(errors.InputError, match="no keys and values to share"):
    mamba1.Mamba1(options, WIDTH).init(
      jax.random.key(0), x_BLD, **place, shared=(x_BLD, x_BLD)
    )
